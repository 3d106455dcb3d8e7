"""That all ranks of a tp group make the same calls of a model, in the same order, at no
cost while they do.

What a rank calls next is mostly what the calls before it make one expect: the kind that
came after this kind the last time, its sizes grown as they last grew (by none, or by
one token). A call that is as expected is told to nobody. Any other is told to all ranks
of the group through its store, and waits for what they call. Ranks that agreed so far
expect the same; so where their calls differ, at least one of them is not as expected,
and finds out before it communicates.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .canonical import canonical
from .processgroup import timeout_of

CHECKED = 2  # the first calls of a kind are told in any case
KEPT = 256  # kinds that are remembered
SHOWN = 8  # arguments in a message
_copies = itertools.count(1)  # every rank makes the same copies of models


@dataclass
class _Kind:
    """Calls of one kind: how many there were, the shapes of the last one's tensors, how
    they had grown, and a text."""

    calls: int = 0
    shapes: tuple = ()
    growth: tuple | None = None
    text: str = ""

    def expects(self, shapes):
        if self.growth is None:
            return shapes == self.shapes
        return shapes == tuple(
            tuple(size + more for size, more in zip(shape, grown))
            for shape, grown in zip(self.shapes, self.growth)
        )

    def note(self, shapes):
        same = self.calls == 0 or shapes == self.shapes
        pairs = () if same else zip(shapes, self.shapes)
        self.growth = (
            None
            if same
            else tuple(tuple(a - b for a, b in zip(x, y)) for x, y in pairs)
        )
        self.shapes, self.calls = shapes, self.calls + 1


class InStep:
    """The calls of one split model. `name`: the same on all ranks, and no other
    model's. A copy's calls are its own."""

    def __init__(self, mesh, name):
        self.mesh, self.name = mesh, name
        self.number, self.last, self.after, self.kinds = 0, None, {}, {}
        self.told = None  # the number of the last call that was told
        self._store = None

    def __getstate__(self):
        return self.mesh, self.name

    def __setstate__(self, state):
        mesh, name = state
        self.__init__(mesh, f"{name}.{next(_copies)}")

    def call(self, key, shapes, same, call, new):
        """Note a call that is about to run.

        Args: `key`, its kind; `shapes` of its tensors; `same`: data that must be the
        same on all ranks; `call`: (module path, module, args, kwargs); `new`: whether
        this rank has no programs for it yet.
        Returns: (how many calls of this kind there were, whether it is new to any
        rank).
        Raises: Apart, where the ranks are found to make different calls, on all that
        told of theirs.
        """
        if len(self.kinds) > KEPT:
            self.kinds, self.after = {}, {}  # on all ranks: they had the same calls
        kind, last = self.kinds.get(key) or _Kind(), self.last
        usual = self.after.get(last)
        if self.mesh.size() > 1 and not (
            usual == key and kind.calls >= CHECKED and kind.expects(shapes)
        ):
            self.last = None  # where this fails, nothing is expected any more
            kind.text = _text(*call)
            new = self.tell(_Told.of(same, call, kind.text, new), self.kinds.get(usual))
        if last is not None:
            self.after[last] = key
        self.last, self.kinds[key] = key, kind
        self.number += 1
        kind.note(shapes)
        return kind.calls - 1, new

    def tell(self, mine, usual):
        """Tell all ranks of a call, and wait for what they tell; gives whether it is
        new to any."""
        if (store := self.store) is None:
            return mine.new
        rank, n = self.mesh.get_local_rank(), self.mesh.size()
        store.set(f"{self.number}/{rank}", mine.packed())
        try:
            store.wait(
                [f"{self.number}/{r}" for r in range(n)],
                timeout_of(self.mesh.get_group()),
            )
            everyone = [
                _Told.unpacked(store.get(f"{self.number}/{r}")) for r in range(n)
            ]
            if self.told is not None:  # all have told of a later one, so have read it
                store.delete_key(f"{self.told}/{rank}")
        except RuntimeError as e:  # torch's DistStoreError is one
            raise Apart(self.nobody(rank, mine.text, usual)) from e
        self.told = self.number
        for r, other in enumerate(everyone):
            if other.same != everyone[0].same:
                self.number += 1
                raise Apart(
                    "the ranks of a tp group made different calls: rank 0 called"
                    f" {everyone[0].text}; rank {r} called {other.text}: make the same"
                    " calls on all of them, in the same order",
                    len({x.mode for x in everyone}) == 1,
                )
        return any(x.new for x in everyone)

    def nobody(self, rank, text, usual):
        """What to say of ranks that told of no call."""
        keys = {r: f"{self.number}/{r}" for r in range(self.mesh.size()) if r != rank}
        try:
            silent = [r for r, key in keys.items() if not self.store.check([key])]
        except RuntimeError:  # the store went with the rank that held it
            silent = list(keys)
        wait = timeout_of(self.mesh.get_group()).total_seconds()
        again = (
            f" (as what came after the call before the last time: {usual.text})"
            if usual and usual.text
            else ""
        )
        return (
            f"the ranks of a tp group made different calls: rank {rank} called {text};"
            f" {', '.join(f'rank {r}' for r in silent)} told of none within {wait:g} s:"
            f" it runs one that was to be expected{again}, or none at all. Make the"
            " same calls on all of them, in the same order"
        )

    @property
    def store(self):
        """A connection of this model's own, since one that waits is shut to other
        threads; None where torch has no way to the group's store."""
        group = self.mesh.get_group()
        if self._store is None and hasattr(group, "get_group_store"):
            store = group.get_group_store()
            self._store = dist.PrefixStore(
                f"quintnet_dt/{self.name}",
                store.clone() if hasattr(store, "clone") else store,
            )
        return self._store

    @contextlib.contextmanager
    def explained(self):
        """Around what is communicated for a call: `explain`s what fails."""
        try:
            yield
        except RuntimeError as e:
            self.explain(e)
            raise

    def explain(self, error):
        """To an error of a call that was as expected, add what another rank tells that
        it called in its place."""
        number = self.number - 1
        if self.mesh.size() == 1 or self.told == number or self._store is None:
            return
        try:
            keys = {
                r: f"{number}/{r}"
                for r in range(self.mesh.size())
                if r != self.mesh.get_local_rank()
            }
            told = {
                r: _Told.unpacked(self._store.get(k)).text
                for r, k in keys.items()
                if self._store.check([k])
            }
        except RuntimeError:  # the store went with the rank that held it
            return
        texts = [
            f"rank {r} called {text} in its place; make the same calls on all ranks"
            for r, text in told.items()
        ]
        # as add_note of Python 3.11 does
        error.__notes__ = [
            *getattr(error, "__notes__", []),
            *texts,
        ]


class Apart(ValueError):
    """The ranks of a tp group make different calls. `batch`: all have told of theirs,
    which differ in their arguments alone."""

    def __init__(self, text, batch=False):
        super().__init__(text)
        self.batch = batch


@dataclass
class _Told:
    """What a rank tells of a call: texts that must be the same, of it all and of its
    mode; one to show; whether the rank has no programs for it."""

    same: str
    mode: str
    text: str
    new: bool

    @classmethod
    def of(cls, same, call, text, new):
        path, module, _, kwargs = call
        named = inspect.signature(module.forward).parameters
        # which a forward may go by, as by that of a dict
        order = [name for name in kwargs if name not in named]
        same = hashlib.sha256(canonical((same, order)).encode()).hexdigest()
        return cls(
            same, f"{path} {module.training} {torch.is_grad_enabled()}", text, new
        )

    def packed(self):
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def unpacked(cls, data):
        return cls(*json.loads(data))


def _text(path, module, args, kwargs):
    """A call in words."""
    items = [*((f"argument {i}", x) for i, x in enumerate(args)), *kwargs.items()]
    mode = (
        f"{'train' if module.training else 'eval'}"
        f" mode{'' if torch.is_grad_enabled() else ' without gradients'}"
    )
    given = [f"{name} {_what(x)}" for name, x in items[:SHOWN]] + ["..."] * (
        len(items) > SHOWN
    )
    return f"{path or 'the model'} in {mode} with {', '.join(given) or 'nothing'}"


def _what(x):
    if isinstance(x, torch.Tensor):
        return (
            f"of shape {tuple(x.shape)},"
            f" {x.dtype}{', with gradients' if x.requires_grad else ''}"
        )
    return (
        f"= {x!r}"
        if isinstance(x, (bool, int, float, type(None)))
        else f"a {type(x).__name__}"
    )
