"""A forward that is run again beside the record of an earlier one, which it must
follow."""

import contextlib
from typing import Any, Callable

import torch
from torch import nn

from ..axes.sharding import LayoutError
from ..keys import CallIndex
from ..parts import parameters
from ..running.calls import calls
from ..tracing.escapes import let_go
from ..tracing.graph import Call, Graph, next_seen
from ..tracing.operators import reads_values
from ..tracing.recorder import Recorder
from ..utils import quiet, silence, tensors
from .layout import Layout


class Rerun(Recorder):
    """Counts the calls of a forward along those of the whole one's graph, and gives it
    what that one read of values. It makes no graph of its own."""

    def __init__(self, graph: Graph, layout: Layout):
        super().__init__()
        self.whole_calls, self.layout = graph.calls, layout
        self.at: CallIndex = 0
        self.readings: dict[CallIndex, list] = {}
        for reading in graph.readings:
            self.readings.setdefault(reading.call, []).append(reading.result)

    def error(self, reason: str) -> LayoutError:
        """A LayoutError of the sharded axis nearest to the present call: in its module,
        else in those around it."""
        call = self.whole_calls[self.at] if self.at < len(self.whole_calls) else None
        near = sorted(
            self.layout.axis_of, key=lambda i: (i > self.at, abs(i - self.at))
        )
        for module in call.module.chain() if call is not None else ():
            for i in near:
                if self.whole_calls[i].module.within(module):
                    return LayoutError(reason, call, self.layout.axis_of[i])
        return LayoutError(reason, call)

    def next_call(self, name: str) -> Call:
        """The whole forward's call at this place."""
        self.at = next_seen(self.whole_calls, self.at)
        if self.at >= len(self.whole_calls):
            raise self.error("the forward makes more calls on shards")
        call = self.whole_calls[self.at]
        if name != call.name or self._stack[-1].path != call.module.path:
            raise self.error(f"on shards the forward calls {name} here")
        return call

    def unwound(self) -> contextlib.AbstractContextManager:
        return calls.unwound()

    def check_end(self) -> None:
        """The forward has returned: it has made all calls."""
        if next_seen(self.whole_calls, self.at) != len(self.whole_calls):
            raise self.error("the forward ended early")

    @property
    def paused(self) -> bool:
        return silence.depth > 0

    def hidden_call(self, func: Callable) -> Call:
        return Call(self.at, None, "", self._stack[-1], ((), {}), {}, hidden=True)

    def record_node(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if reads_values(func, args):
            return self.read_values(func, args, kwargs)
        if self._call is not None and self._call.hidden:
            with quiet():  # it is no call to the mode that runs programs either
                return self.compute(func, args, kwargs)
        return self.compute(func, args, kwargs)

    def read_values(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The result of an operator that reads values, as the whole forward had it."""
        result = self.reading()
        if not isinstance(result, tuple):
            return result
        x = next(t for _, t in tensors((args, kwargs)))
        selects = func._schema.name in ("aten::masked_select", "aten::index")
        return torch.empty(
            result, dtype=x.dtype if selects else torch.int64, device=x.device
        )

    def reading(self) -> Any:
        """What the whole forward read here: within the call, since its operators on
        real tensors may be others."""
        if not self.readings.get(self.at):
            raise self.error("reads other values on shards")
        return self.readings[self.at].pop(0)

    def give(self, inputs: Any) -> None:
        pass

    def keep(self, model: nn.Module, objects: Any) -> None:
        pass

    def end(self) -> None:
        pass

    def value(self, tensor: Any, producer: Any = None, new: bool = False) -> Any:
        self.graph.values.append(tensor)  # keep it alive
        return tensor

    def let_go(self, model: nn.Module, inputs: Any) -> None:
        """The forward is over; none of its tensors is to stay in a list of the
        user's."""
        states = [
            *parameters(model),
            *model.buffers(),
            *(t for _, t in tensors(inputs)),
        ]
        others = set(map(id, states))
        made = {id(t): t for t in self.graph.values if id(t) not in others}
        self.graph = None
        left = list(made.values())
        made.clear()
        let_go(left)
