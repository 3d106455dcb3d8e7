"""TensorParallelPlan: what is sharded, how it runs, why, and what it costs. Pure data:
a table, JSON, and a check against a model."""

import json
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, cast

import torch
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.placement_types import Placement

from . import picture
from .axes.split import Split
from .contiguous import Contiguous, in_one_block
from .costs import Communication, Cost, Step
from .estimate import Estimate, estimate
from .folding import folded
from .keys import ModulePath, ParamName
from .torch_code import torch_code
from .user_plan import problems

LOCAL, EXCHANGED, GATHERED = "local", "exchanged", "gathered"
WEIGHT_GATHERED, REPLICATED = "weight gathered", "replicated"
HOW = {
    LOCAL: "computes on this rank's shard, the axis stays sharded through the region",
    EXCHANGED: (
        "as local; of fused pieces, stored in their own order: the ranks exchange rows"
        " before its use"
    ),
    GATHERED: "computes on this rank's shard, the result is completed at once",
    WEIGHT_GATHERED: "the weight is gathered before its use",
    REPLICATED: "whole on every rank",
}


@dataclass
class Entry:
    """One parameter: the `dim` it is split on (None: replicated), in each of its
    `pieces` equal parts; `how` it runs (see HOW); of how many `units` the axis is that
    it is split along, 0 where that is the weight's own. `axis` numbers those that stay
    sharded through calls; `modules` has the classes of torch.nn that alone use the
    parameter, by its names there (more than one where it is tied)."""

    name: str
    shape: tuple
    dim: int | None = None
    pieces: int = 1
    how: str = REPLICATED
    why: str = ""
    units: int = 0
    axis: int | None = None
    modules: dict[ParamName, str] = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """How the parameter is stored, where it is sharded."""
        dim = self.dim or 0
        return Split.of_blocks(dim, self.shape[dim], self.pieces)

    @property
    def placement(self) -> Placement:
        return Replicate() if self.dim is None else self.split.placement()

    def in_one_block(self) -> "Entry":
        """This entry, with one block of the weight a rank."""
        return replace(self, pieces=1, how=EXCHANGED if self.units else self.how)

    def valid(self) -> bool:
        """Whether the fields are of their types and ranges."""
        sizes = [
            *self.shape,
            self.pieces,
            self.units,
            0 if self.dim is None else self.dim,
        ]
        if any(type(x) is not int or x < 0 for x in sizes) or self.pieces < 1:
            return False
        inside = self.dim is None or self.dim < len(self.shape)
        return (
            inside
            and self.how in HOW
            and isinstance(self.name, str)
            and isinstance(self.why, str)
        )

    def share(self, n: int) -> int:
        """Elements that the fullest rank holds."""
        return prod(
            self.shape if self.dim is None else self.split.local_shape(self.shape, 0, n)
        )


@dataclass
class TensorParallelPlan:
    """How a model is split over `tp_size` ranks. `entries` holds an Entry a parameter,
    by name; `cost` is what a step of the traced inputs costs, None where none was
    traced, and `communications` what is sent where; `step` what `estimate` has counted.
    `plan[name] = Shard(0)` or `Replicate()` edits it: what a user sets,
    wins."""

    tp_size: int
    entries: dict = field(default_factory=dict)
    cost: Cost | None = None
    note: str = ""
    loss_parallel: bool = False
    communications: list[Communication] = field(default_factory=list)
    # paths of the modules of which calls are given other numbers, or run otherwise
    adapted: list[ModulePath] = field(default_factory=list)
    step: Step | None = None
    # a DryRun, which counts a step; not a field, as it holds the model
    dry_run = cast(Any, None)

    def __getstate__(self) -> dict:
        return {**vars(self), "dry_run": None}

    def __getitem__(self, name: ParamName) -> Entry:
        return self.entries[name]

    def __setitem__(self, name: ParamName, placement: Placement) -> None:
        errors = problems(
            {name: placement}, {n: e.shape for n, e in self.entries.items()}
        )
        if errors:
            raise ValueError(errors[0])
        entry = self.entries[name]
        entry.dim = getattr(placement, "dim", None)
        entry.pieces, entry.units, entry.why = 1, 0, "set by the user"
        entry.how = REPLICATED if entry.dim is None else GATHERED
        for other in self.entries.values():
            if other.axis == entry.axis:
                other.axis = None
        self.step = self.dry_run = None

    @property
    def placements(self) -> dict[ParamName, Placement]:
        """Parameter name -> placement on the tp mesh."""
        return {name: e.placement for name, e in self.entries.items()}

    def contiguous(self, which: Contiguous = True) -> "TensorParallelPlan":
        """This plan with one block a rank of each weight, or of some of them."""
        entries = dict(self.entries)
        for name, e in entries.items():
            if e.pieces > 1 and in_one_block(which, e.dim or 0, len(e.shape)):
                entries[name] = e.in_one_block()
        return replace(self, entries=entries)

    @property
    def bytes_per_step(self) -> int | None:
        """What a rank sends in one forward and backward of the traced inputs."""
        return None if self.cost is None else self.cost.bytes_sent

    @property
    def share(self) -> float:
        """The share of the parameter elements that the fullest rank holds."""
        total = sum(e.share(1) for e in self.entries.values())
        return sum(e.share(self.tp_size) for e in self.entries.values()) / max(total, 1)

    def estimate(
        self, optimizer: str = "adamw", dtype: torch.dtype | None = None
    ) -> Estimate:
        """What a training step of the traced inputs takes of a rank: bytes of memory,
        collectives, seconds. One rank's forward and backward are run on fake tensors,
        once: no memory, no GPU, no process group.

        Args:
            optimizer: one of estimate.OPTIMIZERS, or "none".
            dtype: as if the parameters were of this one. Bytes of activations and sent
                are then scaled, and seconds are not: for those, cast the model (on the
                meta device) before it is planned.

        Returns: Estimate. `plan.cost` has the seconds, for the device that the plan was
        made for.
        Raises: ValueError where no forward was traced, for a plan that was edited or is
        not from `plan_tensor_parallel`, and for an unknown optimizer; RuntimeError where
        the model cannot run on fake tensors.
        """
        if self.step is None and self.dry_run is not None:
            self.step = self.dry_run()
        if self.cost is None or self.step is None:
            without = self.note or "applied, or edited"
            raise ValueError(
                "estimate: expected a plan as plan_tensor_parallel made it, of a forward"
                f" that was traced, found one without ({without}); plan again:"
                " plan_tensor_parallel(model, tp_size, plan=plan)"
            )
        return estimate(self.tp_size, self.cost, self.step, optimizer, dtype)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    def to_code(self) -> str:
        """The plan as plain PyTorch: the source of `parallelize(model, mesh=None)`, by
        `parallelize_module` and a dict of ColwiseParallel and RowwiseParallel.

        It is right, and less than the plan: comments in it name the weights that stay
        whole since torch has no style for them (fused pieces, unequal parts,
        convolutions), and the layers whose outputs are completed at once. Code with the
        whole model's sizes in it (`view(batch, length, 8, 64)` of 8 heads) raises on
        shards.
        """
        return torch_code(self)

    def to_html(self) -> str:
        """The plan as a picture: one HTML page that needs nothing else. Repeated blocks
        are drawn once, each weight as a rectangle that is cut as the ranks share it, in
        its axis's colour; what is sent is where it is sent, in bytes of a step of the
        traced inputs; why is shown where the pointer is."""
        return picture.page(self, HOW)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return picture.fragment(self, HOW)

    @classmethod
    def from_json(cls, text: str) -> "TensorParallelPlan":
        """A plan from `to_json`'s text. Raises ValueError where it is not one."""
        what = "expected the JSON of a TensorParallelPlan"
        try:
            data = json.loads(text)
            entries = {
                n: Entry(**{**e, "shape": tuple(e["shape"])})
                for n, e in data.pop("entries").items()
            }
            cost = data.pop("cost")
            cost = None if cost is None else Cost(**cost)
            sent = [Communication(**c) for c in data.pop("communications", ())]
            step = data.pop("step", None)
            step = None if step is None else Step.of(step)
            plan = cls(
                entries=entries,
                cost=cost,
                communications=sent,
                step=step,
                **data,
            )
            wrong = [
                f"{n}: {e}" for n, e in entries.items() if n != e.name or not e.valid()
            ]
            wrong += plan._faults()
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
            raise ValueError(
                f"{what} (made by to_json), found something else: {e}"
            ) from e
        if wrong:
            raise ValueError(f"{what}, found in it:\n  " + "\n  ".join(wrong))
        return plan

    def _faults(self) -> list[str]:
        """What is wrong with the fields but the entries."""
        fits = {
            "tp_size": type(self.tp_size) is int and self.tp_size >= 1,
            "note": isinstance(self.note, str),
            "loss_parallel": isinstance(self.loss_parallel, bool),
        }
        wrong = [] if self.cost is None else self.cost.faults()
        return wrong + [
            f"{name}: {getattr(self, name)!r}"
            for name, right in fits.items()
            if not right
        ]

    def __str__(self) -> str:
        rows = [("module", "parameter", "shape", "placement", "how it runs", "why")]
        for name, e in folded(self.entries.values()):
            module, _, leaf = name.rpartition(".")
            pieces = f" of {e.pieces} pieces" if e.pieces > 1 else ""
            placement = "Replicate()" if e.dim is None else f"Shard({e.dim}){pieces}"
            rows.append(
                (
                    module or "(root)",
                    leaf,
                    " x ".join(map(str, e.shape)),
                    placement,
                    e.how,
                    e.why,
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows
        ]
        costs = "what a step costs was not counted, as no forward was traced"
        head = (
            f"tensor parallel over {self.tp_size} ranks: each holds {self.share:.1%} of"
            f" the parameters\n{self.cost or costs}"
        )
        return "\n".join(
            [
                head,
                *filter(None, [self.note]),
                lines[0],
                "-" * max(map(len, lines)),
                *lines[1:],
            ]
        )
