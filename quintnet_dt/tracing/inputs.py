"""Example inputs made up for a model that was given none, from its first layer and its
forward's signature.

They have the size of a training step, where a forward on fake tensors takes it; a plan
is made for what is traced. Else they are short.
"""

import inspect

import torch
from torch import nn

from ..parts import modules, parameters

BATCH, LENGTH = 2, 16
# Of a training step: 2,048 tokens in all, and images as most models are made for.
REAL_LENGTH, REAL_IMAGE = 1024, 224
# What a config calls the longest input that its model takes.
LONGEST = (
    "max_position_embeddings n_positions n_ctx max_target_positions"
    " max_source_positions max_sequence_length max_seq_len block_size context_length"
).split()
CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d


def check(example_inputs):
    """`(args, kwargs)` of a user's example inputs: a tuple is positional, a dict
    keyword; else TypeError."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs: expected a tuple (positional arguments of the model's"
        " forward) or a dict (keyword arguments), found"
        f" {type(example_inputs).__name__}; for a single tensor x pass (x,)"
    )


def made_up(model, device, real_size=False):
    """Yield `(args, kwargs)` that may fit the model's forward, likeliest first: ids or
    noise, on `device`; of a training step's size, or small."""
    model = _named(model)
    signature = _Signature(model)
    if signature.first is None:
        yield (), {}
        return
    generator = torch.Generator().manual_seed(0)
    length = _longest(model) if real_size else LENGTH
    for layer in _first_layers(model, image=signature.first.startswith("pixel")):
        for tensor in _inputs_of(layer, model, generator, length, real_size):
            yield signature.call(tensor.to(device))


def _longest(model):
    """How many tokens of a training step's the model takes, as far as its config or an
    attribute tells."""
    places = (getattr(model, "config", None), model)
    told = [getattr(place, name, None) for place in places for name in LONGEST]
    # some positions are kept for padding
    room = [n - LENGTH // 4 for n in told if isinstance(n, int) and n > LENGTH]
    return min([REAL_LENGTH, *room])


def _inputs_of(layer, model, generator, length, real_size):
    """Tensors that a layer may be given, as the first of its model: ids, images,
    features."""
    p = next(layer.parameters())
    if isinstance(layer, nn.Embedding):
        least, most = min(3, layer.num_embeddings - 1), min(layer.num_embeddings, 100)
        yield torch.randint(least, most, (BATCH, length), generator=generator)
        return
    if isinstance(layer, CONVS):
        sizes = [
            [size] * (p.dim() - 2) for size in _image_sizes(model, layer, real_size)
        ]
        shapes = [(BATCH, layer.in_channels, *size) for size in sizes]
    else:
        features = getattr(layer, "in_features", p.shape[-1])
        rows = BATCH * length if real_size else BATCH
        shapes = [(BATCH, length, features), (rows, features)]
    for shape in shapes:
        yield torch.randn(*shape, generator=generator).to(p.dtype)


class _Signature:
    """How a model's forward is given one tensor for all that it requires."""

    def __init__(self, model):
        self.takes = inspect.signature(model.forward).parameters
        names = [p.name for p in _named_parameters(model)]
        required = [
            name
            for name in names
            if self.takes[name].default is inspect.Parameter.empty
        ]
        first = getattr(model, "main_input_name", None)  # Hugging Face's name for it
        if first not in self.takes:
            first = next(iter(required or names), None)
        self.first = first
        self.others = [name for name in required if name != first]

    def call(self, tensor):
        """(args, kwargs) with a tensor as every input."""
        kwargs = {"use_cache": False} if "use_cache" in self.takes else {}
        kwargs |= dict.fromkeys((self.first, *self.others), tensor)
        if "decoder_input_ids" in self.takes and tensor.dtype == torch.int64:
            half = max(tensor.shape[1] // 2, 1)
            kwargs["decoder_input_ids"] = tensor[:, :half].clone()
        positional = [
            name
            for name in (self.first, *self.others)
            if self.takes[name].kind is inspect.Parameter.POSITIONAL_ONLY
        ]
        return tuple(kwargs.pop(name) for name in positional), kwargs


def _named_parameters(model):
    takes = inspect.signature(model.forward).parameters.values()
    return [p for p in takes if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _named(model):
    """The model, or, where its forward names no argument and it holds one module alone,
    which it hands them on to, that one."""
    while not _named_parameters(model) and len(children := list(model.children())) == 1:
        if not inspect.signature(model.forward).parameters or model._parameters:
            break
        model = children[0]
    return model


def _image_sizes(model, layer, real_size):
    size = getattr(getattr(model, "config", None), "image_size", None)
    timm = getattr(model, "pretrained_cfg", None)
    size = timm.get("input_size") if size is None and isinstance(timm, dict) else size
    size = size[-1] if isinstance(size, (tuple, list)) and size else size
    own = [size] if isinstance(size, int) else []
    if not isinstance(layer, nn.Conv2d):
        others = [64, 16]
    else:
        others = [REAL_IMAGE, 64, 32] if real_size else [64, REAL_IMAGE, 32]
    return dict.fromkeys(own + others)


def _first_layers(model, image):
    """The first embedding, convolution and other layer with a weight, in that model's
    order (`image`: conv first)."""
    found = {}
    for module in modules(model):
        has_weight = module._parameters.get("weight") is not None
        if not has_weight and not isinstance(module, nn.MultiheadAttention):
            continue
        kind = "linear"
        if isinstance(module, nn.Embedding):
            kind = "embedding"
        elif isinstance(module, CONVS):
            kind = "conv"
        if kind != "linear" or next(parameters(module), torch.empty(0)).dim() >= 2:
            found.setdefault(kind, module)
    return [
        found[kind] for kind in sorted(found, key=lambda kind: image and kind != "conv")
    ]
