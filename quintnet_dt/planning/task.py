"""What is planned: a traced forward over some ranks, and what the user has set."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import groupby
from math import fsum

from ..axes.action import GATHER
from ..axes.axes import Axes
from ..axes.factors import Factor, flat
from ..contiguous import Contiguous
from ..devices import DEFAULT, DeviceSpec
from ..keys import CallIndex, ParamName
from ..tracing.graph import Call, Graph
from .indexing import INDEXING, indexed_dims
from .layout import Layout
from .work import Work

# Weights are split until those left replicated hold no more than this share of all
# elements.
NEGLIGIBLE = 0.02
# One weight with more than this share is always split: an embedding that is little
# beside seventy billion others is a gigabyte still.
VOCABULARY = 0.005
# Where the calls that use a weight read more tensors than this, it is split alone only
# to be gathered.
CROWDED = 256


class Task:
    """A traced forward to plan over `n` ranks.

    Args: `user_dims`: the dims that the user has set, by parameter (None: replicate);
    `contiguous`: of which weights a rank holds one block, also where equal blocks of
    them are split: see contiguous.py; `device`: what its time is counted for.
    """

    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        n: int,
        user_dims: Mapping[ParamName, int | None] | None = None,
        loss_parallel: bool = False,
        contiguous: Contiguous = False,
        device: DeviceSpec = DEFAULT,
    ):
        self.graph, self.axes, self.n = graph, axes, n
        # What the forward writes to is replicated.
        self.user_dims = {**dict.fromkeys(graph.rewritten), **(user_dims or {})}
        self.loss_parallel, self.contiguous = loss_parallel, contiguous
        self.device = device
        self.params, self.users = graph.params, graph.users
        self.why: dict[ParamName, str] = {}  # what stood in the way

    def numel(self, name: ParamName) -> int:
        return self.params[name].numel

    def note(self, names: Iterable[ParamName], why: str) -> None:
        for name in names:
            self.why.setdefault(name, why)

    def may_split(self, name: ParamName, dim: int) -> bool:
        """Whether the user leaves it open to split a parameter on a dim."""
        return self.user_dims.get(name, dim) == dim

    @cached_property
    def traced_work(self) -> Work:
        return Work(self.graph, self.axes, self.n, self.device)

    @cached_property
    def work(self) -> Work:
        """What the choice is made by."""
        return self.traced_work.at_real_size()

    @cached_property
    def whole_seconds(self) -> float:
        """Of one forward and backward of the whole model."""
        return fsum(self.work.whole.values())

    @cached_property
    def small(self) -> set[ParamName]:
        """The parameters that are not worth splitting alone."""
        total = sum(map(self.numel, self.params))
        small: set[ParamName] = set()
        elements = 0
        for numel, alike in groupby(sorted(self.params, key=self.numel), self.numel):
            names = list(alike)  # repeated layers are alike
            elements += numel * len(names)
            if elements > NEGLIGIBLE * total or numel >= VOCABULARY * total:
                break
            small.update(names)
        return small

    @cached_property
    def calls_with(self) -> dict[Factor, dict[CallIndex, Call]]:
        """Factor -> the calls, by index, that have a tensor with it."""
        found: dict[Factor, dict[CallIndex, Call]] = {}
        for call in self.graph.calls:
            values = [*call.inputs.values(), *call.outputs.values()]
            values += [v for node in call.nodes for v in node.outputs]
            for v in {v.id: v for v in values}.values() if call.nodes else ():
                for factor in dict.fromkeys(
                    f for dim in self.axes.final(v) for f in flat(dim)
                ):
                    found.setdefault(factor, {})[call.index] = call
        return found

    @cached_property
    def input_factors(self) -> set[Factor]:
        """The factors of the model's own inputs."""
        dims = (
            dim
            for v in self.graph.modules[0].inputs.values()
            for dim in self.axes.final(v)
        )
        return {f for dim in dims for f in flat(dim)}

    @cached_property
    def cut_by_numbers(self) -> dict[ParamName, set[int]]:
        """Parameter -> its dims of which the forward takes a part by numbers."""
        found: dict[ParamName, set[int]] = {}
        for call in self.graph.calls:
            table = call.args[0][0] if call.name in INDEXING and call.args[0] else None
            name = getattr(table, "param", None)
            if name:
                found.setdefault(name, set()).update(indexed_dims(call).values())
        return found

    @cached_property
    def crowded(self) -> dict[CallIndex, int]:
        """The calls that read very many parameters, and how many."""
        return {
            c.index: len({v.param for v in c.inputs.values()})
            for c in self.graph.calls
            if len(c.inputs) > CROWDED
        }

    def gathered_weights(self, layout: Layout) -> set[ParamName]:
        """The split weights that calls need whole, themselves or what is made of
        them."""
        gathered = [
            self.graph.calls[i].inputs[path].id
            for (i, path), actions in layout.uses.items()
            if actions[0].kind == GATHER
        ]
        return set().union(*(self.graph.made_of.get(v, ()) for v in gathered))
