"""What is noted while a forward runs: the modules in it, and what has happened so
far."""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from ..keys import ModulePath
from ..places import Owners
from .kinds import CallKind
from .numbers import Numbers
from .program import CallProgram, Program


class UserCall(NamedTuple):
    """A call that the user makes, of the model that was split or of a part of it.
    `owners`: as parameter_owners gives them; `compiled`: by torch.compile."""

    path: ModulePath
    owners: Owners
    module: nn.Module
    args: tuple
    kwargs: dict
    compiled: bool = False

    @property
    def name(self) -> str:
        return self.path or type(self.module).__name__


@dataclass(eq=False)
class Frame:
    """One run of a module in which calls are counted."""

    context: Any
    program: Program
    # what has its path, which is read for errors alone: torch.compile would make each
    # block's code its own
    of: Any
    # its Python code runs within a function given to torch.compile
    compiled: bool = False
    number: int = 0  # of the call that comes next

    @property
    def path(self) -> str:
        return self.of.path


@dataclass(eq=False)
class Running:
    """One run of a module's forward, as its hooks know it."""

    hooks: Any
    program: Program | None
    shown: list  # Shown of each parameter
    counted: bool  # whether it has a Frame
    # what actions made, in compiled code, which has no tensors to keep it with
    kept: list | None
    compiled: bool
    numbers: Numbers | None = None


# What has happened.


class Started(NamedTuple):
    """A module started."""

    path: ModulePath
    module: nn.Module


class Called(NamedTuple):
    """A call was made that was counted, and this was done around it."""

    name: str
    program: CallProgram | None
    kind: CallKind | None


class Ended(NamedTuple):
    """The innermost module ended, or failed."""

    failed: bool


# What comes next.


@dataclass(frozen=True)
class Starts:
    """A module starts, set as it is now."""

    path: ModulePath
    module: nn.Module | None = None


@dataclass(frozen=True)
class Calls:
    """A call."""

    name: str
    args: tuple
    kwargs: dict


@dataclass(frozen=True)
class Ends:
    """The innermost module ends."""


Past: TypeAlias = Started | Called | Ended
Next: TypeAlias = Starts | Calls | Ends


def watching(frames: list[Frame]) -> Frame | None:
    """The Frame in which a call is counted: of the innermost module whose calls are its
    own, if they are watched."""
    for frame in reversed(frames):
        program = frame.program
        if not program.aside:
            return None if program.names is None else frame
    return None
