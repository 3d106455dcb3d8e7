"""What a layout is: the state of every tensor, and the collectives that make every call
right."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..axes.action import Action, OnShard
from ..axes.sharding import Axis
from ..axes.state import State
from ..keys import ArgPath, CallIndex, ValueId
from ..tracing.graph import Call


class Blocker(NamedTuple):
    """A call that needs something gathered."""

    call: Call
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.call}"


@dataclass
class Layout:
    """What `lay_out` found. `uses[(call index, path)]`, `values[value id]` and
    `root[path]` are the actions on an argument of a call, on a value where it is made,
    and on an output of the model."""

    uses: dict[tuple[CallIndex, ArgPath], list[Action]] = field(default_factory=dict)
    values: dict[ValueId, list[Action]] = field(default_factory=dict)
    root: dict[ArgPath, list[Action]] = field(default_factory=dict)
    # as the value's call makes it
    states: dict[ValueId, State] = field(default_factory=dict)
    # What on_shard.py runs in the place of a call.
    instead: dict[CallIndex, OnShard] = field(default_factory=dict)
    # Buffers that a call updates, on its part of them.
    buffers: dict[CallIndex, dict[ArgPath, Action]] = field(default_factory=dict)
    # what a call works on a shard of
    axis_of: dict[CallIndex, Axis] = field(default_factory=dict)
    # (call that needed something gathered, why)
    blockers: list[Blocker] = field(default_factory=list)
    # (Module path, call's name, line of code) -> whether it is dearer on shards.
    dear: dict = field(default_factory=dict)
    # Path of an object that keeps tensors -> {place: Action} of those that are shards.
    shards: dict[ArgPath, dict] = field(default_factory=dict)
