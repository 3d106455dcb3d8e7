"""A copy of a model that owns no memory, to plan on while the model itself stays
untouched."""

import copy
from collections import Counter

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..ddp import as_dtensor, whole_shape
from ..fsdp import copyable
from ..parts import modules, named_parameters, parameters, scripts
from ..utils import tensors
from .caches import unshare
from .closures import rebind
from .user_hooks import is_ours, strip


class StrayParameter(ValueError):
    """Something other than its module holds a parameter, and would keep the old one
    when the model is split."""

    def __init__(self, names):
        super().__init__(
            f"{', '.join(names)}: expected every parameter to be read as an attribute"
            " of its module, found one that something else holds (a list, a partial, a"
            " lambda, an optimizer kept in the model; a global, or an object"
            " elsewhere, that holds its module), which would keep the old one: read it"
            " as self.name, and make optimizers afterwards"
        )


class SplitWithin(RuntimeError):
    """A model that was split by itself is called by one that is being planned."""

    def __init__(self, module, path):
        name = f"{type(module).__name__}{path and f' ({path})'}"
        super().__init__(
            f"{name}: expected a forward that calls no model which was split by itself,"
            " found one: make it a submodule and split the whole, or call it outside"
            " and pass on what it gives"
        )


class _Memo(dict):
    """Counts how often a copy meets each object."""

    def __init__(self):
        super().__init__()
        self.met = Counter()

    def get(self, key, default=None):
        self.met[key] += 1
        return super().get(key, default)


def ghost(model, fake_mode=None, local_shape=None, device=None):
    """A deep copy of `model` that owns no memory: parameters and buffers are fake
    tensors of `fake_mode`.

    `local_shape(name, param)` gives the shape of a parameter; its whole shape by
    default. Without `fake_mode` the copy shares the parameters (which a forward does
    not write to) and copies the buffers, for a forward that must see values.
    """
    memo = _Memo()
    with copyable(model, memo) as dtypes:
        haunting = _Ghost(model, memo, dtypes, fake_mode, local_shape, device)
        haunting.copy_parameters()
        haunting.copy_what_modules_keep()
        return haunting.copied()


class _Ghost:
    """The making of one copy. `memo`: what a deep copy is to find in the place of what
    it meets; `dtypes`: of parameters, by id, where the copy's are others."""

    def __init__(self, model, memo, dtypes, fake_mode, local_shape, device):
        self.model, self.memo, self.dtypes = model, memo, dtypes
        self.fake_mode, self.device = fake_mode, device
        self.local_shape = local_shape or (lambda name, p: whole_shape(p))

    def copy_parameters(self):
        for name, p in named_parameters(self.model):
            if self.fake_mode is not None:
                data = self.fake(p, self.local_shape(name, p))
            else:
                data = self.whole(p)
            self.memo[id(p)] = nn.Parameter(data, p.requires_grad)

    def fake(self, t, shape=None):
        """A fake tensor for one of the model's."""
        shape = tuple(t.shape) if shape is None else tuple(shape)
        on_meta = self.device is not None and t.device.type == "meta"
        options = {
            "dtype": self.dtypes.get(id(t), t.dtype),
            "device": self.device if on_meta else t.device,
        }
        with self.fake_mode:
            if shape == tuple(t.shape) and t.layout == torch.strided:
                return torch.empty_strided(shape, t.stride(), **options)
            return torch.empty(shape, **options)

    def whole(self, p):
        """A parameter's own values, gathered where it is sharded."""
        real = as_dtensor(p)
        if not isinstance(real, DTensor):
            return p.detach()
        if real.device_mesh.ndim > 1:
            # The ranks of a dp group may be called in different ways, and would wait
            # for each other.
            raise RuntimeError(
                "this call takes a path that was not traced before, through a forward"
                " that reads values; under FSDP it cannot be traced: call the model in"
                " this way once (same arguments, same mode) before fully_shard"
            )
        return real.full_tensor().to(self.dtypes.get(id(p), p.dtype))

    def copy_what_modules_keep(self):
        """Buffers, and other tensors that modules keep; what is not to be copied at
        all."""
        for module in modules(self.model):
            for _, t in tensors(list(vars(module).values())):
                if id(t) not in self.memo:
                    self.memo[id(t)] = (
                        t.detach().clone() if self.fake_mode is None else self.fake(t)
                    )
            for hook in [
                *module._forward_pre_hooks.values(),
                *module._forward_hooks.values(),
            ]:
                if is_ours(hook):  # to be stripped: not copied, with all that they hold
                    owner = getattr(hook, "__self__", hook)
                    self.memo[id(owner)] = owner
        # its forward changes nothing of it but buffers
        for script in scripts(self.model):
            self.memo[id(script)] = script

    def copied(self):
        model = self.model
        try:
            copied = strip(copy.deepcopy(model, self.memo))
            rebind(model, copied, self.memo)
        except Exception as e:
            raise RuntimeError(
                f"{type(model).__name__} cannot be deep-copied, which planning needs so"
                f" that the model itself stays untouched: {e}"
            ) from e
        if stray := self.stray():
            raise StrayParameter(stray)
        unshare(model, copied)
        return copied

    def stray(self):
        """The parameters that the copy met elsewhere than in their modules."""
        own = Counter()
        free = {id(p) for p in parameters(self.model) if not isinstance(p, DTensor)}
        for module in modules(self.model):
            mine = list(map(id, module._parameters.values()))
            own.update(mine)
            if type(module).__setattr__ is not nn.Module.__setattr__:
                # it keeps a list of its own, as nn.LSTM does
                free.difference_update(mine)
        met = self.memo.met
        return [
            name
            for name, p in named_parameters(self.model)
            if id(p) in free and met[id(p)] > own[id(p)]
        ]
