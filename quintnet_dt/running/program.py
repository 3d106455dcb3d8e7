"""What the hooks of one module do: to its parameters, inputs and outputs, and to single
calls within it. Pure data."""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from ..axes.action import Action, OnShard
from ..groups import Group, Units, part_of
from ..keys import ArgPath, CallNumber, ModulePath, ParamName
from .kinds import CallKind
from .sizes import LocalSize

Actions: TypeAlias = tuple[Action, ...]  # on one tensor, in order


@dataclass(frozen=True)
class Bound:
    """A number that indexes a sharded dim. `units`: in which it is dealt out to the
    ranks; None where all take it as it is. `own`: the model's code gives each rank the
    part that is its own, computed from a shard."""

    given: int  # of the whole dim, where it is dealt out
    units: Units | None = None
    own: bool = False

    def expected(self, group: Group) -> int:
        """The number that the model's code gives on this rank."""
        return self.local(group) if self.own else self.given

    def local(self, group: Group) -> int:
        """The number for this rank's shard."""
        if self.units is None:
            return self.given
        part = part_of(abs(self.given), self.units, group)
        assert part is not None, f"{self} cannot be dealt out"
        return part if self.given >= 0 else -part


@dataclass
class CallProgram:
    """What is done around a call: actions on its arguments and outputs, sizes replaced,
    what is run instead."""

    inputs: dict[ArgPath, Actions] = field(default_factory=dict)
    outputs: dict[ArgPath, Actions] = field(default_factory=dict)
    # Those inputs that no later call writes to.
    unwritten: set[ArgPath] = field(default_factory=set)
    sizes: dict[ArgPath, LocalSize] = field(default_factory=dict)
    # The numbers that index a sharded dim.
    bounds: dict[ArgPath, Bound] = field(default_factory=dict)
    # Of the dims in memory, outermost first, that its input has in the whole model.
    order: tuple[int, ...] | None = None
    # Buffers that the call updates: split for it, gathered after it.
    buffers: dict[ArgPath, Action] = field(default_factory=dict)
    # What on_shard.py runs in its place.
    instead: OnShard | None = None


@dataclass
class Forward:
    """What was found of a whole forward, of the module that the user calls."""

    random: bool = False  # whether it draws random numbers
    modules: int = 0  # how many modules run in it
    # Attributes of modules that it changes.
    changes: list[tuple[ModulePath, str]] = field(default_factory=list)
    # What was decided of its lines, as Layout has it.
    dear: dict = field(default_factory=dict)
    # Path of an object in (args, kwargs, output) -> {place: Action} of the shards that
    # it keeps.
    shards: dict[ArgPath, dict[Any, Action]] = field(default_factory=dict)


@dataclass
class Program:
    """One module's program. Paths lead into (args, kwargs) for inputs and into the
    output for outputs."""

    # on its local tensor
    params: dict[ParamName, Actions] = field(default_factory=dict)
    inputs: dict[ArgPath, Actions] = field(default_factory=dict)
    outputs: dict[ArgPath, Actions] = field(default_factory=dict)
    calls: dict[CallNumber, CallProgram] = field(default_factory=dict)
    names: list[str] | None = None  # of all its calls, where they are counted
    # What a call was shown right for, where it works on shards or may draw random
    # numbers.
    kinds: dict[CallNumber, CallKind] = field(default_factory=dict)
    # Attributes of the module that are this rank's while it runs.
    numbers: dict[str, LocalSize] = field(default_factory=dict)

    # What runs of the module may differ in.

    # The module's mode; None where it had both, or was set in several ways.
    training: bool | None = field(default=None, compare=False)
    # Its attributes that may choose what it does: {name: flag, string, None, number}.
    settings: dict[str, Any] = field(default_factory=dict, compare=False)
    # Parameters that the forward writes to, and that not every run of the module reads.
    written: set[ParamName] = field(default_factory=set, compare=False)
    optional: set[ParamName] = field(default_factory=set, compare=False)
    # Those inputs that no later call writes to.
    unwritten: set[ArgPath] = field(default_factory=set, compare=False)
    # its calls are numbered by its callers
    aside: bool = field(default=False, compare=False)
    # Whether hooks would see shards or partial results at its border.
    inside: bool = field(default=False, compare=False)
    forward: Forward = field(default_factory=Forward, compare=False)

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is set as it was when its forward was shown."""
        if self.training is None:
            return True
        if module.training is not self.training:
            return False
        now = vars(module)
        for name, then in self.settings.items():
            x = now.get(name, self)
            # What is a tensor now is not to be compared.
            if x is not then and (type(x) is not type(then) or x != then):
                return False
        return True


Programs: TypeAlias = dict[ModulePath, Program]  # of the modules of a model

# That of a module that no traced forward reached: its calls are its callers'.
NOTHING = Program(aside=True)
