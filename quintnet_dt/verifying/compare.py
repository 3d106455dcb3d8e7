"""What one rank finds: the split model's step against the whole model's, and what all
ranks found as one."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed import ProcessGroup

from ..groups import group_rank
from ..keys import ModulePath, ParamName
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

# Of the greatest of all gradients: what is below is taken to be rounding (the gradient
# of a bias of keys is zero but for it).
LEAST_GRADIENT = 1e-3


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
            self.differences.append(difference(module, name, self.rank, d))

    def compared(self) -> Compared:
        return Compared(self.kind, self.count, self.greatest, tuple(self.differences))


def difference(module: ModulePath, name: str, rank: int, d: Distance) -> Difference:
    return Difference(module, name, rank, d.greatest, d.relative, d.at, d.note)


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
    buffers = dict(split.model.named_buffers())
    for name, b in whole.model.named_buffers():
        found[BUFFERS].add(owner(name), name, distance(full(buffers[name]), full(b)))
    parameters = dict(split.model.named_parameters())
    for name, p in whole.model.named_parameters():
        d = distance(full(parameters[name]), full(p))
        found[PARAMETERS].add(owner(name), name, d)
    everyones = gather([f.compared() for f in found.values()], group)
    return tuple(_as_one(list(same)) for same in zip(*everyones))


def owner(name: ParamName) -> ModulePath:
    """The path of the module that a parameter or buffer is of."""
    return name.rpartition(".")[0]


def _as_one(ranks: list[Compared]) -> Compared:
    """Each difference once, of the rank where it is greatest."""
    worst: dict[str, Difference] = {}
    for d in (d for found in ranks for d in found.differences):
        if d.name not in worst or worst[d.name].relative < d.relative:
            worst[d.name] = d
    greatest = max(found.greatest for found in ranks)
    return Compared(ranks[0].kind, ranks[0].count, greatest, tuple(worst.values()))


def _outputs(found: _Found, split: Step, whole: Step) -> None:
    """The tensors that the model itself returned."""
    call = next(reversed(whole.outputs))
    there = split.outputs[call]
    for path, x in whole.outputs[call].items():
        name = ".".join(map(str, path))
        missing = apart("not among the outputs")
        d = distance(full(there[path]), full(x)) if path in there else missing
        found.add("", name, d)


def _gradients(found: _Found, split: Step, whole: Step, group: ProcessGroup) -> None:
    there = dict(split.model.named_parameters())
    expected = {
        name: p.grad for name, p in whole.model.named_parameters() if p.requires_grad
    }
    # a gradient is put together by all ranks, or by none
    made = [name for name in expected if there[name].grad is not None]
    everyones = gather(made, group)
    on_all = set.intersection(*map(set, everyones))
    floor = LEAST_GRADIENT * max(
        (largest(full(g)) for g in expected.values() if g is not None), default=0.0
    )
    for name, grad in expected.items():
        mine = full(there[name].grad) if name in on_all else None
        found.add(owner(name), name, _gradient_apart(mine, grad, floor))


def _gradient_apart(
    found: Tensor | None, whole: Tensor | None, floor: float
) -> Distance:
    """A weight that a call did not reach may get zeros."""
    if found is None and whole is not None:
        return apart("found no gradient, expected one")
    if whole is None:
        reached = found is not None and bool(found.any())
        return apart("found a gradient, expected none") if reached else NOTHING_APART
    return distance(found, full(whole), floor)


Order = Callable[[Difference], int]


def backward_order(whole: Step) -> Order:
    """By which differences of gradients come in the backward's order: of the module
    that ran last first; one that was never called itself runs with what it is in."""
    ended = {call.path: i for i, call in enumerate(whole.outputs)}

    def order(d: Difference) -> int:
        path = d.module
        while path not in ended:
            path = owner(path)
        return -ended[path]

    return order
