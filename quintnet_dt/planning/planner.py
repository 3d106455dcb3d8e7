"""Which axes to shard: each is tried alone, its bytes counted; the best that do not conflict are
taken, then weights."""

from functools import cached_property
from itertools import combinations, groupby
from math import fsum

from ..axes.action import GATHER
from ..axes.axes import lone_axis, own_axis
from ..axes.factors import flat
from ..axes.sharding import Axis, LayoutError, ShardedParam, Sharding
from ..axes.split import NotSplit
from .candidates import Candidate, Way, divides, indices, regions, spans
from .compile import compile_programs
from .cost import cost
from .hoist import hoist
from .indexing import INDEXING, indexed_dims
from .layout import lay_out
from .prove import prove

# Weights are split until those left whole hold no more than this share of all elements.
NEGLIGIBLE = 0.02
# One weight with more than this share is always split: an embedding that is little beside seventy
# billion others is a gigabyte still.
VOCABULARY = 0.005
# Where the calls that use a weight read more tensors than this, it is split alone only to be
# gathered.
CROWDED = 256
# Up to so many axes that stand in each other's way, every choice among them is tried.
EXHAUSTIVE = 10


class Planner:
    """Chooses a Sharding over `n` ranks for one traced forward. `fixed[name]` is a user's dim
    (None: replicate). `contiguous`: a rank holds one block of a weight, also where equal pieces of
    it are split."""

    def __init__(self, graph, axes, n, fixed=None, loss_parallel=False, contiguous=False):
        self.fixed = {
            **dict.fromkeys(graph.rewritten),
            **(fixed or {}),
        }  # what the forward writes to stays whole
        self.graph, self.axes, self.n = graph, axes, n
        self.loss_parallel, self.contiguous = loss_parallel, contiguous
        self.params = graph.params
        self.why = {}  # parameter -> what stood in the way
        self._alone = {}
        self.touch, self.users = {}, graph.users
        total, rest, self.small = sum(map(self.numel, self.params)), 0, set()
        for numel, names in groupby(
            sorted(self.params, key=self.numel), self.numel
        ):  # repeated layers are alike
            names = list(names)
            rest += numel * len(names)
            if rest > NEGLIGIBLE * total or numel >= VOCABULARY * total:
                break
            self.small.update(names)
        for call in graph.calls:
            values = [
                *call.inputs.values(),
                *call.outputs.values(),
                *(v for n in call.nodes for v in n.outputs),
            ]
            for v in {v.id: v for v in values}.values() if call.nodes else ():
                for f in dict.fromkeys(f for dim in axes.final(v) for f in flat(dim)):
                    self.touch.setdefault(f, {})[call.index] = call

    def numel(self, name):
        return self.params[name].numel

    def note(self, names, why):
        for name in names:
            self.why.setdefault(name, why)

    # Axes that run through the model.

    def candidates(self):
        found = (
            {}
        )  # adjacent factors -> parameters with them: one that n divides, or as many as it takes
        for name, v in self.params.items():
            for dim in spans(self.axes.final(v)):
                for i, j in combinations(range(len(dim) + 1), 2):
                    if divides(dim[i:j], self.n) and not (
                        j - i > 1 and divides(dim[i : j - 1], self.n)
                    ):
                        found.setdefault(tuple(dim[i:j]), []).append(name)
        for factors, names in found.items():
            axis, params = Axis(factors), {}
            of_inputs = not self._input_factors.isdisjoint(flat(factors))
            for name in dict.fromkeys(names):
                split = axis.find(self.axes, self.params[name])
                if not split or self.fixed.get(name, split.dim) != split.dim:
                    continue
                if of_inputs and split.dim in self._cut_by_numbers.get(name, ()):
                    continue  # a table of positions, of which another input takes other rows
                params[name] = self.stored(axis, split)
            if sum(map(self.numel, params)):
                touched = {i: c for f in factors for i, c in self.touch.get(f, {}).items()}
                calls = [c for _, c in sorted(touched.items())]
                if calls:  # an axis of weights that the forward did not reach runs nowhere
                    yield Candidate(axis, params, calls, sum(map(self.numel, params)))

    def stored(self, axis, split):
        """How a parameter is stored that an axis of the model splits so."""
        if split.blocks is None or (self.contiguous and split.blocks != 1):
            return ShardedParam(split.dim, axis, exchanged=True)
        return ShardedParam(split.dim, axis, split.blocks)

    @cached_property
    def _input_factors(self):
        """The factors of the model's own inputs."""
        dims = (dim for v in self.graph.modules[0].inputs.values() for dim in self.axes.final(v))
        return {f for dim in dims for f in flat(dim)}

    @cached_property
    def _cut_by_numbers(self):
        """Parameter name -> its dims of which the forward takes a part by numbers."""
        found = {}
        for call in self.graph.calls:
            table = call.args[0][0] if call.name in INDEXING and call.args[0] else None
            if getattr(table, "param", None):
                found.setdefault(table.param, set()).update(indexed_dims(call).values())
        return found

    @cached_property
    def crowded(self):
        """Index of each call that reads very many parameters -> how many."""
        return {
            c.index: len({v.param for v in c.inputs.values()})
            for c in self.graph.calls
            if len(c.inputs) > CROWDED
        }

    def weigh(self, candidate):
        """Whether a candidate can be laid out, taken alone; counts its bytes."""
        if any(
            self.crowded.get(call.index, 0) > 8 * len(candidate.params) for call in candidate.calls
        ):
            return False  # an axis of few of the many weights that one call reads
        if self.graph.unsteady and self._common_module(candidate.calls) in self.graph.unsteady:
            self.note(candidate.params, "its axis runs through a module whose forward reads values")
            return False
        params, whole = candidate.params, {None}
        while whole:  # weights that a call needs whole are left out
            for p in whole:
                params.pop(p, None)
            sharding = Sharding(params, {candidate.axis}, loss_parallel=self.loss_parallel)
            try:
                layout = lay_out(self.graph, self.axes, sharding, candidate.calls)
            except LayoutError as e:
                self.note(params, str(e))
                return False
            whole = self._gathered_weights(layout) & params.keys()
            if whole:
                self.note(whole, "{1}: {0}".format(*layout.blockers[0]))
        candidate.elements = sum(map(self.numel, params))
        candidate.calls = [c for c in candidate.calls if c.index in layout.axis_of]
        if not candidate.elements:
            return False
        candidate.bytes = cost(self.graph, layout, self.n)
        return True

    @cached_property
    def good(self):
        """Candidates that can be laid out, and send no more than their weights split alone."""
        found = []
        for c in self.candidates():
            if self.weigh(c) and c.bytes <= self._apart(c.params):
                found.append(c)
            elif c.bytes:
                self.note(
                    c.params,
                    f"sharded through the model, its axis would send {c.bytes:.0f} bytes a step",
                )
        return found

    def _gathered_weights(self, layout):
        """The split weights that calls need whole, themselves or what is made of them."""
        gathered = [
            self.graph.calls[i].inputs[p].id
            for (i, p), a in layout.uses.items()
            if a[0].kind == GATHER
        ]
        return set().union(*(self.graph.made_of.get(v, ()) for v in gathered))

    def _common_module(self, calls):
        """The id of the innermost module run that holds all the calls."""
        first, *others = [call.module for call in calls]
        return next(id(m) for m in first.chain() if all(o.within(m) for o in others))

    def choose(self, banned=()):
        """A Sharding. Axes in `banned` are not sharded through the model."""
        used_by, sharding = {}, Sharding(loss_parallel=self.loss_parallel)
        groups = regions([c for c in self.good if c.axis not in banned])
        for c in (c for region in groups for c in self._best(region)):
            used_by.update((x.index, c.axis) for x in c.calls)
            sharding.through.add(c.axis)
            sharding.params.update(c.params)
        self.fill(sharding, used_by)
        return sharding

    def _apart(self, params):
        """Bytes a step if each of these weights is split alone; those that would stay whole send
        none."""
        sent = (self.alone(p).bytes for p in params if p not in self.small)
        return fsum(
            b for b in sent if b != float("inf")
        )  # rounded once: the same in any order of a set

    def _best(self, region):
        """Of candidates that stand in each other's way, those that send the fewest bytes, counting
        the weights left as split alone: all choices tried where the region is small, else the
        cheapest for each element first."""
        region = sorted(region, key=lambda c: (c.bytes / c.elements, -c.elements))
        if len(region) > EXHAUSTIVE:
            chosen = []
            for c in region:
                chosen += [] if any(c.conflicts(o) for o in chosen) else [c]
            return chosen
        everything = {p for c in region for p in c.params}

        def total(chosen):
            return sum(c.bytes for c in chosen) + self._apart(
                everything - {p for c in chosen for p in c.params}
            )

        choices = [[]]
        for c in region:
            choices += [[*some, c] for some in choices if not any(c.conflicts(o) for o in some)]
        return min(choices, key=lambda some: (total(some), -sum(c.elements for c in some)))

    # Weights that no axis took.

    def alone(self, name, taken=()):
        """The cheapest Way to split one weight; one that sends infinitely many bytes where there is
        none."""
        if not taken and name in self._alone:
            return self._alone[name]
        v = self.params[name]
        calls = self.users.get(name, [])
        dims = [d for d, size in enumerate(v.shape) if size >= self.n]
        ways = [self._way(name, d, calls, taken) for d in dims if self.fixed.get(name, d) == d]
        none = Way(0, None, float("inf"), True, {})
        best = min(ways, key=lambda w: (w.gathered, w.bytes), default=none)
        if not taken:
            self._alone[name] = best
        return best

    def _way(self, name, dim, calls, taken):
        v = self.params[name]
        gathered = Way(dim, lone_axis(v.shape[dim]), v.nbytes * (self.n - 1) / self.n, True, {})
        if not calls or sum(len(call.inputs) for call in calls) > CROWDED:
            return gathered
        axis = own_axis(self.graph, name, dim)
        given = self.graph.modules[0].inputs.values()
        of_inputs = dim in self._cut_by_numbers.get(name, ()) and any(
            axis.find(self.axes, x) is not NotSplit.ABSENT for x in given
        )
        if of_inputs or not axis.find(self.axes, v):
            return gathered
        partners = {}
        for x in (
            x for call in calls for x in call.inputs.values() if x.param and len(x.shape) == 1
        ):
            free = (
                x.param not in taken
                and x.param not in self.fixed
                and indices(self.users[x.param]) <= indices(calls)
            )
            if free and (split := axis.find(self.axes, x)) and split.blocks == 1:
                partners[x.param] = 0
        try:
            split = {p: ShardedParam(d, axis) for p, d in {name: dim, **partners}.items()}
            layout = lay_out(
                self.graph, self.axes, Sharding(split, loss_parallel=self.loss_parallel), calls
            )
        except LayoutError as e:
            gathered.why = str(e)
            return gathered
        if self._gathered_weights(layout):
            gathered.why = "{1}: {0}".format(*layout.blockers[0])
            return gathered
        way = Way(dim, axis, cost(self.graph, layout, self.n), False, partners)
        square = Axis(tuple(self.axes.final(v)[dim])).find(self.axes, v) is NotSplit.IN_PART
        if (
            square and way.bytes > gathered.bytes
        ):  # one that mixes places, with few weights for its activations
            gathered.why = "split, it would send more"
            return gathered
        return way

    def fill(self, sharding, used_by):
        """Split the weights left, the largest first; the small ones stay whole."""
        for name in sorted(self.params, key=self.numel, reverse=True):
            whole = self.fixed[name] is None if name in self.fixed else name in self.small
            if whole or name in sharding.params:
                continue
            way = self.alone(name, sharding.params)
            busy = any(call.index in used_by for call in self.users.get(name, ()))
            if way.axis is None or (
                busy and not way.gathered and len(self.params[name].shape) == 1
            ):
                # a row-parallel layer's bias: split, it would break the axis that runs through
                # there
                continue
            for p, d in {name: way.dim, **way.partners}.items():
                sharding.params[p] = ShardedParam(d, way.axis)
            if way.gathered:
                sharding.gather([name])
                self.why[name] = way.why


def settle(planner, model, args, kwargs, device=None, sharding=None):
    """A Sharding that is proven for the traced forward, and what runs it: (Sharding, Layout,
    programs).

    Axes that cannot be shown right are given up; at the end every split weight is gathered before
    its use, which is right on any path. With a given `sharding` (of an applied plan) the parameters
    keep their placements.
    """
    graph, axes, n = planner.graph, planner.axes, planner.n
    banned, fixed = set(), sharding is not None
    sharding = sharding or planner.choose()
    while True:
        try:
            layout = hoist(graph, lay_out(graph, axes, sharding))
            if not graph.given and all(p.gathered for p in sharding.params.values()):
                # it computes as the whole model does
                return sharding, layout, compile_programs(graph, layout)
            return (
                sharding,
                layout,
                prove(model, args, kwargs, graph, axes, layout, sharding, n, device),
            )
        except LayoutError as first:
            known = len(banned)
            for e in (first, *first.others):
                names = {p for p, x in sharding.params.items() if e.axis in (x.axis, None)}
                planner.note(names, str(e))
                if e.axis in sharding.through and not fixed:
                    banned.add(e.axis)
                elif e.axis in sharding.through:  # its weights compute alone, completed at once
                    sharding.through.discard(e.axis)
                elif not all(sharding.params[p].gathered for p in names):
                    sharding.gather(names)
                elif e is first:
                    raise
            sharding = planner.choose(banned) if len(banned) > known else sharding
