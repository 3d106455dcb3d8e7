"""What the hooks of one module do: to its parameters, inputs and outputs, and to single calls
within it. Pure data."""

from dataclasses import dataclass, field

from ..axes.action import OnShard


@dataclass(frozen=True)
class Bound:
    """A number with which a call indexes a sharded dim: as the code gives it, and what it is on a
    shard."""

    given: int
    local: int


@dataclass
class CallProgram:
    """What is done around a call: actions on its arguments and outputs, sizes replaced, what is run
    instead."""

    inputs: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)
    fixed: set = field(default_factory=set)  # paths of those inputs that no later call writes to
    divided: list = field(default_factory=list)  # paths of sizes to divide by the number of ranks
    multiplied: list = field(
        default_factory=list
    )  # and to multiply: computed from a shard's own size
    bounds: dict = field(
        default_factory=dict
    )  # path -> Bound of the numbers that index a sharded dim
    order: tuple | None = (
        None  # of the dims in memory, outermost first, that its input has in the whole model
    )
    kept: dict = field(
        default_factory=dict
    )  # buffers that the call updates: split for it, gathered after it
    instead: OnShard | None = None  # what on_shard.py runs in its place


@dataclass
class Program:
    """One module's program. Paths lead into (args, kwargs) for inputs and into the output for
    outputs."""

    params: dict = field(default_factory=dict)  # parameter name -> actions on its local tensor
    inputs: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)
    calls: dict = field(default_factory=dict)
    names: list | None = None  # of all its calls, where they are watched
    # Number of a call -> CallKind that it was shown right for, where it works on shards or may draw
    # random numbers.
    kinds: dict = field(default_factory=dict)
    training: bool | None = field(
        default=None, compare=False
    )  # the module's mode; None where it had both
    # Its attributes that may choose what it does: {name: flag, string, None, number}.
    settings: dict = field(default_factory=dict, compare=False)
    written: set = field(
        default_factory=set, compare=False
    )  # parameters that the forward writes to
    optional: set = field(
        default_factory=set, compare=False
    )  # parameters that not every run of it reads
    aside: bool = field(default=False, compare=False)  # its calls are numbered by its callers
    fixed: set = field(
        default_factory=set, compare=False
    )  # paths of those inputs that no later call writes to
    random: bool = field(
        default=False, compare=False
    )  # of what the user calls: whether it draws random numbers
    modules: int = field(default=0, compare=False)  # and how many modules run in it
    changes: list = field(
        default_factory=list, compare=False
    )  # and which attributes of modules are changed by it
    dear: dict = field(
        default_factory=dict, compare=False
    )  # and what was decided of its lines, as Layout has it
    # Whether hooks would see shards or partial results at its border.
    inside: bool = field(default=False, compare=False)
    # Path of an object in (args, kwargs, output) -> {place: Action} of the shards that it keeps.
    shards: dict = field(default_factory=dict)

    def fits(self, module):
        """Whether a module is set as it was when its forward was shown."""
        if self.training is None:
            return True
        if module.training is not self.training:
            return False
        now = vars(module)
        for name, then in self.settings.items():
            x = now.get(name, self)
            if x is not then and (
                type(x) is not type(then) or x != then
            ):  # a tensor now is not to be compared
                return False
        return True


NOTHING = Program(
    aside=True
)  # that of a module that no traced forward reached: its calls are its callers'
