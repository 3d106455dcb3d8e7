"""What the hooks of one model share, and what they do by it: actions on nested
arguments."""

import copy
import weakref
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..agreement import share_random_state
from ..axes.action import TO_DTENSOR, Action
from ..axes.split import Split
from ..groups import Group, SimulatedGroup, group_of
from ..keys import ArgPath
from ..private import at_end_of_backward, compiling
from ..tracing.user_hooks import user_hooks_of_all
from ..utils import lookup, quiet, replace
from .actions import ACTIONS
from .program import Actions, Programs
from .record import Past, Running, UserCall
from .structure import Structures

AGAIN = (
    "the model was changed since (adapters added or merged?); call"
    " apply_tensor_parallel on it again, which keeps what is split"
)


class Context:
    """What the hooks of one model share: the mesh, and which programs are in force. A
    copy of it shares the mesh."""

    def __init__(self, mesh: Any = None, group: Any = None):
        self.mesh, self._group = mesh, group if mesh is None else group_of(mesh)
        self.hooks: list = []  # every ModuleHooks
        # Hooks that were registered for every module when it was split.
        self.hooks_of_all = user_hooks_of_all()
        self._programs: dict = {}
        # Whether a part of the call ran compiled, which the log does not tell of.
        self.compiled = False
        # Whether a backward runs, in which checkpoints find the programs of their
        # forward.
        self.recomputing = False
        self.weights: Any = None  # Weights
        self.structures: Structures | None = None
        self.paths: Any = None  # Paths
        self.call: UserCall | None = None  # that the user made, while it runs
        self.log: list[Past] = []  # what it has done so far: Started, Called, Ended
        self.forward = object()  # the one that runs
        # Weak references to the tensors that keep what an action made of them in it.
        self.holders: list = []
        # How many modules have run; such numbers of which it is known that no module
        # was changed.
        self.ran = 0
        self.counts: set[int] = set()
        self.random_is_shared = False  # in the forward that runs
        # hooks with this id or a later one were added since it began
        self.first_hook = 0
        self.running: list[Running] = []  # a Running of each module, one in the other

    @property
    def group(self) -> Group:
        if self._group is None:
            self._group = group_of(self.mesh)
        return self._group

    @property
    def programs(self) -> Programs:
        return self._programs

    @programs.setter
    def programs(self, programs: Programs) -> None:
        if programs is not self._programs:
            self._programs = programs
            for hooks in self.hooks:
                hooks.take(programs)

    def resume(self, programs: Programs) -> None:
        """A backward has begun, of a forward that ran by these programs."""
        self.programs = programs
        if not self.recomputing:
            self.recomputing = True
            at_end_of_backward(partial(setattr, self, "recomputing", False))

    def __deepcopy__(self, memo: dict) -> "Context":
        new = Context(self.mesh, self._group)
        new._programs, new.paths = self._programs, self.paths and self.paths.apart()
        new.structures = copy.deepcopy(self.structures)
        new.hooks_of_all = self.hooks_of_all
        return new  # without `weights`: a copy's own are not looked at

    def __getstate__(self) -> dict:
        return {
            **vars(self),
            "_group": None,
            "call": None,
            "running": [],
            "log": [],
            "hooks": [],
            "holders": [],
            "forward": None,
            "weights": None,
            "hooks_of_all": [],
        }

    def check_hooks(self) -> None:
        """Refuse hooks on all modules that the user registered since the split: they
        would see shards."""
        new = [
            h
            for h in user_hooks_of_all()
            if all(h is not known for known in self.hooks_of_all)
        ]
        if new and self.mesh.size() > 1:
            name = getattr(new[0], "__qualname__", type(new[0]).__name__)
            raise RuntimeError(
                f"{name}: a hook was registered for all modules since the model was"
                " split (torch.nn.modules.module.register_module_forward_hook?), and"
                " would see this rank's shards: register it before"
                " apply_tensor_parallel, which then keeps whole what it sees, or"
                " remove it before the call"
            )

    def share_random(self) -> None:
        """All ranks draw from one random state in the forward that begins."""
        if self.mesh.size() > 1 and not self.random_is_shared:
            share_random_state(self.mesh)
        self.random_is_shared = True

    def act(self, actions: Iterable[Action], x: torch.Tensor) -> torch.Tensor:
        """Apply actions to a tensor."""
        with quiet():
            for a in actions:
                if a.kind == TO_DTENSOR:
                    x = self.to_dtensor(x, a.split)
                else:
                    x = ACTIONS[a.kind](x, a.split, self.group)
        return x

    def to_dtensor(self, x: torch.Tensor, split: Split) -> torch.Tensor:
        """A DTensor of which `x` is this rank's part."""
        if isinstance(self.group, SimulatedGroup):
            return x
        whole: dict[str, Any] = {}
        if split.units % self.mesh.size():
            # Of parts that are not equal, DTensor has to be told.
            shape = list(x.shape)
            shape[split.dim] = split.length
            stride = torch.empty(shape, device="meta").stride()
            whole = {"shape": torch.Size(shape), "stride": stride}
        placements = [split.placement()]
        return DTensor.from_local(x, self.mesh, placements, run_check=False, **whole)

    def apply(
        self,
        obj: Any,
        at: dict[ArgPath, Actions],
        fixed: Collection[ArgPath] = (),
        depth: int = -1,
    ) -> Any:
        """Apply `at[path]` to the tensor at each path of a nested argument. A tensor
        that several calls of one forward read is communicated once, unless it changes.
        Whether it does is asked of its version; where none is kept (inference mode,
        compiled code), only one whose path is in `fixed` is communicated once. Compiled
        code keeps results in the list of the forward that reads them, at a depth of
        `running`."""
        if not at:
            return obj
        with quiet():
            changes, compiled = {}, compiling(self)
            for path, actions in at.items():
                x = lookup(obj, path)
                if not isinstance(x, torch.Tensor):
                    wanted = (
                        f"a tensor at {path} of a module's inputs or outputs, as in the"
                        " forward that was traced"
                    )
                    raise RuntimeError(f"expected {wanted}, found {type(x).__name__}")
                if compiled:
                    kept = (
                        self.running[depth].kept
                        if path in fixed and len(self.running) >= -depth
                        else None
                    )
                    changes[path] = self.once(actions, x, kept)
                elif x.is_inference() and path not in fixed:
                    changes[path] = self.act(actions, x)
                else:
                    changes[path] = self.remembered(actions, x)
            return replace(obj, changes)

    def remembered(self, actions: Actions, x: torch.Tensor) -> torch.Tensor:
        """The actions on a tensor, done once in a forward while it does not change. The
        result is kept with the tensor, so that it lives no longer."""
        version = 0 if x.is_inference() else x._version
        key = (actions, version, torch.is_grad_enabled())
        kept = getattr(x, "_tp_kept", None)
        if kept is not None and kept[0] is self.forward and kept[1] == key:
            return kept[2]
        y = self.act(actions, x)
        if y is not x:
            x._tp_kept = (self.forward, key, y)
            self.holders.append(weakref.ref(x))
        return y

    def forget(self) -> None:
        """A forward has ended: what it remembered is not of the next. (The result of an
        action refers to the tensor that keeps it, through the autograd graph, where
        Python's garbage collector does not see it.)"""
        self.forward = object()
        for holder in self.holders:
            if (x := holder()) is not None:
                vars(x).pop("_tp_kept", None)
        self.holders.clear()

    def once(
        self, actions: Actions, x: torch.Tensor, kept: list | None
    ) -> torch.Tensor:
        """The actions on a tensor, done once for those that read it in one compiled
        forward."""
        if kept is None:
            return self.act(actions, x)
        for tensor, key, y in kept:
            if tensor is x and key == (actions, torch.is_grad_enabled()):
                return y
        y = self.act(actions, x)
        kept.append((x, (actions, torch.is_grad_enabled()), y))
        return y
