"""The forwards that were shown right, by signature. A call with a new one is traced and shown
before it runs, once."""

import copy
import weakref
from dataclasses import replace

import torch

from ..agreement import agree_on, check_batch, in_pipeline
from ..around import look_around, undisturbed
from ..axes.axes import Axes
from ..axes.sharding import LayoutError
from ..in_step import CHECKED, Apart, InStep
from ..parts import named_modules, named_parameters
from ..plan import TensorParallelPlan
from ..private import as_compiled
from ..running.context import AGAIN
from ..running.structure import hooks_on, pass_added
from ..together import any_rank, together
from ..tracing.attributes import kinds_at
from ..tracing.trace import trace
from ..utils import leaves, opaque
from .applied import sharding_of
from .planner import Planner
from .settle import settle
from .signature import device_of, moded, modes, signature
from .task import Task

VALUES = 2  # numbers of a kind of call that have programs of their own; all others share theirs
KEPT = 64  # kinds of calls whose programs are kept
VARIANTS = 16  # paths of one kind of call that are kept


class Paths:
    """Lists of programs by (module path, signature), for the module that a user calls: the model,
    or a part of it by itself.

    `defaults`: programs of modules that no traced forward reached.
    """

    def __init__(self, plan, defaults, known, mesh, split_id, model):
        self.plan, self.defaults, self.mesh = plan, defaults, mesh
        self.in_step = InStep(mesh, split_id)
        self.learning = False  # whether all ranks learn a call now
        self.root = weakref.ref(model)
        self.excused = set()  # kinds of calls by a pipeline whose values differed once
        self.key = None  # that of the latest call
        self.numbers = {}  # (module path, kind) -> the first numbers that such calls were given
        self.known = {}
        self.changes = {}  # module path -> attributes that a forward of this module changes
        self.first = (
            {}
        )  # module path -> those attributes at the first call: as when they were planned
        self.moded = {
            "": moded(model)
        }  # module path -> the modules within that compute otherwise in training
        for given, programs in known.items():
            self.known[self.key_of("", given, state=self.state("", model))] = [
                completed(defaults, programs)
            ]
            self.changes[""] = programs[""].changes

    def programs(self, path, owners, module, args, kwargs, compiled=False):
        """The programs for this call of `module`; raises RuntimeError where it cannot be shown
        right, ValueError where ranks make different calls or are given different batches.
        `compiled`: by torch.compile, of which models ask and then take other paths. All ranks
        compare their batches, and all learn, or none does."""
        look_around(path, args, kwargs)
        given = signature(module, args, kwargs)
        state = self.state(path, module)
        before, key = self.key, self.key_of(path, given, compiled, state)
        self.key, self.other_kind = key, key != before
        self.grad = torch.is_grad_enabled()
        try:
            same = (path, compiled, *state, *given)
            calls, new = self.in_step.call(
                key, given.shapes, same, (path, module, args, kwargs), key not in self.known
            )
            self.first_of_kind, self.fresh = (
                calls == 0,
                calls < CHECKED,
            )  # a wrong sampler shows in them
            if self.fresh and self.mesh.size() > 1:
                self.check((args, kwargs), key)
        except Apart as e:
            self.forget(key)
            if e.batch:
                check_batch((args, kwargs), self.mesh)  # says which argument it is
            raise
        if new:
            programs = self.learn_together(path, owners, module, args, kwargs, compiled)
            if key not in self.known and len(self.known) >= KEPT:
                del self.known[next(iter(self.known))]
            self.known.setdefault(key, [programs])
        return self.known[key][0]

    def state(self, path, module):
        """Which modules compute otherwise than the rest, and what an earlier forward has left in
        attributes, where one does; empty if nothing."""
        if path not in self.moded:
            self.moded[path] = moded(module)
        return (*modes(module, self.moded[path]), *self.left(path, module))

    def left(self, path, module):
        """What an earlier forward has left in attributes, where one does; empty if nothing yet."""
        names = self.changes.get(path)
        if not names:
            return ()
        now = (len(names), *kinds_at(module, names))
        return () if self.first.setdefault(path, now) == now else now

    def check(self, batch, key):
        """Raise ValueError where the ranks were given different batches. A pipeline's first call of
        a kind may be one on uninitialised inputs."""
        try:
            check_batch(batch, self.mesh)
        except ValueError:
            if key in self.excused or not in_pipeline():
                raise
            self.excused.add(key)
            check_batch(batch, self.mesh, values=False)

    def forget_all(self):
        """Modules were added, removed or replaced: each kind of call is shown right anew."""
        self.known.clear()
        self.moded.clear()

    def forget(self, key):
        """The numbers of a call that other ranks did not make are not among the first of its
        kind."""
        kind, numbers = key
        if key not in self.known and numbers in self.numbers[kind]:
            self.numbers[kind].remove(numbers)

    def learn_together(self, *call):
        """Programs for a call that all ranks make: the same on all, or an error on all."""
        if self.mesh.size() == 1:
            return self.learn(*call)
        with together(self.mesh.get_group()):
            self.learning = True
            try:
                programs = self.learn(*call)
            finally:
                self.learning = False
        agree_on(programs, self.mesh)
        return programs

    def any_rank(self, yes):
        """Whether it is so on any rank, where all of them learn a call."""
        return any_rank(yes, self.mesh.get_group()) if self.learning else yes

    def __getstate__(self):
        return {**vars(self), "root": None}

    def apart(self):
        """For a copy of the model, whose calls are its own."""
        new = copy.copy(self)
        new.in_step = copy.copy(self.in_step)
        return new

    def key_of(self, path, given, compiled=False, state=()):
        """Under which key the programs of a call with this Signature are known. After some values
        of its numbers, any other is one: what a call computes with a number that indexes shards is
        checked as it runs."""
        kind = (path, given.kind, compiled, *state)
        known = self.numbers.setdefault(kind, [])
        if given.numbers not in known and len(known) < VALUES:
            known.append(given.numbers)
        return kind, given.numbers if given.numbers in known else None

    def random(self, path, module, programs):
        """Whether the ranks need one random state: this call may draw random numbers, or one may
        sample from its outputs."""
        if self.fresh or not torch.is_grad_enabled():
            return True
        return (
            programs[path].random
            if self.reached(path, programs) and path in programs
            else module.training
        )

    def reached(self, path, programs):
        """Whether the forward that programs were shown for ran a module."""
        return programs.get(path) is not self.defaults.get(path)

    def variants(self, *call):
        """Other programs for this call, whose forward has turned out to take another path than the
        one that was shown: those that are known, then one learned from this call itself."""
        known = self.known[self.key]  # the modes may have changed within the forward
        for programs in list(known):
            known.remove(programs)  # the latest is tried first
            known.insert(0, programs)
            yield programs
        del known[VARIANTS - 1 :]
        known.insert(0, self.learn(*call))
        yield known[0]

    @undisturbed
    def learn(self, *call):
        """Programs for this call, shown right in the gradient mode that it was made in."""
        *call, compiled = call
        with torch.set_grad_enabled(self.grad), as_compiled(compiled):
            return self.show(*call)

    def show(self, path, owners, module, args, kwargs):
        names = {id(m._parameters.get(attr)): name for name, at in owners.items() for m, attr in at}
        if added := [inner for inner, p in named_parameters(module) if id(p) not in names]:
            raise RuntimeError(
                f"{', '.join(added[:5])}: expected the parameters that were split, found others:"
                f" {AGAIN}"
            )
        names = {inner: names[id(p)] for inner, p in named_parameters(module)}
        device = device_of(module)
        pass_added(module)
        try:
            graph = trace(module, args, kwargs, device=device, any_rank=self.any_rank)
        except Exception as e:
            if not any(opaque(x) for _, x in leaves((args, kwargs))):
                raise
            raise RuntimeError(
                f"{path or type(module).__name__} was given an object whose tensors do not fit its"
                " forward; if they are this rank's shards from an earlier call (a key-value"
                f" cache?), give it that object as that call left it: {e}"
            ) from e
        axes = Axes(graph)
        entries = {inner: self.plan[name] for inner, name in names.items()}
        plan = TensorParallelPlan(self.plan.tp_size, entries, loss_parallel=self.plan.loss_parallel)
        try:
            sharding = sharding_of(plan, graph, axes)
            if self.key in self.known:  # another path of such a call
                sharding.dear = self.known[self.key][0][path].dear
            planner = Planner(Task(graph, axes, plan.tp_size))
            programs = settle(planner, module, args, kwargs, device, sharding).programs
        except LayoutError as e:
            raise RuntimeError(
                f"{path or type(module).__name__} was called in a way that was not traced before,"
                f" and it cannot be shown right on shards: {e}"
            ) from e

        def renamed(program):
            params = {names[inner]: actions for inner, actions in program.params.items()}
            optional, written = (
                {names[inner] for inner in x} for x in (program.optional, program.written)
            )
            return replace(program, params=params, optional=optional, written=written)

        known = self.changes.get(path, [])
        self.changes[path] = names_changed = known + [
            key for key in programs[""].changes if key not in known
        ]
        if names_changed and not known:
            self.first[path] = (len(names_changed), *kinds_at(module, names_changed))
        context, places = hooks_on(module).context, {}
        for (
            inner,
            m,
        ) in named_modules(
            module
        ):  # where they were when they were split; a shared one has its first place
            h = hooks_on(m)
            places[inner] = (
                h.path
                if h is not None and h.context is context
                else ".".join(filter(None, (path, inner)))
            )
        return completed(
            self.defaults, {places[inner]: renamed(p) for inner, p in programs.items()}
        )


def completed(defaults, programs):
    """Programs of one forward, with the default ones of modules that it did not reach. A module
    that it reached shows its parameters that nobody read too, whole, for another path through its
    code."""
    read = {name for program in programs.values() for name in program.params}
    found = {**defaults, **programs}
    for path, default in defaults.items():
        unread = {name: actions for name, actions in default.params.items() if name not in read}
        if unread and path in programs:
            program = programs[path]
            optional = program.optional | unread.keys()
            found[path] = replace(program, params={**program.params, **unread}, optional=optional)
    return found
