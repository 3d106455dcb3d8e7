"""What one rank finds: the split model's step against the whole model's, and what all
ranks found as one."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed import ProcessGroup

from ..groups import group_rank
from ..keys import ArgPath, ModulePath, ParamName
from ..together import gather
from .report import (
    BUFFERS,
    GRADIENTS,
    OUTPUTS,
    PARAMETERS,
    Compared,
    Difference,
)
from .step import Step
from .tensors import NOTHING_APART, Distance, apart, distance, full, largest

# Of the greatest of all gradients, and of all parameters: what is below is taken to be
# rounding (the gradient of a bias of keys is zero but for it).
LEAST_SCALE = 1e-3


@dataclass
class _Found:
    """What this rank found of the tensors of one kind."""

    kind: str
    rank: int
    tolerance: float
    greatest: float = 0.0
    count: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, module: ModulePath, name: str, d: Distance) -> None:
        self.count += 1
        self.greatest = max(self.greatest, d.relative)
        if d.relative > self.tolerance:
            found = difference(module, name, self.rank, d)
            self.differences.append(found)

    def compared(self) -> Compared:
        return Compared(
            self.kind,
            self.count,
            self.greatest,
            tuple(self.differences),
        )


def difference(module: ModulePath, name: str, rank: int, d: Distance) -> Difference:
    return Difference(
        module,
        name,
        rank,
        d.greatest,
        d.relative,
        d.at,
        d.note,
    )


def compare(
    split: Step, whole: Step, tolerance: float, group: ProcessGroup
) -> tuple[Compared, ...]:
    """Outputs, gradients, buffers and parameters; the same on every rank of the group,
    all of which call this."""
    found = {
        kind: _Found(kind, group_rank(group), tolerance)
        for kind in (OUTPUTS, GRADIENTS, BUFFERS, PARAMETERS)
    }
    _outputs(found[OUTPUTS], split, whole)
    _gradients(found[GRADIENTS], split, whole, group)
    _tensors(
        found[BUFFERS],
        split.model.named_buffers(),
        whole.model.named_buffers(),
    )
    _tensors(
        found[PARAMETERS],
        split.model.named_parameters(),
        whole.model.named_parameters(),
        _least_scale(whole.model.parameters()),
    )
    mine = [f.compared() for f in found.values()]
    everyones = gather(mine, group)
    return tuple(map(_as_one, zip(*everyones)))


def owner(name: ParamName) -> ModulePath:
    """The path of the module that a parameter or buffer is of."""
    return name.rpartition(".")[0]


def _as_one(ranks: tuple[Compared, ...]) -> Compared:
    """Each difference once, of the rank where it is greatest."""
    worst: dict[str, Difference] = {}
    for found in ranks:
        for d in found.differences:
            known = worst.setdefault(d.name, d)
            if known.relative < d.relative:
                worst[d.name] = d
    return Compared(
        ranks[0].kind,
        ranks[0].count,
        max(found.greatest for found in ranks),
        tuple(worst.values()),
    )


def _least_scale(tensors: Iterable[Tensor]) -> float:
    sizes = [largest(full(x)) for x in tensors]
    return LEAST_SCALE * max(sizes, default=0.0)


def _outputs(found: _Found, split: Step, whole: Step) -> None:
    """The tensors that the model itself returned."""
    call = next(reversed(whole.outputs))
    there = split.outputs[call]
    for path, x in whole.outputs[call].items():
        d = apart("not among the outputs")
        if path in there:
            d = distance(full(there[path]), full(x))
        found.add("", path_name(path), d)


def path_name(path: ArgPath) -> str:
    """Where a tensor lies in what a module returns, as text."""
    return ".".join(map(str, path))


def _tensors(
    found: _Found,
    split: Iterable[tuple[str, Tensor]],
    whole: Iterable[tuple[str, Tensor]],
    least_scale: float = 0.0,
) -> None:
    """Those of the two models that have one name."""
    there = dict(split)
    for name, x in whole:
        mine = full(there[name])
        d = distance(mine, full(x), least_scale)
        found.add(owner(name), name, d)


def _gradients(found: _Found, split: Step, whole: Step, group: ProcessGroup) -> None:
    there = dict(split.model.named_parameters())
    expected = {
        name: p.grad for name, p in whole.model.named_parameters() if p.requires_grad
    }
    # a gradient is put together by all ranks, or by none
    made = {name for name in expected if there[name].grad is not None}
    everyones = gather(made, group)
    on_all = set.intersection(*everyones)
    floor = _least_scale(g for g in expected.values() if g is not None)
    for name, grad in expected.items():
        mine = None
        if name in on_all:
            mine = full(there[name].grad)
        d = _gradient_apart(mine, grad, floor)
        found.add(owner(name), name, d)


def _gradient_apart(
    found: Tensor | None,
    whole: Tensor | None,
    floor: float,
) -> Distance:
    """A weight that a call did not reach may get zeros."""
    if found is not None and whole is not None:
        return distance(found, full(whole), floor)
    if whole is not None:
        return apart("found no gradient, expected one")
    if found is not None and found.any():
        return apart("found a gradient, expected none")
    return NOTHING_APART


def first_backward(differences: Iterable[Difference], whole: Step) -> Difference:
    """Of gradients that differ, the first in the backward's order: of the module that
    ran last; one that was never called itself runs with what it is in."""
    ended = {call.path: i for i, call in enumerate(whole.outputs)}

    def ran(d: Difference) -> int:
        path = d.module
        while path not in ended:
            path = owner(path)
        return ended[path]

    return max(differences, key=ran)
