"""Which modules' calls are counted as they run, and the number of each call that is
acted on."""

from ..axes.sharding import LayoutError
from ..keys import CallIndex, ModulePath
from ..running.program import CallProgram, Program
from ..tracing.graph import Graph, ModuleCall
from .call_kinds import kind_of
from .layout import Layout
from .origin import axis_behind, on_shards

# Calls that draw random numbers or not, as their arguments say.
MAY_DRAW = set(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu"
    " scaled_dot_product_attention dropout_ alpha_dropout_ feature_alpha_dropout_"
    " rrelu_ feature_dropout feature_dropout_".split()
)
UNNUMBERED = (
    "the forward reads values, or runs a function in a checkpoint, so its calls have no"
    " fixed numbers"
)


class Numbering:
    """Gives each call with a program its number among its module's own calls. A module
    that has shards in its own code is watched too: its calls must be those that were
    shown right.

    Args: `aside`: modules whose calls are numbered by their callers.
    """

    def __init__(self, graph: Graph, layout: Layout, aside: set[ModulePath]):
        self.graph, self.layout, self.aside = graph, layout, aside
        # Calls whose kind must be what it was when they were shown right.
        self.sensitive = {
            call.index
            for call in graph.calls
            if on_shards(call, layout) or call.name in MAY_DRAW
        }

    def caller(self, run: ModuleCall) -> ModuleCall:
        """The run that the calls of a module's run are numbered in."""
        return next(m for m in run.chain() if m.path not in self.aside)

    def apply(
        self, per_run: dict[int, Program], at_calls: dict[CallIndex, CallProgram]
    ) -> None:
        """Number the calls of all runs, in their Programs."""
        for run in self.watched_runs(per_run, at_calls):
            per_run[id(run)].names = []
        for call in self.graph.calls:
            run = self.caller(call.module)
            program, at_call = per_run[id(run)], at_calls.get(call.index)
            if call.hidden or program.names is None:
                continue
            number = len(program.names)
            program.names.append(call.name)
            if at_call is not None:
                if not self.graph.numbered(call, run):
                    raise LayoutError(
                        UNNUMBERED, call, axis_behind(call, self.graph, self.layout)
                    )
                program.calls[number] = at_call
            if at_call is not None or call.index in self.sensitive:
                program.kinds[number] = kind_of(call)

    def watched_runs(
        self, per_run: dict[int, Program], at_calls: dict[CallIndex, CallProgram]
    ) -> list[ModuleCall]:
        """The runs whose calls are counted: something is done at one of them, or one
        must be as it was shown, in a forward that makes the same calls each time.
        (Torch's own always do.)"""
        acted_on = {self.caller(self.graph.calls[i].module).path for i in at_calls}
        sensitive = [self.graph.calls[i].module for i in self.sensitive]
        starting = [
            run.parent for run in self.graph.modules[1:] if per_run[id(run)].inside
        ]
        careful = {
            self.caller(run).path for run in (*sensitive, *starting) if not run.steady
        }
        return [
            run
            for run in self.graph.modules
            if run.path in acted_on
            or run.path in careful
            and id(run) not in self.graph.unsteady
        ]
