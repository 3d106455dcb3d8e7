"""Start a model that was built on the meta device: each rank makes its shards only,
with the values of the whole model."""

from typing import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from ..agreement import random_state, set_random_state
from ..carried import whole_of
from ..together import gather, together
from ..utils import replace, tensors
from .chunks import chunks
from .given import check_device, check_function, check_model


def materialize(
    model: nn.Module,
    init: Callable[[nn.Module], object] | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Give every parameter and buffer of a model that is on the meta device its memory
    and its first values, in place.

    `init(module)` is called on each module, children first, as `model.apply(init)`
    does. It sees the model's tensors
    whole: those that it touches are whole for that long, then each rank keeps its
    shards. So the values are, bit for bit, those of the whole model, started by
    `whole.to_empty(device=...).apply(init)` from rank 0's random state (which every
    rank is given first), and the memory at its peak is the shards and the largest
    module. Tensors that are not on meta keep their values. Ties stay ties. It works
    under FSDP2 too.

        with torch.device("meta"):
            model = MyModel()
        materialize(apply_tensor_parallel(model, tp_size=4))

    Args:
        model: an nn.Module, before or after apply_tensor_parallel and fully_shard.
            Every rank of the world must make the call.
        init: by default the `_init_weights` of the module or of the nearest one around
            it (that of transformers' models, with its order), and where there is none
            or it leaves the module's own tensors alone, the module's
            `reset_parameters()`.
        device: of the values; that of the mesh, or the CPU, by default.

    Returns: the model. Its parameters are new objects: make optimizers afterwards.
    Raises: TypeError, ValueError for what is no model, function or device, or is on
    meta on some ranks only; RuntimeError that lists the parameters and buffers that
    `init` did not write. What `init` raises on one rank, raises on all. The model is
    then as it was.
    """
    with together():
        check_model(model)
        check_function("init", init)
        places = Places(model)
        device = check_device(device) or torch.device(places.device())
        holders = {
            m
            for m in model.modules()
            if any(t.is_meta for t in (*m.parameters(), *m.buffers()))
        }
    started = gather(bool(holders))
    if not all(started):
        if any(started):
            ranks = [rank for rank, meta in enumerate(started) if not meta]
            raise ValueError(
                "model: expected one on the meta device on every rank, found none on"
                f" ranks {ranks}"
            )
        return model
    _same_random_state(device)
    try:
        with together(), torch.no_grad():
            _start(model, init, holders, _Whole(places, device))
    except BaseException:
        places.undo()
        raise
    return model


def _start(model, init, holders, whole):
    """Call `init` on each module that holds something on meta, and keep this rank's
    shards of what it writes."""
    start = init or _own_init(model, whole)

    def step(module):
        if module in holders:
            with whole:
                start(module)
            whole.keep(module)

    model.apply(step)
    named = (*model.named_parameters(), *model.named_buffers())
    left = [name for name, t in named if id(t) in whole.unset]
    if left:
        raise RuntimeError(
            "expected init to write every element of every parameter and buffer, found"
            f" {len(left)} that it did not: {', '.join(left)}; give an init(module)"
            " that does"
        )


class Places:
    """The parameters and buffers of a model, and the modules that hold each, so that
    ties stay ties."""

    def __init__(self, model):
        # (module, attribute) -> tensor; its id -> [(module, attribute), ...]
        self.tensors, self.at = (
            {},
            {},
        )
        self.replaced = []
        for module in model.modules():
            for name, t in own(module):
                self.tensors[module, name] = t
                self.at.setdefault(id(t), []).append((module, name))

    def device(self):
        """The device type of the mesh that the model is on, that of the CPU where it is
        on none."""
        return next(
            (
                t.device_mesh.device_type
                for t in self.tensors.values()
                if isinstance(t, DTensor)
            ),
            "cpu",
        )

    def fill(self, old, values):
        """Let `values` take the place of `old`, as a parameter if that is one. Returns
        what is now there."""
        new = values
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(values, requires_grad=old.requires_grad)
            vars(new).update(vars(old))
        self.replaced.append((old, new))
        self._put(old, new)
        return new

    def undo(self):
        """Put back all that was replaced."""
        while self.replaced:
            self._put(*reversed(self.replaced.pop()))

    def _put(self, old, new):
        self.at[id(new)] = self.at.pop(id(old))
        for module, name in self.at[id(new)]:
            self.tensors[module, name] = new
            setattr(module, name, new)


def own(module):
    """[(attribute, tensor), ...] of the parameters and buffers that a module itself
    holds."""
    return [
        (n, t)
        for table in (module._parameters, module._buffers)
        for n, t in table.items()
        if t is not None
    ]


class _Whole(TorchFunctionMode):
    """Within it, torch's functions see a model's tensors whole; `keep` then stores what
    was written to those on meta."""

    def __init__(self, places, device):
        super().__init__()
        self.places, self.device = places, device
        # id of a tensor of the model -> (it, the whole, the whole's version then)
        self.seen = {}
        # The shards come first, as what is whole for a moment would leave holes between
        # them.
        meta = {id(t): t for t in places.tensors.values() if t.is_meta}.values()
        new = [
            places.fill(t, torch.empty_like(t.detach(), device=device)) for t in meta
        ]
        self.ours = {id(t) for t in new}
        self.unset = {id(t) for t in new if t.numel()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = args, kwargs or {}
        args, kwargs = replace(
            given,
            {p: self.whole(t) for p, t in tensors(given) if id(t) in self.places.at},
        )
        return func(*args, **kwargs)

    def whole(self, t):
        """The whole of a tensor, all NaN where it has no values yet."""
        if id(t) not in self.seen:
            if id(t) in self.unset:
                whole = torch.empty(t.shape, dtype=t.dtype, device=self.device)
                if _has_nan(t):
                    whole.fill_(torch.nan)
            elif isinstance(t, DTensor):
                with together():  # no rank has failed, and does not come here
                    pass
                whole = whole_of(t.detach()).clone()
            else:
                whole = t.detach().clone()
            self.seen[id(t)] = t, whole, whole._version
        return self.seen[id(t)][1]

    def written(self, t):
        """Whether a whole was written: in every element, if its elements have a NaN."""
        _, whole, version = self.seen.get(id(t), (None,) * 3)
        if whole is None or not _has_nan(whole):
            return whole is not None and whole._version != version
        reals = torch.view_as_real(whole) if whole.is_complex() else whole
        return not reals.max().isnan()  # no number is above a NaN

    def keep(self, module):
        """Store this rank's blocks of what `init(module)` wrote."""
        for m in module.modules():
            for name, now in own(m):
                t = self.places.tensors.get((m, name), now)
                if now is not t:  # init put another tensor in its place
                    setattr(m, name, t)
                    if now.shape != t.shape:
                        found = (
                            f"expected the shape {tuple(t.shape)}, found"
                            f" {tuple(now.shape)}"
                        )
                        raise ValueError(
                            "init put another tensor in the place of"
                            f" {type(m).__name__}.{name}: {found}"
                        )
                    self.seen[id(t)] = t, now.detach().to(self.device, t.dtype), -1
        for t, whole, _ in self.seen.values():
            if id(t) in self.ours and self.written(t):
                self.unset.discard(id(t))
                for c in chunks(t):
                    c.tensor.copy_(
                        whole[
                            tuple(
                                slice(o, o + n)
                                for o, n in zip(c.offsets, c.tensor.shape)
                            )
                        ]
                    )
        self.seen.clear()


def _has_nan(t):
    return (
        t.dtype.is_floating_point or t.dtype.is_complex
    ) and t.dtype.itemsize > 1  # max knows no float8


def _own_init(model, whole):
    """The init that a model brings along: see `materialize`."""
    around = {}

    def find(module, init):
        around[module] = init = getattr(module, "_init_weights", init)
        for child in module.children():
            if child not in around:
                find(child, init)

    def init(module):
        if module not in around:  # shared, and started already
            return
        init_weights = around.pop(module)
        if init_weights is not None:
            init_weights(module)
        mine = [t for _, t in own(module) if id(t) in whole.ours]
        if (
            mine
            and not any(map(whole.written, mine))
            and hasattr(module, "reset_parameters")
        ):
            module.reset_parameters()

    find(model, None)
    return init


def _same_random_state(device):
    """Every rank goes on from rank 0's random state."""
    if dist.is_initialized():
        states = random_state(device.type == "cuda")
        dist.broadcast_object_list(states, src=0)
        set_random_state(states)
