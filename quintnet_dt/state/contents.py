"""What a checkpoint holds of a model and its optimizer, and whether those to fill are alike."""

import io
from pickle import UnpicklingError

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..utils import tensors
from .chunks import Chunk
from .dcp import Item


def name_of(path):
    return ".".join(path)


def plain(model):
    """The module behind torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def model_state(model):
    """(tensors, other objects) by name. FSDP2 reshards here, so that the model's parameters are
    then its shards."""
    state = plain(model).state_dict()
    found = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if meta := [k for k, v in found.items() if v.device.type == "meta"]:
        raise ValueError(
            f"{', '.join(meta[:5])}: expected storage, found the meta device: materialize the model"
            " first"
        )
    return found, {k: v for k, v in state.items() if k not in found}


def collect(model, optimizer):
    """(Items by name, the rest) of a model and its optimizer."""
    found, objects = model_state(model)
    found = {("model", k): t for k, t in found.items()}
    rest = {"objects": objects, "optimizer": None}
    if optimizer is not None:
        names, state = names_of(model, optimizer), {}
        for p, values in optimizer.state.items():
            kept = state[names[id(p)]] = {}
            for k, v in values.items():
                kept[k] = None if isinstance(v, torch.Tensor) else v
                if isinstance(v, torch.Tensor):
                    found["optimizer", "state", names[id(p)], k] = v
                if isinstance(v, DTensor) and v.shape != p.shape:
                    what = (
                        f"{k} of shape {tuple(v.shape)} for {names[id(p)]} of shape"
                        f" {tuple(p.shape)}"
                    )
                    raise ValueError(
                        f"{type(optimizer).__name__}: expected a state of the parameter's shape,"
                        f" found {what}"
                    )
        groups = [
            {**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups
        ]
        rest["optimizer"] = {"state": state, "groups": groups}
    return {name_of(path): Item.of(path, t) for path, t in found.items()}, rest


def names_of(model, optimizer):
    """id of each parameter of an optimizer -> its name in the model."""
    names = {id(p): name for name, p in plain(model).named_parameters()}
    if any(id(p) not in names for g in optimizer.param_groups for p in g["params"]):
        expected = "expected an optimizer of the model's parameters, found one with others"
        raise ValueError(
            f"{type(optimizer).__name__}: {expected}: make it after apply_tensor_parallel and"
            " fully_shard"
        )
    return names


def copied(chunk):
    return Chunk(chunk.offsets, chunk.tensor.to("cpu", copy=True))


def packed(state):
    """`state` as bytes that torch.load reads without running code."""
    if any(isinstance(t, DTensor) for _, t in tensors(state["extra"])):
        raise TypeError(
            "extra: expected whole tensors, found a DTensor: save what is sharded in a checkpoint"
            " of its own"
        )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except UnpicklingError as e:
        raise TypeError(
            "extra, or the state of a module or optimizer: expected numbers, strings, tensors,"
            f" lists and dicts, found something else: {e}"
        ) from e
    return buffer.getvalue()


# ---- what is filled


def check_fit(path, items, saved, names):
    """Names, shapes and dtypes of a model and a checkpoint agree."""
    wrong = [f"{n}: not in the checkpoint" for n in items if n not in names]
    wrong += [f"{n}: not in the model" for n in sorted(names) if n not in items]
    for n, item in items.items():
        if n in names:
            mine, theirs = (item.shape, item.dtype), _size_of(saved[n])
            if mine != theirs:
                (a, b), (c, d) = mine, theirs
                wrong.append(f"{n}: expected {tuple(a)} {b}, found {tuple(c)} {d}")
    if wrong:
        more = [f"and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise ValueError("\n  ".join([f"{path} does not fit the model:", *wrong[:20], *more]))


def _size_of(entry):
    """(shape, dtype) of an entry of the index."""
    if not isinstance(entry, TensorStorageMetadata):
        return (), type(entry).__name__
    return entry.size, entry.properties.dtype


def optimizer_to_fill(path, model, optimizer, saved, kept):
    """(Items, the state to fill, the options of each group) for an optimizer."""
    if kept is None:
        raise ValueError(f"{path}: expected a checkpoint with an optimizer, found one without")
    names, options = names_of(model, optimizer), {n: g for g in kept["groups"] for n in g["params"]}
    mine = {names[id(p)] for g in optimizer.param_groups for p in g["params"]}
    if mine != options.keys():
        differ = ", ".join(sorted(mine ^ options.keys())[:5])
        raise ValueError(
            f"{path}: expected an optimizer of the same parameters, found one that differs in"
            f" {differ}"
        )
    items, state, groups = {}, {}, []
    for group in optimizer.param_groups:
        found = [
            {k: v for k, v in options[names[id(p)]].items() if k != "params"}
            for p in group["params"]
        ]
        if any(f != found[0] for f in found):
            raise ValueError(
                f"{path}: expected the parameters of one group to have been in groups alike:"
                f" {found[0]}"
            )
        groups.append(found[0] if found else {})
        for p in group["params"]:
            name = names[id(p)]
            for k, value in kept["state"].get(name, {}).items():
                at = ("optimizer", "state", name, k)
                if value is None and name_of(at) in saved:
                    value = _empty(p, k, saved[name_of(at)], groups[-1])
                    items[name_of(at)] = Item.of(at, value)
                state.setdefault(p, {})[k] = value
    return items, state, groups


def _empty(p, key, like, options):
    """A tensor of a parameter's state, to be filled: laid out as the parameter, or a scalar where
    torch.optim keeps it."""
    dtype = like.properties.dtype
    if like.size == p.shape and key != "step":
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    device = p.device if options.get("capturable") or options.get("fused") else "cpu"
    return torch.zeros(like.size, dtype=dtype, device=device)
