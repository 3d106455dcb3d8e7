"""Models whose weights are saved and loaded: of transformers, and one of every dtype;
how they are split, and whether two are the same."""

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from quintnet_dt import apply_tensor_parallel

SIZES = dict(vocab_size=97, num_hidden_layers=1, hidden_size=32, num_attention_heads=4)


def llama(tied=False):
    config = transformers.LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        intermediate_size=44,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tied_llama():
    return llama(tied=True)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=98,
        n_positions=32,
        n_embd=32,
        n_layer=1,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Odd(nn.Module):
    """Every dtype, a number, nothing, a persistent and a passing buffer, sizes that
    ranks do not divide; a fused weight; a convolution."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.f = (
            nn.Linear(12, 36),
            nn.Linear(12, 12, bias=False),
            nn.Linear(12, 13),
        )
        self.conv = nn.Conv1d(13, 8, 3)
        self.scale, self.none = nn.Parameter(torch.tensor([2.5])), nn.Parameter(
            torch.empty(0, 3)
        )
        self.register_buffer("mask", torch.rand(3) > 0.5)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("halves", torch.rand(5, 3).bfloat16())
        self.register_buffer("small", torch.randint(-9, 9, (4, 2), dtype=torch.int8))
        self.register_buffer("passing", torch.arange(3.0), persistent=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, 3)).transpose(1, 2) for t in (q, k, v))
        y = self.f(
            self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
            * self.scale
        )
        return self.conv(y.mT) * self.passing.sum()

    def reset_parameters(self):
        for name, t in [
            *self.named_parameters(recurse=False),
            *self.named_buffers(recurse=False),
        ]:
            t.copy_(torch.arange(3.0) if name == "passing" else torch.zeros(()))


BUILDS = llama, tied_llama, gpt2, Odd


def inputs(build):
    gen = torch.Generator().manual_seed(5)
    if build is Odd:
        return (torch.randn(2, 5, 12, generator=gen),)
    return {"input_ids": torch.randint(0, 90, (2, 8), generator=gen)}


def call(model, build):
    given = inputs(build)
    with torch.no_grad():
        return model(*given) if build is Odd else model(**given).logits


def make(build, seed=0):
    torch.manual_seed(seed)
    return build()


def on_meta(build):
    with torch.device("meta"):
        return build()


def split(model, build, layout):
    """A model on ("tp",) of all ranks, or on ("dp", "tp")."""
    if layout == "tp":
        return apply_tensor_parallel(
            model, dist.get_world_size(), example_inputs=inputs(build)
        )
    if layout == "hsdp":
        mesh = init_device_mesh(
            "cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp")
        )
        apply_tensor_parallel(model, mesh=mesh["tp"], example_inputs=inputs(build))
        return fully_shard(model, mesh=mesh["replicate", "shard"])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    apply_tensor_parallel(model, mesh=mesh["tp"], example_inputs=inputs(build))
    if layout == "fsdp":
        fully_shard(model, mesh=mesh["dp"])
    return model


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def same(model, other, what=""):
    """Bit for bit the same state dict, ties included."""
    mine, its = model.state_dict(), other.state_dict()
    assert list(mine) == list(its)
    for name, t in its.items():
        a, b = whole(mine[name]), whole(t)
        assert a.dtype == b.dtype and a.shape == b.shape, (what, name)
        assert (
            a.flatten().view(torch.uint8).tolist()
            == b.flatten().view(torch.uint8).tolist()
        ), (
            what,
            name,
        )


def written(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def save_alone(folder, model):
    folder.mkdir()
    save_file(
        {n: t.contiguous().clone() for n, t in model.state_dict().items()},
        folder / "any.safetensors",
    )
