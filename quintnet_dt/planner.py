"""Which axes to shard: every axis is tried alone, its bytes counted, and the best that do not conflict are taken; then the weights that are left."""

from dataclasses import dataclass
from itertools import combinations
from math import prod

from .cost import cost, hoist
from .layout import Axis, LayoutError, Sharding, lay_out
from .program import compile_programs
from .prove import prove

# Weights are split until those left whole hold no more than this share of all elements.
NEGLIGIBLE = 0.02
# One weight with more than this share is always split: an embedding that is little beside seventy billion others is a gigabyte still.
VOCABULARY = 0.005


@dataclass
class Candidate:
    """An axis of the model, tried alone: the parameters it runs through as {name: (dim, outer)}, the calls that touch it, bytes a step."""

    axis: Axis
    params: dict
    calls: list
    elements: int
    bytes: float = 0.0


@dataclass
class Way:
    """One weight split alone. `gathered`: it is gathered before its use; else `partners` (biases) are split with it."""

    dim: int
    axis: Axis
    bytes: float
    gathered: bool
    partners: dict
    why: str = ""


class Planner:
    """Chooses a Sharding over `n` ranks for one traced forward. `fixed[name]` is a user's dim (None: replicate)."""

    def __init__(self, graph, axes, n, fixed=None, loss_parallel=False):
        self.graph, self.axes, self.n, self.fixed, self.loss_parallel = graph, axes, n, fixed or {}, loss_parallel
        self.params = graph.params
        self.why = {}  # parameter -> what stood in the way
        self._alone = {}
        self.touch, self.users = {}, {}
        for call in graph.calls:
            values = [*call.inputs.values(), *call.outputs.values(), *(v for n in call.nodes for v in n.outputs)]
            for v in {v.id: v for v in values}.values() if call.nodes else ():
                for f in dict.fromkeys(f for dim in axes.final(v) for f in dim):
                    self.touch.setdefault(f, {})[call.index] = call
            for v in {v.id: v for v in call.inputs.values() if v.param}.values() if call.nodes else ():
                self.users.setdefault(v.param, []).append(call)

    def numel(self, name):
        return self.params[name].tensor.numel()

    def note(self, names, why):
        for name in names:
            self.why.setdefault(name, why)

    # Axes that run through the model.

    def candidates(self):
        found = {}  # adjacent factors -> parameters with them: one that n divides, or as many as it takes
        for name, v in self.params.items():
            for dim in self.axes.final(v):
                for i, j in combinations(range(len(dim) + 1), 2):
                    if divides(dim[i:j], self.n) and not (j - i > 1 and divides(dim[i : j - 1], self.n)):
                        found.setdefault(tuple(dim[i:j]), []).append(name)
        for factors, names in found.items():
            axis, params = Axis(factors), {}
            for name in dict.fromkeys(names):
                at = axis.find(self.axes, self.params[name])
                if at and (name not in self.fixed or self.fixed[name] == at[0]):
                    params[name] = at[:2]
            if sum(map(self.numel, params)):
                touched = {i: c for f in factors for i, c in self.touch.get(f, {}).items()}
                calls = [c for _, c in sorted(touched.items())]
                if calls:  # an axis of weights that the forward did not reach runs nowhere
                    yield Candidate(axis, params, calls, sum(map(self.numel, params)))

    def weigh(self, candidate):
        """Whether a candidate can be laid out, taken alone; counts its bytes."""
        sharding = Sharding({p: (d, candidate.axis) for p, (d, _) in candidate.params.items()}, {candidate.axis}, loss_parallel=self.loss_parallel)
        if self.graph.unsteady and self._common_module(candidate.calls) in self.graph.unsteady:
            self.note(candidate.params, "its axis runs through a module whose forward reads values")
            return False
        try:
            layout = lay_out(self.graph, self.axes, sharding, candidate.calls)
        except LayoutError as e:
            self.note(candidate.params, str(e))
            return False
        if self._gathers_weight(layout):
            call, reason = layout.blockers[0]
            self.note(candidate.params, f"{reason}: {call}")
            return False
        candidate.bytes = cost(self.graph, layout, self.n)
        return True

    def _gathers_weight(self, layout):
        """Whether a call needs a split weight whole."""
        uses = layout.uses.items()
        return any(a[0].kind == "gather" and self.graph.calls[i].inputs[p].param for (i, p), a in uses)

    def _common_module(self, calls):
        """The id of the innermost module run that holds all the calls."""
        first, *others = [call.module for call in calls]
        return next(id(m) for m in first.chain() if all(o.within(m) for o in others))

    def choose(self, banned=()):
        """A Sharding. Axes in `banned` are not sharded through the model."""
        taken, used_by, sharding = set(), {}, Sharding(loss_parallel=self.loss_parallel)
        weighed = [c for c in self.candidates() if self.weigh(c) and c.axis not in banned]
        for c in sorted(weighed, key=lambda c: (c.bytes / c.elements, -c.elements)):
            if c.bytes > sum(self.alone(p).bytes for p in c.params):
                self.note(c.params, f"sharded through the model, its axis would send {c.bytes:.0f} bytes a step")
                continue
            if taken & c.params.keys() or any(used_by.get(x.index, c.axis) != c.axis for x in c.calls):
                continue
            taken |= c.params.keys()
            used_by.update((x.index, c.axis) for x in c.calls)
            sharding.through.add(c.axis)
            for p, (dim, outer) in c.params.items():
                sharding.params[p] = (dim, c.axis)
                if outer != 1:
                    sharding.outer[p] = outer
        self.fill(sharding)
        return sharding

    # Weights that no axis took.

    def alone(self, name, taken=()):
        """The cheapest Way to split one weight; one that sends infinitely many bytes where there is none."""
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
        axis = Axis(tuple(self.axes.final(v)[dim]))
        gathered = Way(dim, axis, v.nbytes * (self.n - 1) / self.n, True, {})
        if not calls or not axis.find(self.axes, v):
            return gathered
        partners = {}
        for x in (x for call in calls for x in call.inputs.values() if x.param and len(x.shape) == 1):
            free = x.param not in taken and x.param not in self.fixed and self.users[x.param] == calls
            if free and axis.find(self.axes, x):
                partners[x.param] = 0
        try:
            split = {p: (d, axis) for p, d in {name: dim, **partners}.items()}
            layout = lay_out(self.graph, self.axes, Sharding(split, loss_parallel=self.loss_parallel), calls)
        except LayoutError as e:
            gathered.why = str(e)
            return gathered
        if self._gathers_weight(layout):
            gathered.why = "{1}: {0}".format(*layout.blockers[0])
            return gathered
        return Way(dim, axis, cost(self.graph, layout, self.n), False, partners)

    def fill(self, sharding):
        """Split the largest weights left, until what stays whole is negligible."""
        total = sum(map(self.numel, self.params))
        left = sorted((p for p in self.params if p not in sharding.params), key=self.numel, reverse=True)
        rest = sum(map(self.numel, left))
        for name in left:
            if name in sharding.params or (name in self.fixed and self.fixed[name] is None):
                continue
            small = rest <= NEGLIGIBLE * total and self.numel(name) < VOCABULARY * total
            if name not in self.fixed and small:
                break
            way = self.alone(name, sharding.params)
            if way.axis is None:
                continue
            for p, d in {name: way.dim, **way.partners}.items():
                sharding.params[p] = (d, way.axis)
                rest -= self.numel(p)
            if way.gathered:
                sharding.whole.add(name)
                self.why[name] = way.why


def divides(factors, n):
    """Whether n ranks can share adjacent factors."""
    return prod(f.size for f in factors) % n == 0 and not any(f.opaque for f in factors)


def settle(planner, model, args, kwargs, device=None, sharding=None):
    """A Sharding that is proven for the traced forward, and what runs it: (Sharding, Layout, programs).

    Axes that cannot be shown right are given up one by one; at the end every split weight is gathered before its use, which is right on
    any path. With a given `sharding` (of an applied plan) the parameters keep their placements.
    """
    graph, axes, n = planner.graph, planner.axes, planner.n
    banned, fixed = set(), sharding is not None
    sharding = sharding or planner.choose()
    while True:
        try:
            layout = hoist(graph, lay_out(graph, axes, sharding))
            if sharding.whole == sharding.params.keys() and not graph.given:  # it computes as the whole model does
                return sharding, layout, compile_programs(graph, layout)
            return sharding, layout, prove(model, args, kwargs, graph, axes, layout, sharding, n, device)
        except LayoutError as e:
            names = {p for p, (_, a) in sharding.params.items() if e.axis in (a, None)}
            planner.note(names, str(e))
            if e.axis in sharding.through and not fixed:
                banned.add(e.axis)
                sharding = planner.choose(banned)
            elif e.axis in sharding.through:  # its weights compute alone, completed at once
                sharding.through.discard(e.axis)
            elif names - sharding.whole:
                sharding.whole |= names
            else:
                raise
