"""Example inputs made up for a model that was given none, from its first layer and its forward's
signature."""

import inspect

import torch
from torch import nn

from ..parts import modules, parameters

BATCH, LENGTH = 2, 16
CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d


def check(example_inputs):
    """`(args, kwargs)` of a user's example inputs: a tuple is positional, a dict keyword; else
    TypeError."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs: expected a tuple (positional arguments of the model's forward) or a dict"
        f" (keyword arguments), found {type(example_inputs).__name__}; for a single tensor x pass"
        " (x,)"
    )


def made_up(model, device):
    """Yield `(args, kwargs)` that may fit the model's forward, likeliest first: small ids or noise,
    on `device`."""
    model = _named(model)
    takes = inspect.signature(model.forward).parameters
    named = _named_parameters(model)
    required = [p.name for p in named if p.default is p.empty]
    options = {"use_cache": False} if "use_cache" in takes else {}
    gen = torch.Generator().manual_seed(0)

    def ids(high, *shape):
        return torch.randint(min(3, high - 1), min(high, 100), shape, generator=gen).to(device)

    def noise(*shape, dtype=None):
        return torch.randn(*shape, generator=gen).to(device, dtype)

    first = getattr(model, "main_input_name", None)  # Hugging Face's name for it
    first = first if first in takes else (required or [p.name for p in named] or [None])[0]
    if first is None:
        yield (), {}
        return
    others = [r for r in required if r != first]

    def call(tensor):
        kwargs = {**options, first: tensor, **{o: tensor for o in others}}
        if "decoder_input_ids" in takes and tensor.dtype == torch.int64:
            kwargs["decoder_input_ids"] = tensor[:, : LENGTH // 2].clone()
        positional = [
            k for k in (first, *others) if takes[k].kind is inspect.Parameter.POSITIONAL_ONLY
        ]
        return tuple(kwargs.pop(k) for k in positional), kwargs

    for layer in _first_layers(model, image=first.startswith("pixel")):
        p = next(layer.parameters())
        if isinstance(layer, nn.Embedding):
            yield call(ids(layer.num_embeddings, BATCH, LENGTH))
        elif isinstance(layer, CONVS):
            for size in _image_sizes(model, layer):
                yield call(noise(BATCH, layer.in_channels, *[size] * (p.dim() - 2), dtype=p.dtype))
        else:
            for shape in (BATCH, LENGTH), (BATCH,):
                yield call(noise(*shape, getattr(layer, "in_features", p.shape[-1]), dtype=p.dtype))


def _named_parameters(model):
    takes = inspect.signature(model.forward).parameters.values()
    return [p for p in takes if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _named(model):
    """The model, or, where its forward names no argument and it holds one module alone, which it
    hands them on to, that one."""
    while not _named_parameters(model) and len(children := list(model.children())) == 1:
        if not inspect.signature(model.forward).parameters or model._parameters:
            break
        model = children[0]
    return model


def _image_sizes(model, layer):
    size, timm = getattr(getattr(model, "config", None), "image_size", None), getattr(
        model, "pretrained_cfg", None
    )
    size = timm.get("input_size") if size is None and isinstance(timm, dict) else size
    size = size[-1] if isinstance(size, (tuple, list)) and size else size
    known = [size] if isinstance(size, int) else []
    return dict.fromkeys(known + ([64, 224, 32] if isinstance(layer, nn.Conv2d) else [64, 16]))


def _first_layers(model, image):
    """The first embedding, convolution and other layer with a weight, in that model's order
    (`image`: conv first)."""
    found = {}
    for module in modules(model):
        if module._parameters.get("weight") is None and not isinstance(
            module, nn.MultiheadAttention
        ):
            continue
        kind = (
            "embedding"
            if isinstance(module, nn.Embedding)
            else "conv" if isinstance(module, CONVS) else "linear"
        )
        if kind != "linear" or next(parameters(module), torch.empty(0)).dim() >= 2:
            found.setdefault(kind, module)
    return [found[kind] for kind in sorted(found, key=lambda kind: image and kind != "conv")]
