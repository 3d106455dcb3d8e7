"""The record of one forward: values, calls, operators, runs of modules."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch

from ..keys import ArgPath, CallIndex, ValueId


class Value:
    """A tensor at one moment: an in-place operator makes a new Value of the same
    tensor.

    `param` is its name if it is a parameter, `producer` the index of the call that made
    it. Its `tensor` is let go of when the forward is over.
    """

    def __init__(self, id, tensor, producer=None, param=None):
        self.id, self.tensor = id, tensor
        self.producer, self.param = producer, param
        self.shape, self.dtype, self.device = (
            tuple(tensor.shape),
            tensor.dtype,
            tensor.device,
        )
        self.strides = tensor.stride() if tensor.layout == torch.strided else None
        # Whether it could ever need a gradient: made from a parameter or an input that
        # could.
        self.trainable = self.differentiable = tensor.requires_grad
        self.memory = self  # the value whose memory it shares, if it is a view

    @property
    def numel(self):
        return prod(self.shape)

    @property
    def nbytes(self):
        return self.numel * self.dtype.itemsize


@dataclass
class Node:
    """One ATen operator. `args` and `kwargs` hold Values where the operator had
    tensors."""

    op: Any
    args: tuple
    kwargs: dict
    inputs: list  # Values, in order
    outputs: list
    mutated: set  # ids of the Values that it wrote to


@dataclass
class Call:
    """One torch function that Python code called, with its ATen operators."""

    index: int
    func: Any
    name: str
    module: "ModuleCall"
    args: tuple  # the arguments with Values for tensors: (args, kwargs)
    inputs: dict  # path -> Value
    outputs: dict = field(default_factory=dict)  # path -> Value
    nodes: list = field(default_factory=list)
    source: str = "?"
    why_whole: str = ""  # why it must get whole tensors, with whole gradients; else ""
    # It is in the forward of an autograd.Function that may run on any shard, but whose
    # backward would not know of what is done with its inputs and outputs.
    own_backward: bool = False
    # As `utils.callers` counts them; more than its module's: it is run again when that
    # is not running.
    checkpoints: int = 0
    hidden: bool = (
        # its operators were called by no torch function that a mode sees: by
        # TorchScript, by a vmap
        False
    )

    def __str__(self):
        return f"{self.name} in {self.module.path or 'the root'} ({self.source})"


def next_seen(calls, at):
    """The index of the first call, from `at` on, that a mode sees when the forward runs
    again."""
    while at < len(calls) and calls[at].hidden:
        at += 1
    return at


@dataclass
class ModuleCall:
    """One run of one module's forward. `steady`: the forward is one of torch's own that
    makes the same calls each time. `user_hooked`: hooks of the user's see
    what crosses its border."""

    path: str
    parent: "ModuleCall | None"
    inputs: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)
    steady: bool = False
    user_hooked: bool = False
    checkpoints: int = 0
    training: bool = False
    # of a module of torch.nn: {attribute: number or string}
    settings: dict = field(default_factory=dict)

    def chain(self):
        """This run and those that called it, innermost first."""
        call = self
        while call is not None:
            yield call
            call = call.parent

    def within(self, other):
        return any(call is other for call in self.chain())


class Reading(NamedTuple):
    """What a forward read of values at a call: a scalar, or the shape of a tensor."""

    call: CallIndex
    result: Any
    from_inputs: bool  # whether it follows from the inputs alone


class InObject(NamedTuple):
    """A tensor that an object among the inputs and outputs keeps."""

    path: ArgPath  # of the object in (args, kwargs, output)
    place: Any  # there
    value: Value | None


@dataclass
class Graph:
    """The record of one forward: values, calls in order, module calls (the root
    first)."""

    values: list
    calls: list
    modules: list
    params: dict  # parameter name -> Value
    readings: list[Reading] = field(default_factory=list)
    # Values that modules keep when the forward is over.
    left_in_modules: list[Value] = field(default_factory=list)
    in_objects: list[InObject] = field(default_factory=list)
    # The Action that completes each that was a shard when it was given.
    shards_given: dict[ValueId, Any] = field(default_factory=dict)
    random: bool = False  # whether it draws random numbers
    # (module path, attribute) of what modules keep otherwise afterwards
    changes: list = field(default_factory=list)
    # names of the parameters that the forward writes to
    rewritten: set = field(default_factory=set)

    @property
    def outputs(self):
        return self.modules[0].outputs

    @cached_property
    def use_count(self):
        """Value id -> how often it is read: by calls, and as an output of the model."""
        read = [v for call in self.calls if call.nodes for v in call.inputs.values()]
        return Counter(v.id for v in [*read, *self.outputs.values()])

    @cached_property
    def readers(self):
        """Value id -> (call, path of the argument) for each time that a call reads
        it."""
        readers = {}
        for call in self.calls:
            for path, v in call.inputs.items() if call.nodes else ():
                readers.setdefault(v.id, []).append((call, path))
        return readers

    @cached_property
    def kept_elsewhere(self):
        """Ids of the values that others than the model's calls read: they are outputs,
        are kept by modules, or seen by hooks."""
        kept = *self.outputs.values(), *self.left_in_modules
        return {v.id for v in kept} | self.seen_by_hooks.keys()

    def numbered(self, call, module):
        """Whether a call can be told from others by its number in a module's run."""
        return (
            id(module) not in self.unsteady and call.checkpoints == module.checkpoints
        )

    @cached_property
    def seen_by_hooks(self):
        """Values by id that hooks of the user's see, or code with a backward of its
        own: they are whole."""
        runs = [m for m in self.modules if m.user_hooked] + [
            c for c in self.calls if c.why_whole
        ]
        return {
            v.id: v for x in runs for v in (*x.inputs.values(), *x.outputs.values())
        }

    @cached_property
    def last_write(self):
        """Memory (as its first Value's id) -> index of the last call that wrote to
        it."""
        return {
            v.memory.id: c.index
            for c in self.calls
            for n in c.nodes
            for v in n.inputs
            if v.id in n.mutated
        }

    @cached_property
    def made_in_place(self):
        """Ids of the values that a call made by writing to a tensor that it was given,
        which the model may go on with whatever the call returns."""
        return {
            v.id for c in self.calls for n in c.nodes if n.mutated for v in n.outputs
        }

    @cached_property
    def made_of(self):
        """Value id -> the parameters that it is made of, if of them (and constants)
        alone: a weight that is standardised."""
        given = {v.id for v in self.modules[0].inputs.values()}
        made = {v.id: {name} for name, v in self.params.items()}
        for call in self.calls:
            ins = [
                v
                for v in call.inputs.values()
                if v.producer is not None or v.id in made or v.id in given
            ]
            if call.nodes and ins and all(v.id in made for v in ins):
                names = set().union(*(made[v.id] for v in ins))
                made.update((v.id, names) for v in call.outputs.values())
        return made

    @cached_property
    def users(self):
        """Parameter name -> the calls that use it, or what is made of it."""
        users = {}
        for call in self.calls:
            made_of = [
                self.made_of[v.id]
                for v in call.inputs.values()
                if call.nodes and v.id in self.made_of
            ]
            for name in sorted(set().union(*made_of)):
                users.setdefault(name, []).append(call)
        return users

    @cached_property
    def unsteady(self):
        """Ids of the module runs that read values which do not follow from the inputs
        alone: their calls may differ from run to run."""
        asked = [r.call for r in self.readings if not r.from_inputs]
        at = [i for i in asked if i < len(self.calls)]
        return {id(m) for i in at for m in self.calls[i].module.chain()}
