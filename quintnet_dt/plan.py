"""TensorParallelPlan: what is sharded, how it runs, why, and what it costs. Pure data: a table, JSON, and a check against a model."""

import json
import re
from dataclasses import asdict, dataclass, field
from itertools import count, groupby
from math import prod

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .private import _StridedShard

LOCAL, GATHERED = "local", "gathered"
WEIGHT_GATHERED, REPLICATED = "weight gathered", "replicated"
HOW = {
    LOCAL: "computes on this rank's shard, the axis stays sharded through the region",
    GATHERED: "computes on this rank's shard, the result is completed at once",
    WEIGHT_GATHERED: "the weight is gathered before its use",
    REPLICATED: "whole on every rank",
}


@dataclass
class Entry:
    """One parameter: `dim` it is split on (None: replicated), in each of `pieces` equal parts of that dim; `how` it runs (a key of HOW)."""

    name: str
    shape: tuple
    dim: int | None = None
    pieces: int = 1
    how: str = REPLICATED
    why: str = ""

    @property
    def placement(self):
        if self.dim is None:
            return Replicate()
        if self.pieces > 1:
            return _StridedShard(self.dim, split_factor=self.pieces)
        return Shard(self.dim)

    def valid(self):
        """Whether the fields are of their types and ranges."""
        sizes = [*self.shape, self.pieces, 0 if self.dim is None else self.dim]
        if any(type(x) is not int or x < 0 for x in sizes) or self.pieces < 1:
            return False
        inside = self.dim is None or self.dim < len(self.shape)
        return inside and self.how in HOW and isinstance(self.name, str) and isinstance(self.why, str)

    def share(self, n):
        """Elements that the fullest rank holds."""
        total = prod(self.shape)
        if self.dim is None or not total:
            return total
        size = self.shape[self.dim]
        return total // size * self.pieces * -(-(size // self.pieces) // n)


@dataclass
class TensorParallelPlan:
    """How a model is split over `tp_size` ranks. `entries` holds an Entry a parameter, by name; `bytes_per_step` is what a rank sends in one
    forward and backward of the traced inputs (ring collectives). `plan[name] = Shard(0)` or `Replicate()` edits it: what a user sets, wins.
    """

    tp_size: int
    entries: dict = field(default_factory=dict)
    bytes_per_step: int = 0
    note: str = ""

    def __getitem__(self, name):
        return self.entries[name]

    def __setitem__(self, name, placement):
        errors = problems({name: placement}, {n: e.shape for n, e in self.entries.items()})
        if errors:
            raise ValueError(errors[0])
        entry = self.entries[name]
        entry.dim = getattr(placement, "dim", None)
        entry.pieces, entry.why = 1, "set by the user"
        entry.how = REPLICATED if entry.dim is None else GATHERED

    @property
    def placements(self):
        """Parameter name -> placement on the tp mesh."""
        return {name: e.placement for name, e in self.entries.items()}

    @property
    def share(self):
        """The share of the parameter elements that the fullest rank holds."""
        total = sum(e.share(1) for e in self.entries.values())
        return sum(e.share(self.tp_size) for e in self.entries.values()) / max(total, 1)

    def to_json(self):
        """The plan as JSON text; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text):
        """A plan from `to_json`'s text. Raises ValueError where it is not one."""
        try:
            data = json.loads(text)
            entries = {n: Entry(**{**e, "shape": tuple(e["shape"])}) for n, e in data.pop("entries").items()}
            plan = cls(entries=entries, **data)
            wrong = [f"{n}: {e}" for n, e in entries.items() if n != e.name or not e.valid()]
            if type(plan.tp_size) is not int or plan.tp_size < 1 or type(plan.bytes_per_step) is not int:
                wrong.append(f"tp_size {plan.tp_size!r}, bytes_per_step {plan.bytes_per_step!r}")
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
            raise ValueError(
                f"expected the JSON of a TensorParallelPlan (made by to_json), found something else: {e}"
            ) from e
        if wrong:
            raise ValueError("expected the JSON of a TensorParallelPlan, found in it:\n  " + "\n  ".join(wrong))
        return plan

    def __str__(self):
        rows = [("module", "parameter", "shape", "placement", "how it runs", "why")]
        for names, e in _collapsed(self.entries.values()):
            module, _, leaf = names.rpartition(".")
            shape = " x ".join(map(str, e.shape))
            placement = repr_placement(e)
            rows.append((module or "(root)", leaf, shape, placement, e.how, e.why))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths)), r[5]]).rstrip() for r in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        head = (
            f"tensor parallel over {self.tp_size} ranks: each holds {self.share:.1%} of the parameters "
            f"and sends {self.bytes_per_step / 1e6:.2f} MB a step of the traced inputs"
        )
        return "\n".join([head, *([self.note] if self.note else []), *lines])


def repr_placement(entry):
    if entry.dim is None:
        return "Replicate()"
    return f"Shard({entry.dim})" + (f" of {entry.pieces} pieces" if entry.pieces > 1 else "")


def _collapsed(entries):
    """Entries that differ only in a layer's number, as one: ("layers.0-31.mlp.up.weight", entry)."""
    groups = {}
    for e in entries:
        key = (re.sub(r"\d+", "#", e.name), e.shape, e.dim, e.pieces, e.how, re.sub(r"\d+", "#", e.why))
        groups.setdefault(key, []).append(e)
    for group in groups.values():
        numbers = {e.name: tuple(map(int, re.findall(r"\d+", e.name))) for e in group}
        columns = [sorted(set(c)) for c in zip(*numbers.values())]
        if len(group) == prod(map(len, columns)):
            yield _spanned(group, columns)
            continue
        parts = {}  # some are missing: only the first number is joined
        for e in group:
            parts.setdefault(numbers[e.name][1:], []).append(e)
        for rest, part in parts.items():
            yield _spanned(part, [sorted(numbers[e.name][0] for e in part), *([x] for x in rest)])


def _spanned(group, columns):
    spans = map(_ranges, columns)
    return re.sub(r"\d+", lambda _: next(spans), group[0].name), group[0]


def _ranges(numbers):
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs = [list(run) for _, run in groupby(numbers, key=lambda x, at=count(): x - next(at))]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def problems(placements, shapes):
    """What is wrong with a user's placements for a model whose parameters have these shapes: a list of messages."""
    errors = []
    for name, p in placements.items():
        if name not in shapes:
            close = [n for n in shapes if n.split(".")[-2:] == str(name).split(".")[-2:]][:1]
            hint = f" (is it {close[0]}?)" if close else ""
            errors.append(f"{name}: the model has no such parameter{hint}")
        elif not isinstance(p, Placement) or p.is_partial():
            errors.append(f"{name}: expected Shard(dim) or Replicate(), found {p!r}")
        elif p.is_shard() or isinstance(p, _StridedShard):
            ndim = len(shapes[name])
            if not 0 <= p.dim < ndim:
                errors.append(
                    f"{name}: expected a dim of 0 to {ndim - 1} for shape {tuple(shapes[name])}, found Shard({p.dim})"
                )
    return errors


def check_user_plan(placements, shapes):
    """Raise one ValueError that lists every entry that does not fit the model."""
    errors = problems(placements, shapes)
    if errors:
        raise ValueError(
            f"the plan does not fit the model, {len(errors)} of its entries are wrong:\n  " + "\n  ".join(errors)
        )
