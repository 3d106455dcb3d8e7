"""The real values behind fake tensors, where they follow from the inputs alone: masks,
positions, lengths. What a forward reads of them is known without its parameters."""

import torch

from ..private import FakeTensor, unset_fake_temporarily
from ..utils import replace, tensors

# Elements up to which such a tensor is computed and kept: a mask of 4,096 x 4,096, not
# activations.
SIZE = 1 << 24
# Random numbers are kept up to fewer: one that decides whether a layer is skipped, not
# noise.
DRAWN = 1 << 10


class Known(dict):
    """id of a fake tensor -> the real one. Who uses it keeps the fake tensors alive."""

    def __init__(self):
        super().__init__()
        self.drawn = set()  # ids of fake tensors that random numbers went into

    def give(self, fake, real):
        """An input. The forward may write to the copy."""
        if real.numel() <= SIZE and real.device.type != "meta":
            self[id(fake)] = real.detach().clone()

    def run(self, func, args, kwargs, given, written):
        """An operator's result on the real tensors behind those `given` ({path:
        tensor}), None where one is not known. `written`: those that it writes to."""
        real = {
            p: self.get(id(x)) if isinstance(x, FakeTensor) else x
            for p, x in given.items()
        }
        if all(
            x is not None and x.numel() <= SIZE and x.device.type != "meta"
            for x in real.values()
        ):
            if torch.Tag.nondeterministic_seeded not in func.tags or _small(
                func, args, kwargs
            ):
                with unset_fake_temporarily():
                    return func(
                        *replace(args, _under(real, 0)),
                        **replace(kwargs, _under(real, 1)),
                    )
        if any(id(x) in self for x in written):
            self.clear()  # others may share its memory
        return None

    def note(self, func, given, out, real):
        """What an operator made, fake and real."""
        random = torch.Tag.nondeterministic_seeded in func.tags or self.random(given)
        pairs = zip(tensors((out,)), tensors((real,)))
        made = {
            id(a): b
            for (_, a), (_, b) in pairs
            if isinstance(a, FakeTensor) and b.numel() <= SIZE
        }
        self.update(made)
        self.drawn.update(made if random else ())

    def random(self, given):
        """Whether random numbers went into one of these."""
        return any(id(x) in self.drawn for x in given.values())


def _small(func, args, kwargs):
    """Whether an operator that draws random numbers draws a few: what it is given says
    so, for most have the shape."""
    return all(t.numel() <= DRAWN for _, t in tensors((func(*args, **kwargs),)))


def _under(changes, first):
    """The changes whose path starts with `first`, with the rest of the path."""
    return {p[1:]: x for p, x in changes.items() if p[0] == first}
