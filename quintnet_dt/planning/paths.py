"""The forwards that were shown right, by signature. A call with a new one is traced and shown before it runs, once."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import torch

from ..agreement import check_batch, in_pipeline
from ..axes.axes import Axes, own_axis
from ..axes.sharding import Axis, LayoutError, Sharding
from ..plan import EXCHANGED, LOCAL, WEIGHT_GATHERED, TensorParallelPlan
from ..private import as_compiled
from ..running.context import AGAIN
from ..running.structure import hooks_on, pass_added
from ..tracing.trace import trace
from ..utils import leaves, opaque
from .planner import Planner, divides, indices, settle, spans

VALUES = 2  # numbers of a kind of call that have programs of their own; all others share theirs
KEPT = 64  # kinds of calls whose programs are kept
VARIANTS = 16  # paths of one kind of call that are kept
CHECKED = 2  # the first calls of a kind, in which a wrong sampler shows


class Paths:
    """Lists of programs by (module path, signature), for the module that a user calls: the model, or a part of it by
    itself.

    `defaults`: programs of modules that no traced forward reached.
    """

    def __init__(self, plan, defaults, known, mesh):
        self.plan, self.defaults, self.mesh = plan, defaults, mesh
        self.checked = Counter()  # calls of each kind whose batch was compared
        self.excused = set()  # kinds of calls by a pipeline whose values differed once
        self.key = None  # that of the latest call
        self.numbers = {}  # (module path, kind) -> the first numbers that such calls were given
        self.known = {}
        for given, programs in known.items():
            self.known[self.key_of("", given)] = [{**defaults, **programs}]

    def programs(self, path, owners, module, args, kwargs, compiled=False):
        """The programs for this call of `module`; raises RuntimeError where it cannot be shown right, ValueError where
        ranks are given different batches. `compiled`: by torch.compile, of which models ask and then take other
        paths."""
        before, key = self.key, self.key_of(path, signature(module, args, kwargs), compiled)
        self.key, self.other_kind = key, key != before
        self.grad = torch.is_grad_enabled()
        self.fresh = self.checked[key] < CHECKED
        if self.fresh and self.mesh.size() > 1:
            self.checked[key] += 1
            self.check((args, kwargs), key)
        if key not in self.known:
            if len(self.known) >= KEPT:
                del self.known[next(iter(self.known))]
            self.known[key] = [self.learn(path, owners, module, args, kwargs, compiled)]
        return self.known[key][0]

    def check(self, batch, key):
        """Raise ValueError where the ranks were given different batches. A pipeline's first call of a kind may be
        one on uninitialised inputs."""
        try:
            check_batch(batch, self.mesh)
        except ValueError:
            if key in self.excused or not in_pipeline():
                raise
            self.excused.add(key)
            check_batch(batch, self.mesh, values=False)

    def key_of(self, path, given, compiled=False):
        """Under which key the programs of a call with this Signature are known. After some values of its numbers, any
        other is one: what a call computes with a number that indexes shards is checked as it runs."""
        kind = (path, given.kind, compiled)
        known = self.numbers.setdefault(kind, [])
        if given.numbers not in known and len(known) < VALUES:
            known.append(given.numbers)
        return kind, given.numbers if given.numbers in known else None

    def random(self, path, module, programs):
        """Whether the ranks need one random state: this call may draw random numbers, or one may sample from its
        outputs."""
        if self.fresh or not torch.is_grad_enabled():
            return True
        return programs[path].random if self.reached(path, programs) and path in programs else module.training

    def reached(self, path, programs):
        """Whether the forward that programs were shown for ran a module."""
        return programs.get(path) is not self.defaults.get(path)

    def variants(self, *call):
        """Other programs for this call, whose forward has turned out to take another path than the one that was shown:
        those that are known, then one learned from this call itself."""
        known = self.known[self.key]  # the modes may have changed within the forward
        for programs in list(known):
            known.remove(programs)  # the latest is tried first
            known.insert(0, programs)
            yield programs
        del known[VARIANTS - 1 :]
        known.insert(0, self.learn(*call))
        yield known[0]

    def learn(self, *call):
        """Programs for this call, shown right in the gradient mode that it was made in."""
        *call, compiled = call
        with torch.set_grad_enabled(self.grad), as_compiled(compiled):
            return self.show(*call)

    def show(self, path, owners, module, args, kwargs):
        names = {id(m._parameters.get(attr)): name for name, at in owners.items() for m, attr in at}
        if added := [inner for inner, p in module.named_parameters() if id(p) not in names]:
            raise RuntimeError(
                f"{', '.join(added[:5])}: expected the parameters that were split, found others: {AGAIN}"
            )
        names = {inner: names[id(p)] for inner, p in module.named_parameters()}
        device = device_of(module)
        pass_added(module)
        try:
            graph = trace(module, args, kwargs, device=device)
        except Exception as e:
            if not any(opaque(x) for _, x in leaves((args, kwargs))):
                raise
            raise RuntimeError(
                f"{path or type(module).__name__} was given an object whose tensors do not fit its forward; if they "
                "are this rank's shards from an earlier call (a key-value cache?), give it that object as that call "
                f"left it: {e}"
            ) from e
        axes = Axes(graph)
        entries = {inner: self.plan[name] for inner, name in names.items()}
        plan = TensorParallelPlan(self.plan.tp_size, entries, loss_parallel=self.plan.loss_parallel)
        try:
            sharding = sharding_of(plan, graph, axes)
            programs = settle(Planner(graph, axes, plan.tp_size), module, args, kwargs, device, sharding)[2]
        except LayoutError as e:
            raise RuntimeError(
                f"{path or type(module).__name__} was called in a way that was not traced before, and it cannot be "
                f"shown right on shards: {e}"
            ) from e

        def renamed(program):
            params = {names[inner]: actions for inner, actions in program.params.items()}
            optional, written = ({names[inner] for inner in x} for x in (program.optional, program.written))
            return replace(program, params=params, optional=optional, written=written)

        context, places = hooks_on(module).context, {}
        for inner, m in module.named_modules():  # where they were when they were split
            h = hooks_on(m)
            places[inner] = h.path if h is not None and h.context is context else ".".join(filter(None, (path, inner)))
        return {**self.defaults, **{places[inner]: renamed(p) for inner, p in programs.items()}}


def device_of(model):
    """Where a model's forward runs; a model on the meta device is imagined on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


class Signature(NamedTuple):
    """What tells one path through a forward from another. `kind`: the mode, which arguments are there, their kinds,
    dtypes, ranks and dims of size 1. `numbers`: the ints and floats among them, which may vary."""

    kind: tuple
    numbers: tuple


def signature(model, args, kwargs):
    """The Signature of a call."""
    numbers = []
    kinds = tuple(_kinds((args, kwargs), 0, {}, numbers))
    return Signature((model.training, torch.is_grad_enabled(), *kinds), tuple(numbers))


def _kinds(obj, depth, seen, numbers):
    for path, x in leaves(obj):
        if isinstance(x, torch.Tensor):
            same = seen.setdefault(id(x), len(seen))  # query, key and value may be one tensor
            yield path, same, x.dtype, x.requires_grad, tuple(s == 1 for s in x.shape)
        elif isinstance(x, (bool, str, type(None))):
            yield path, x
        elif isinstance(x, (int, float)):
            numbers.append(x)
            yield path, type(x)
        elif opaque(x) and depth < 4:  # a cache: empty or filled
            sizes = [v for v in vars(x).values() if type(v) in (int, float)]
            yield path, type(x), tuple((a > b) - (a < b) for a, b in combinations(sizes, 2))  # of lengths: is it full?
            yield from _kinds([v for v in vars(x).values() if type(v) not in (int, float)], depth + 1, seen, numbers)
        else:
            yield path, type(x)


def sharding_of(plan, graph, axes):
    """The Sharding of an applied plan in another forward's graph."""
    sharding = Sharding(loss_parallel=plan.loss_parallel)
    for name, e in plan.entries.items():
        if e.dim is None or name not in graph.params:
            continue
        dim, axis = axes.final(graph.params[name])[e.dim], None
        if e.how in (LOCAL, EXCHANGED):
            for factors in spans([dim]):
                for i, j in combinations(range(len(factors) + 1), 2):
                    found = Axis(tuple(factors[i:j])) if divides(factors[i:j], plan.tp_size) else None
                    at = found and found.find(axes, graph.params[name])
                    if at and axis is None and (at[1] != 1 if e.how == EXCHANGED else at[1] == e.pieces):
                        axis, sharding.outer[name] = found, (at[1:],) if e.how == EXCHANGED and at[2] else at[1]
        if axis is not None:
            sharding.through.add(axis)
        else:
            calls, v = indices(graph.users.get(name, ())), graph.params[name]
            shared = (  # as a bias is with its weight
                a
                for p, (_, a) in sharding.params.items()
                if len(e.shape) == 1
                and a not in sharding.through
                and calls <= indices(graph.users.get(p, ()))
                and (at := a.find(axes, v))
                and at[1] == e.pieces
            )
            axis, sharding.outer[name] = next(shared, None) or own_axis(graph, name, e.dim), e.pieces
            if e.how in (WEIGHT_GATHERED, EXCHANGED) or e.pieces > 1:
                sharding.whole.add(name)
        sharding.params[name] = (e.dim, axis)
    return sharding
