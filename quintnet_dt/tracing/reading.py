"""What a forward reads of values, and the operators that make them known: on fake
tensors, and on the real ones behind them where those follow from the inputs."""

import torch

from ..private import FakeTensor, unset_fake_temporarily
from .graph import Graph, Reading
from .known import Known
from .operators import reads_values


class ValueReader:
    """The part of a Recorder that runs operators and notes what is read of values."""

    def __init__(self):
        self.graph = Graph([], [], [], {})
        self._call = None  # the one that runs
        self.fake = False  # whether the forward runs on fake tensors
        self.known = Known()
        # the last call that read values which do not follow from the inputs
        self.asked = None

    def read(self, func, x, *args):
        """A call that reads values with no operator: `x.tolist()`."""
        real = self.known.get(id(x)) if isinstance(x, FakeTensor) else x
        if real is None:
            self.asked = self._call
            raise RuntimeError("a fake tensor has no values to read")
        with unset_fake_temporarily():
            out = func(real, *args)
        self.note_reading(out, self.fake and not self.known.random({(): x}))
        return out

    def compute(self, func, args, kwargs):
        """Run one operator."""
        name = func._schema.name
        if name == "aten::_grouped_mm" and isinstance(args[0], FakeTensor):
            # its shape function knows bfloat16 alone, and what that aligns to 16 bytes
            x, w, *rest = args
            aligned = all(
                s == 1 or s * x.dtype.itemsize % 16 == 0
                for s in x.stride() + w.stride()
            )
            if aligned and (x.dim(), w.dim()) == (2, 3):
                return x.new_empty(x.shape[0], w.shape[-1])
            return func(x.bfloat16(), w.bfloat16(), *rest, **kwargs).to(x.dtype)
        return func(*args, **kwargs)

    def know(self, func, args, kwargs, given, written):
        """Run one operator on the tensors `given`; on the real ones behind fake ones
        too, where those are known."""
        reads = reads_values(func, args)
        real = self.known.run(func, args, kwargs, given, written) if self.fake else None
        if reads and real is None:
            self.asked = self._call
        if reads and real is not None:
            out = real
            if isinstance(real, torch.Tensor):
                out = next(iter(given.values())).new_empty(real.shape, dtype=real.dtype)
        else:
            out = self.compute(func, args, kwargs)
        if real is not None:
            self.known.note(func, given, out, real)
        if reads:
            result = tuple(out.shape) if isinstance(out, torch.Tensor) else out
            self.note_reading(result, real is not None and not self.known.random(given))
        return out

    def note_reading(self, result, follows):
        """What was read of values; `follows`: it follows from the inputs alone."""
        at = self._call.index if self._call is not None else len(self.graph.calls)
        self.graph.readings.append(Reading(at, result, follows))
