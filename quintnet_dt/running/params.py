"""The parameters that one module reads: shown to it as local tensors while it runs."""

import torch
from torch.distributed.tensor import DTensor

from ..axes.action import Action
from ..ddp import is_local
from ..keys import ParamName
from ..places import Owners, Place, put
from ..private import as_parameter, read_local
from .context import Context
from .program import Program
from .shown import Shown, keep_data, writable


class Params:
    """What a module's program does to the parameters that it reads."""

    def __init__(self, context: Context, owners: Owners):
        self.context, self.owners = context, owners
        self.program: Program | None = None
        # Where they are, what is done to each, and whether the forward writes to it.
        self.places: list[tuple[Place, tuple[Action, ...], bool]] = []

    def take(self, program: Program | None) -> None:
        self.program = program
        if program is None:
            self.places = []
            return
        self.places = [
            (place, actions, name in program.written)
            for name, actions in program.params.items()
            for place in self.owners[name]
        ]

    def show(self, shown: list[Shown], compiled: bool) -> None:
        """Show the module, and whoever looks while it runs, the local tensors. A
        parameter that a module around it shows too is shown as this one's program says,
        until it ends."""
        for place, actions, written in self.places:
            owner, attr = place
            if attr not in owner._parameters:  # pruned, say
                self.refuse_replaced(place, vars(owner).get(attr))
            else:
                before = owner._parameters[attr]
                one = self.shown(place, before, actions, written, compiled)
                if one is not None:
                    put(owner, attr, one.tensor)
                    shown.append(one)

    def shown(
        self,
        place: Place,
        before: torch.Tensor,
        actions: tuple[Action, ...],
        written: bool,
        compiled: bool,
    ) -> Shown | None:
        """One parameter as it is to be shown; None where it is another tensor than was
        split, as it may be."""
        around = (
            None if isinstance(before, DTensor) else self.shown_around(place, before)
        )
        if around is not None:
            param, local = around.param, around.local
            if written:
                keep_data(param, local)
        elif (
            isinstance(before, DTensor) or is_local(before) or self.context.mesh is None
        ):
            param, local = before, self.local(place, before, written)
        else:
            self.refuse_replaced(place, before)
            return None
        if around is not None and around.actions == actions:
            tensor = around.tensor  # one tensor, to take gradients with respect to
        else:
            tensor = self.context.act(actions, local) if actions else local
        if not compiled:
            tensor = as_parameter(tensor)
        if written:  # what is assigned to its `.data` is found there
            local = tensor
        return Shown(place, before, tensor, param, local, actions, written)

    def shown_around(self, place: Place, tensor: torch.Tensor) -> Shown | None:
        """The Shown of a module around this one that shows this tensor there."""
        for running in reversed(self.context.running):
            for one in running.shown:
                there = one.place
                if (
                    there.owner is place.owner
                    and there.attr == place.attr
                    and one.tensor is tensor
                ):
                    return one
        return None

    def local(self, place: Place, p: torch.Tensor, written: bool) -> torch.Tensor:
        """This rank's part of a parameter."""
        if not isinstance(p, DTensor):
            return p
        if p.device_mesh.ndim > 1:
            raise RuntimeError(
                f"{self.name_of(place)}: it is read while FSDP holds it sharded,"
                " outside of the module that fully_shard was called on: call"
                " fully_shard on a module that holds all that read it"
            )
        local = read_local(p)
        return writable(local) if written else local

    def refuse_replaced(self, place: Place, p: object) -> None:
        """A parameter is another tensor than the one that was split. Within a forward
        that replaces it for some runs of this module only (torch.func.functional_call),
        this is one of those."""
        name = self.name_of(place)
        if self.program is None or name not in self.program.optional:
            raise RuntimeError(
                f"{name}: expected the DTensor that apply_tensor_parallel made, found a"
                f" {type(p).__name__} (replaced, pruned, or loaded with assign=True?):"
                " copy values into the DTensor, or change the model before it is split"
            )

    def name_of(self, place: Place) -> ParamName:
        return next(name for name, places in self.owners.items() if place in places)
