"""Fused weights of which a rank holds a part of each piece: under FSDP2, and in torch's
own distributed checkpoints."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from quintnet_dt import apply_tensor_parallel, fsdp_shard_placement

D, HEADS, EXPERTS = 16, 4, 2


class Block(nn.Module):
    """Weights fused on dim 0 (Phi), on dim 1 (GPT-2), and in experts (Mixtral)."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up = nn.Parameter(torch.randn(D, 2 * 24) * 0.2)
        self.down = nn.Parameter(torch.randn(24, D) * 0.2)
        self.experts_up = nn.Parameter(torch.randn(EXPERTS, 2 * 24, D) * 0.2)
        self.experts_down = nn.Parameter(torch.randn(EXPERTS, D, 24) * 0.2)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = (
            y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        gate, y = (x @ self.up).chunk(2, -1)
        x = x + (F.silu(gate) * y) @ self.down
        for up, down in zip(self.experts_up, self.experts_down):
            gate, y = F.linear(x, up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * y, down)
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(D, 8)

    def forward(self, x):
        return self.head(self.blocks(x))


FUSED = ("qkv.weight", "qkv.bias", "up", "experts_up")
LAYOUTS = {
    "tp4": dict(shape=(4,), pieces=(3, 3, 2, 2)),
    "dp2 x tp2": dict(shape=(2, 2), pieces=(1, 1, 2, 2)),
    "dp2 x tp2, in blocks": dict(shape=(2, 2), contiguous=True, pieces=(1, 1, 1, 1)),
    "dp2 x tp2, on other dims": dict(
        shape=(2, 2), contiguous="vectors", pieces=(3, 1, 2, 2)
    ),
}


def given(seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(4, 6, D, generator=gen, dtype=torch.float64)


def build():
    torch.manual_seed(0)
    return Net().double()


def laid_out(shape, pieces, contiguous=None):
    """The model in a layout, and this rank's part of a batch."""
    model = build()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])
    tp = mesh["tp"] if len(shape) > 1 else mesh
    apply_tensor_parallel(
        model,
        mesh=tp,
        example_inputs=(given(0)[:2],),
        contiguous=contiguous,
        device="H100",
    )
    plan = model.tensor_parallel_plan
    found = tuple(plan[f"blocks.0.{name}"].pieces for name in FUSED)
    assert found == pieces, plan
    if len(shape) == 1:
        return model, slice(None)
    placement = fsdp_shard_placement(model) if contiguous == "vectors" else None
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh["dp"], shard_placement_fn=placement)
    if placement is not None:
        assert model.blocks[0].qkv.weight.placements[0] == Shard(1)
    dp = mesh["dp"].get_local_rank()
    return model, slice(2 * dp, 2 * dp + 2)


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6)


def whole_state(model):
    options = StateDictOptions(full_state_dict=True)
    # what is replicated is the parameter itself
    return copy.deepcopy(get_model_state_dict(model, options=options))


def same(found, expected):
    for key, wanted in expected.items():
        torch.testing.assert_close(
            found[key], wanted, rtol=0, atol=1e-9, msg=lambda text: f"{key}: {text}"
        )


def test_steps_end_where_the_whole_model_does():
    def ranks(rank):
        whole = build()
        reference = adam(whole)
        for i in range(4):
            step(whole, reference, given(i))
        for layout in LAYOUTS.values():
            model, mine = laid_out(**layout)
            optimizer = adam(model)
            for i in range(4):
                step(model, optimizer, given(i)[mine])
            same(whole_state(model), whole.state_dict())

    run_ranks(ranks, 4, timeout=120)


@pytest.mark.parametrize("saved_as", ["tp4", "dp2 x tp2, on other dims"])
def test_torchs_checkpoints_move_between_layouts(saved_as, tmp_path):
    """dcp.save and dcp.load with their default planners: weights, and what AdamW keeps;
    into every layout, and into plain tensors."""

    def ranks(rank):
        model, mine = laid_out(**LAYOUTS[saved_as])
        optimizer = adam(model)
        for i in range(2):
            step(model, optimizer, given(i)[mine])
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(state, checkpoint_id=tmp_path)
        expected = whole_state(model)
        step(model, optimizer, given(9)[mine])
        after = whole_state(model)

        plain = {"model": {k: torch.zeros_like(v) for k, v in expected.items()}}
        dcp.load(plain, checkpoint_id=tmp_path)
        same(plain["model"], expected)

        for layout in LAYOUTS.values():
            model, mine = laid_out(**layout)
            optimizer = adam(model)
            step(model, optimizer, given(5)[mine])  # which is to be forgotten
            state = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer),
            }
            dcp.load(state, checkpoint_id=tmp_path)
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, optimizer, state["optimizer"])
            same(whole_state(model), expected)
            step(model, optimizer, given(9)[mine])
            same(whole_state(model), after)

    run_ranks(ranks, 4, timeout=120)


def test_what_cannot_be_sharded_again_is_told():
    def ranks(rank):
        model = build()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        options = dict(mesh=mesh["tp"], example_inputs=(given(0)[:2],), device="H100")
        apply_tensor_parallel(model, contiguous=False, **options)
        with pytest.raises(ValueError, match='blocks.0.qkv.bias.*contiguous="vectors"'):
            fsdp_shard_placement(model)
        with pytest.raises(ValueError, match="contiguous: expected None, True"):
            apply_tensor_parallel(copy.deepcopy(build()), contiguous="rows", **options)

    run_ranks(ranks, 4)
