"""What a checkpoint holds of a model and its optimizer, and whether those to fill are
alike."""

import io
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..utils import tensors
from .dcp import Blocks


def name_of(path):
    return ".".join(path)


def plain(model):
    """The module behind torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def model_state(model):
    """(tensors, other objects) by name. FSDP2 reshards here, so that the model's
    parameters are then its shards."""
    state = plain(model).state_dict()
    found = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if meta := [k for k, v in found.items() if v.device.type == "meta"]:
        raise ValueError(
            f"{', '.join(meta[:5])}: expected storage, found the meta device:"
            " materialize the model first"
        )
    return found, {k: v for k, v in state.items() if k not in found}


def collect(model, optimizer):
    """(Blocks by path, the rest) of a model and its optimizer."""
    found, objects = model_state(model)
    blocks = {("model", name): Blocks.of(t) for name, t in found.items()}
    rest = {"objects": objects, "optimizer": None}
    if optimizer is not None:
        names = names_of(model, optimizer)
        state = {}
        for p, values in optimizer.state.items():
            name = names[id(p)]
            _check_shapes(optimizer, name, p, values)
            held = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
            blocks |= {
                ("optimizer", "state", name, k): Blocks.of(v) for k, v in held.items()
            }
            state[name] = values | dict.fromkeys(held)
        groups = [
            {**g, "params": [names[id(p)] for p in g["params"]]}
            for g in optimizer.param_groups
        ]
        rest["optimizer"] = {"state": state, "groups": groups}
    return blocks, rest


def _check_shapes(optimizer, name, p, values):
    """What an optimizer keeps as DTensors lies as the parameter does."""
    for k, v in values.items():
        if isinstance(v, DTensor) and v.shape != p.shape:
            raise ValueError(
                f"{type(optimizer).__name__}: expected a state of the parameter's"
                f" shape, found {k} of shape {tuple(v.shape)} for {name} of shape"
                f" {tuple(p.shape)}"
            )


def nested(blocks):
    """{path: x} as dicts in one another."""
    found = {}
    for path, x in blocks.items():
        at = found
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = x
    return found


def names_of(model, optimizer):
    """id of each parameter of an optimizer -> its name in the model."""
    names = {id(p): name for name, p in plain(model).named_parameters()}
    if any(id(p) not in names for g in optimizer.param_groups for p in g["params"]):
        expected = (
            "expected an optimizer of the model's parameters, found one with others"
        )
        raise ValueError(
            f"{type(optimizer).__name__}: {expected}: make it after"
            " apply_tensor_parallel and fully_shard"
        )
    return names


def packed(state):
    """`state` as bytes that torch.load reads without running code."""
    if any(isinstance(t, DTensor) for _, t in tensors(state["extra"])):
        raise TypeError(
            "extra: expected whole tensors, found a DTensor: save what is sharded in a"
            " checkpoint of its own"
        )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except UnpicklingError as e:
        raise TypeError(
            "extra, or the state of a module or optimizer: expected numbers, strings,"
            f" tensors, lists and dicts, found something else: {e}"
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
        raise ValueError(
            "\n  ".join([f"{path} does not fit the model:", *wrong[:20], *more])
        )


def _size_of(entry):
    """(shape, dtype) of an entry of the index."""
    if not isinstance(entry, TensorStorageMetadata):
        return (), type(entry).__name__
    return entry.size, entry.properties.dtype


class ToFill(NamedTuple):
    """What is read for an optimizer: the tensors by their names in the checkpoint, the
    state that holds them, and the options of each group."""

    blocks: dict[str, Blocks]
    state: dict[torch.Tensor, dict]
    groups: list[dict]


def optimizer_to_fill(path, model, optimizer, saved, kept) -> ToFill:
    """What an optimizer gets from a checkpoint. `kept`: of its state what is no
    tensor."""
    if kept is None:
        raise ValueError(
            f"{path}: expected a checkpoint with an optimizer, found one without"
        )
    names, options = names_of(model, optimizer), {
        n: g for g in kept["groups"] for n in g["params"]
    }
    mine = {names[id(p)] for g in optimizer.param_groups for p in g["params"]}
    if mine != options.keys():
        differ = ", ".join(sorted(mine ^ options.keys())[:5])
        raise ValueError(
            f"{path}: expected an optimizer of the same parameters, found one that"
            f" differs in {differ}"
        )
    made = ToFill({}, {}, [])
    for group in optimizer.param_groups:
        group_names = [names[id(p)] for p in group["params"]]
        made.groups.append(_options_of(path, [options[name] for name in group_names]))
        for p, name in zip(group["params"], group_names):
            _fill_state(made, p, name, kept["state"].get(name, {}), saved)
    return made


def _options_of(path, groups):
    """The options of a group, whose parameters were in these groups."""
    found = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    if any(options != found[0] for options in found):
        raise ValueError(
            f"{path}: expected the parameters of one group to have been in groups"
            f" alike: {found[0]}"
        )
    return found[0] if found else {}


def _fill_state(made, p, name, values, saved):
    """The state of one parameter, with tensors to be filled."""
    for key, value in values.items():
        saved_name = name_of(("optimizer", "state", name, key))
        if value is None and saved_name in saved:
            value = _empty(p, key, saved[saved_name], made.groups[-1])
            made.blocks[saved_name] = Blocks.of(value)
        made.state.setdefault(p, {})[key] = value


def _empty(p, key, like, options):
    """A tensor of a parameter's state, to be filled: laid out as the parameter, or a
    scalar where torch.optim keeps it."""
    dtype = like.properties.dtype
    if like.size == p.shape and key != "step":
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    device = p.device if options.get("capturable") or options.get("fused") else "cpu"
    return torch.zeros(like.size, dtype=dtype, device=device)
