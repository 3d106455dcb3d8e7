"""What a Recorder notes of operators: those of a call, and those that no call made."""

from ..utils import is_float, replace, source_line, tensors
from .graph import Call, Node
from .hidden import HIDDEN
from .higher import HigherOrder
from .operators import aliased, draws, written_by
from .reading import ValueReader


class NodeRecorder(ValueReader):
    """The part of a Recorder that writes operators down."""

    def hidden_call(self, func):
        """The Call for an operator that none has called which a mode sees: one for all
        that follow each other."""
        calls, run, higher = (
            self.graph.calls,
            self._stack[-1],
            isinstance(func, HigherOrder),
        )
        last = calls[-1] if calls and calls[-1].hidden else None
        if last is None or last.module is not run or higher or last.func is not None:
            name = func.operator.name() if higher else "hidden operators"
            made = Call(
                len(calls),
                func if higher else None,
                name,
                run,
                ((), {}),
                {},
                source=source_line(),
            )
            made.why_whole, made.hidden = HIDDEN, True
            calls.append(made)
        return calls[-1]

    def run_node(self, func, args, kwargs):
        if self.paused:
            return func(*args, **kwargs)
        if (
            self._call is not None
            or not self._stack
            or not any(True for _ in tensors((args, kwargs)))
        ):
            return self.record_node(func, args, kwargs)
        self._call = call = self.hidden_call(func)
        if isinstance(func, HigherOrder) and func.shards(args):
            call.why_whole = ""
        try:
            return self.record_node(func, args, kwargs)
        finally:
            self._call = None
            for node in call.nodes[-1:]:
                call.inputs.update(
                    {
                        ("hidden", v.id): v
                        for v in node.inputs
                        if v.producer != call.index
                    }
                )
                call.outputs.update(
                    {
                        ("hidden", v.id): v
                        for v in node.outputs
                        if v.producer == call.index
                    }
                )

    def record_node(self, func, args, kwargs):
        given = dict(tensors((args, kwargs)))
        inputs = {path: self.value(t) for path, t in given.items()}
        shared = aliased(func, args)
        memory = None if shared is None else self.value(shared).memory
        node_args, node_kwargs = replace((args, kwargs), inputs)
        written = written_by(func, args, kwargs)
        self.graph.random |= draws(func, args, kwargs)
        out = self.know(func, args, kwargs, given, written)
        mutated = {self.value(t).id for t in written}
        made = self.results(out, given, written)
        for v in made:
            v.trainable |= is_float(v) and any(x.trainable for x in inputs.values())
            if memory is not None:
                v.memory = memory
        if self._call is not None:
            ins = list(inputs.values())
            self._call.nodes.append(
                Node(func, node_args, node_kwargs, ins, made, mutated)
            )
        return out

    def results(self, out, given, written):
        """The Values of what an operator returned, and of what it wrote to: made
        anew."""
        producer = self._call.index if self._call is not None else None
        for t in written:
            memory = self.value(t).memory
            self.value(t, producer, new=True).memory = memory
        before = {id(x) for x in given.values()}
        made = [
            self.value(t, producer, new=id(t) not in before and id(t) in self._values)
            for _, t in tensors(out)
        ]
        made += [
            self.value(t) for t in written if not any(self.value(t) is v for v in made)
        ]
        return made
