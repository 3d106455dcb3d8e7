"""What tells one path through a forward from another before it runs."""

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import nn

from ..keys import ModulePath
from ..parts import modules, parameters
from ..tracing.attributes import kinds_at
from ..utils import has_state, leaves

# What computes otherwise in training, of torch's modules. Of others' it shows when they
# run.
_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_INSTANCE_NORMS = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
_MODED = (*_DROPOUTS, *_NORMS, *_INSTANCE_NORMS, nn.MultiheadAttention, nn.RNNBase)


class States:
    """What tells calls apart beside their arguments, by the path of the module that is
    called: how modules are set that compute otherwise in training, and what earlier
    forwards have left in attributes."""

    def __init__(self) -> None:
        self.moded: dict[ModulePath, list[nn.Module]] = {}  # such modules within
        # Attributes that a forward of the module changes; their kinds as when they were
        # planned.
        self.changes: dict[ModulePath, list[tuple[ModulePath, str]]] = {}
        self.first: dict[ModulePath, tuple] = {}

    def apart(self) -> "States":
        """For a copy of the model, which has modules of its own."""
        new = States()
        new.changes, new.first = {**self.changes}, {**self.first}
        return new

    def of(self, path: ModulePath, module: nn.Module) -> tuple:
        """The places, in their list, of the modules within that are not in the module's
        own mode (dropout that is on for sampling, batch norms that are frozen), and of
        dropouts that drop nothing, of which no operator tells; and what is left."""
        if path not in self.moded:
            self.moded[path] = [m for m in modules(module) if isinstance(m, _MODED)]
        within = self.moded[path]
        odd = tuple(
            i for i, m in enumerate(within) if m.training is not module.training
        )
        off = tuple(i for i, m in enumerate(within) if getattr(m, "p", 1) == 0)
        return odd, off, *self.left(path, module)

    def left(self, path: ModulePath, module: nn.Module) -> tuple:
        """What an earlier forward has left in attributes; empty if nothing yet."""
        now = self.kinds(path, module)
        return () if not now or self.first.setdefault(path, now) == now else now

    def kinds(self, path: ModulePath, module: nn.Module) -> tuple:
        changes = self.changes.get(path)
        return (len(changes), *kinds_at(module, changes)) if changes else ()

    def note(self, path: ModulePath, module: nn.Module, changes: list) -> None:
        """A forward was shown that changes these attributes."""
        before = self.changes.get(path, [])
        self.changes[path] = before + [key for key in changes if key not in before]
        if changes and not before:
            self.first[path] = self.kinds(path, module)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's forward runs; a model on the meta device is imagined on the
    CPU."""
    device = next((p.device for p in parameters(model)), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


class Signature(NamedTuple):
    """What tells one path through a forward from another. `kind`: the mode, which
    arguments are there, their kinds, dtypes, ranks and dims of size 1. `numbers`: the
    ints and floats among them, which may vary; `shapes`: of tensors.
    """

    kind: tuple
    numbers: tuple
    shapes: tuple


def signature(model: nn.Module, args: tuple, kwargs: dict) -> Signature:
    """The Signature of a call. The order of keyword arguments is none of it: each rank
    may have its own."""
    ordered = dict(sorted(kwargs.items())) if len(kwargs) > 1 else kwargs
    given = _Given()
    kinds = tuple(given.kinds((args, ordered)))
    # A method that is called as the forward: see register_forward_method.
    method = getattr(vars(model).get("forward"), "__name__", "forward")
    mode = model.training, torch.is_grad_enabled(), method
    return Signature((*mode, *kinds), tuple(given.numbers), tuple(given.shapes))


class _Given:
    """What a call is given: the numbers and the shapes that are met on the way."""

    def __init__(self) -> None:
        self.numbers: list[int | float] = []
        self.shapes: list[torch.Size] = []
        # id of a tensor -> its place among those that were met
        self.met: dict[int, int] = {}

    def kinds(self, obj: Any, depth: int = 0) -> Iterator[tuple]:
        """The kind of each leaf of a nested argument, and of what objects keep."""
        for path, x in leaves(obj):
            if isinstance(x, torch.Tensor):
                # query and key may be one tensor
                same = self.met.setdefault(id(x), len(self.met))
                if depth == 0:
                    self.shapes.append(x.shape)
                yield path, same, x.dtype, x.requires_grad, tuple(
                    s == 1 for s in x.shape
                )
            elif isinstance(x, (bool, str, type(None))):
                yield path, x
            elif isinstance(x, (int, float)):
                self.numbers.append(x)
                yield path, type(x)
            elif has_state(x) and depth < 4:  # a cache: empty or filled
                yield path, type(x), _order(vars(x).values())
                others = [v for v in vars(x).values() if type(v) not in (int, float)]
                yield from self.kinds(others, depth + 1)
            else:
                yield path, type(x)


def _order(values: Iterable) -> tuple[int, ...]:
    """Which of an object's numbers are larger than which: of lengths, whether it is
    full."""
    sizes = [v for v in values if type(v) in (int, float)]
    return tuple((a > b) - (a < b) for a, b in combinations(sizes, 2))
