"""The forwards that were shown right, by signature. A call with a new one is traced and
shown before it runs, once."""

import copy
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..agreement import agree_on, check_batch, in_pipeline
from ..around import look_around, undisturbed
from ..in_step import CHECKED, Apart, InStep
from ..keys import ModulePath
from ..places import Owners
from ..plan import TensorParallelPlan
from ..private import as_compiled
from ..running.program import Programs
from ..running.record import UserCall
from ..together import any_rank, together
from .learning import at_split, completed, learn
from .signature import Signature, States, signature

VALUES = 2  # numbers of a kind of call that have programs of their own; all others share theirs
KEPT = 64  # kinds of calls whose programs are kept
VARIANTS = 16  # paths of one kind of call that are kept


class Key(NamedTuple):
    """Under which the programs of a call are kept: its kind, and the numbers among its
    arguments (None where they are not among the first of its kind)."""

    kind: tuple
    numbers: tuple | None


class Paths:
    """Lists of programs by the Key of a call, which the user makes of the model, or of
    a part of it by itself.

    Args: `defaults`: programs of modules that no traced forward reached; `learned`:
    those of the model by the Signature that they were planned for.
    """

    def __init__(
        self,
        plan: TensorParallelPlan,
        defaults: Programs,
        learned: dict[Signature, Programs],
        mesh: DeviceMesh,
        split_id: str,
        model: nn.Module,
    ):
        self.plan, self.defaults, self.mesh = plan, defaults, mesh
        self.in_step = InStep(mesh, split_id)
        self.learning = False  # whether all ranks learn a call now
        self.root = weakref.ref(model)
        self.excused: set[Key] = set()  # calls by a pipeline whose values differed once
        self.key = Key((), None)  # that of the latest call
        # the first numbers that each kind of call was given
        self.numbers: dict[tuple, list] = {}
        self.learned: dict[Key, list[Programs]] = {}
        self.states = States()
        state = self.states.of("", model)
        for given, programs in learned.items():
            self.learned[self.key_of("", given, False, state)] = [
                completed(defaults, programs)
            ]
            self.states.changes[""] = programs[""].forward.changes

    def programs(
        self,
        path: ModulePath,
        owners: Owners,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        compiled: bool = False,
    ) -> Programs:
        """The programs for this call of `module`; raises RuntimeError where it cannot
        be shown right, ValueError where ranks make different calls or are given
        different batches. `compiled`: by torch.compile, of which models ask and then
        take other paths. All ranks compare their batches, and all learn, or none
        does."""
        look_around(path, args, kwargs)
        given, state = signature(module, args, kwargs), self.states.of(path, module)
        before, self.key = self.key, self.key_of(path, given, compiled, state)
        self.other_kind, self.grad = self.key != before, torch.is_grad_enabled()
        same = (path, compiled, *state, *given)
        new = self.agree((path, module, args, kwargs), given, same)
        if new:
            programs = self.learn_together(path, owners, module, args, kwargs, compiled)
            if self.key not in self.learned and len(self.learned) >= KEPT:
                del self.learned[next(iter(self.learned))]
            self.learned.setdefault(self.key, [programs])
        return self.learned[self.key][0]

    def agree(self, call: tuple, given: Signature, same: tuple) -> bool:
        """Whether a call, as InStep wants it, is new to any rank. All ranks are found
        to make it, with data that is the `same`."""
        batch = call[2:]
        try:
            new_here = self.key not in self.learned
            before, new = self.in_step.call(
                self.key, given.shapes, same, call, new_here
            )
            # A wrong sampler shows in the first calls of a kind.
            self.first_of_kind, self.fresh = before == 0, before < CHECKED
            if self.fresh and self.mesh.size() > 1:
                self.check(batch)
        except Apart as e:
            self.forget(self.key)
            if e.batch:
                check_batch(batch, self.mesh)  # says which argument it is
            raise
        return new

    def check(self, batch: Any) -> None:
        """Raise ValueError where the ranks were given different batches. A pipeline's
        first call of a kind may be one on uninitialised inputs."""
        try:
            check_batch(batch, self.mesh)
        except ValueError:
            if self.key in self.excused or not in_pipeline():
                raise
            self.excused.add(self.key)
            check_batch(batch, self.mesh, values=False)

    def forget_all(self) -> None:
        """Modules were added, removed or replaced: each kind of call is shown right
        anew."""
        self.learned.clear()
        self.states.moded.clear()

    def forget(self, key: Key) -> None:
        """The numbers of a call that other ranks did not make are not among the first
        of its kind."""
        if key not in self.learned and key.numbers in self.numbers[key.kind]:
            self.numbers[key.kind].remove(key.numbers)

    def learn_together(self, *call: Any) -> Programs:
        """Programs for a call that all ranks make: the same on all, or an error on
        all."""
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

    def any_rank(self, yes: bool) -> bool:
        """Whether it is so on any rank, where all of them learn a call."""
        return any_rank(yes, self.mesh.get_group()) if self.learning else yes

    def __getstate__(self) -> dict:
        return {**vars(self), "root": None}

    def apart(self) -> "Paths":
        """For a copy of the model, whose calls and modules are its own."""
        new = copy.copy(self)
        new.in_step, new.states = copy.copy(self.in_step), self.states.apart()
        new.learned = {key: [*programs] for key, programs in self.learned.items()}
        new.numbers = {kind: [*numbers] for kind, numbers in self.numbers.items()}
        new.excused = {*self.excused}
        return new

    def key_of(
        self, path: ModulePath, given: Signature, compiled: bool, state: tuple
    ) -> Key:
        """The Key of a call with this Signature. After some values of its numbers, any
        other is
        one: what a call computes with a number that indexes shards is checked as it
        runs."""
        kind = (path, given.kind, compiled, *state)
        first = self.numbers.setdefault(kind, [])
        if given.numbers not in first and len(first) < VALUES:
            first.append(given.numbers)
        return Key(kind, given.numbers if given.numbers in first else None)

    def random(self, path: ModulePath, module: nn.Module, programs: Programs) -> bool:
        """Whether the ranks need one random state: this call may draw random numbers,
        or one may sample from its outputs."""
        if self.fresh or not torch.is_grad_enabled():
            return True
        shown = path in programs and self.reached(path, programs)
        return programs[path].forward.random if shown else module.training

    def reached(self, path: ModulePath, programs: Programs) -> bool:
        """Whether the forward that programs were shown for ran a module."""
        return programs.get(path) is not self.defaults.get(path)

    def variants(self, *call: Any) -> Iterator[Programs]:
        """Other programs for this call, whose forward has turned out to take another
        path than the one that was shown: those that were learned, then one learned from
        this call itself."""
        # the modes may have changed within the forward
        learned = self.learned[self.key]
        for programs in list(learned):
            learned.remove(programs)  # the latest is tried first
            learned.insert(0, programs)
            yield programs
        del learned[VARIANTS - 1 :]
        learned.insert(0, self.learn(*call))
        yield learned[0]

    @undisturbed
    def learn(self, *call: Any) -> Programs:
        """Programs for this call, shown right in the gradient mode that it was made
        in."""
        made = UserCall(*call)
        another = self.learned.get(self.key)  # paths of such a call
        dear = another[0][made.path].forward.dear if another else None
        with torch.set_grad_enabled(self.grad), as_compiled(made.compiled):
            programs = learn(made, self.plan, self.any_rank, dear)
        self.states.note(made.path, made.module, programs[""].forward.changes)
        return completed(self.defaults, at_split(made, programs))
