"""`load_state_dict` of a split model: whole tensors are placed as its parameters are,
each rank taking its share."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..fsdp import is_fsdp
from ..private import _StridedShard, broadcasting
from ..running.structure import hooks_on
from .chunks import chunks

ELSEWHERE = (
    "what torch.save(model.state_dict()) writes is one rank's own part: load each"
    " rank's own file in the same layout, or use save_checkpoint, or export_safetensors"
    " for the whole model"
)


def place_on_load(module):
    """Register what lets `load_state_dict` take whole tensors for the DTensors of one
    module."""
    there = (
        getattr(hook, "hook", hook)
        for hook in module._load_state_dict_pre_hooks.values()
    )
    if _place not in there:
        module.register_load_state_dict_pre_hook(_place)


def _place(
    module, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
):
    """Replace whole tensors in a state dict by DTensors, for the parameters that a
    module itself holds. Shapes that differ are left to torch, which reports them with
    their keys."""
    for hook in module._load_state_dict_pre_hooks.values():
        # it comes after this one: what a forward left gathered is sharded again
        if is_fsdp(hook):
            hook()
    params = {
        prefix + name: (name, p)
        for name, p in module._parameters.items()
        if isinstance(p, DTensor)
    }
    given = {
        key: state_dict[key]
        for key in params
        if isinstance(state_dict.get(key), torch.Tensor)
    }
    _refuse_broadcast(given, params)
    assign = local_metadata.get("assign_to_params_buffers", False)
    for key, value in given.items():
        name, p = params[key]
        try:
            share = _share(value, p, assign)
        except Exception as e:  # misplaced, on meta, of a layout that has no blocks
            errors.append(f"{key}: {e}")
            share = p  # which stays
        is_new = share is not p and share is not value
        state_dict[key] = _assign(module, name, share) if assign and is_new else share


def _share(value, p, assign):
    """What a parameter gets of a tensor that is given for it."""
    if isinstance(value, DTensor):
        if wrong := _misplaced(value, p, assign):
            raise ValueError(wrong)
        return value
    if value.shape != p.shape and (value.shape != (1,) or p.dim()):
        return value
    try:
        return placed(value.view(p.shape), p, assign)
    except Exception as e:
        raise ValueError(f"its share cannot be taken: {type(e).__name__}: {e}") from e


def placed(whole, like, own_dtype=False):
    """This rank's share of a whole tensor, as a DTensor that is laid out like another
    one; of the whole's dtype, or of the other's."""
    device = like.device_mesh.device_type if like.is_meta and own_dtype else like.device
    dtype = whole.dtype if own_dtype else like.dtype
    share = torch.empty_like(like.detach(), dtype=dtype, device=device)
    if not share.is_meta:
        for block in chunks(share):
            at = tuple(
                slice(o, o + n) for o, n in zip(block.offsets, block.tensor.shape)
            )
            block.tensor.copy_(whole.detach()[at])
    return share


def _assign(module, name, value):
    """Make a tensor the parameter, in all places that hold the one of now: ties stay
    ties."""
    old, hooks = module._parameters[name], hooks_on(module)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    tied = (
        [at for at in hooks.owners.values() if (module, name) in at]
        if hooks is not None
        else []
    )
    for owner, attr in tied[0] if tied else ():
        if owner._parameters.get(attr) is old:
            owner._parameters[attr] = new
    return new


def _misplaced(value, p, assign):
    """What is wrong with a DTensor that is given for a parameter, None where nothing
    is."""
    mesh, own = value.device_mesh, p.device_mesh
    if mesh == own and mesh.get_coordinate() != own.get_coordinate():
        expected = f"expected this rank's part, at {own.get_coordinate()} of its mesh"
        return f"{expected}, found that at {mesh.get_coordinate()}: {ELSEWHERE}"
    if assign and (mesh != own or value.placements != p.placements):
        expected = f"assign=True: expected a whole tensor, or {p.placements} on {own}"
        return f"{expected}, found {value.placements} on {mesh}"
    return None


def _refuse_broadcast(given, params):
    """torch fills `_StridedShard` parameters wrongly from a broadcast and tells
    nobody."""
    # FSDP2's own are not the last
    fused = [k for k in given if isinstance(params[k][1].placements[-1], _StridedShard)]
    if fused and broadcasting():
        raise RuntimeError(
            "set_model_state_dict(broadcast_from_rank0=True) has filled"
            f" {', '.join(fused[:5])} wrongly: torch cannot place fused pieces; use"
            " load_checkpoint or load_safetensors, leave broadcast_from_rank0 out, or"
            " give apply_tensor_parallel contiguous=True"
        )
