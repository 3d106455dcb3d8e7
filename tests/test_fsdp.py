"""Training as it is done, on tp and on dp x tp meshes (FSDP2): twenty steps of AdamW
with clipping end where the whole model does."""

import copy
from math import prod

import pytest
import torch
import torch.nn.functional as F
from models import hf
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import ResNetConfig, ResNetForImageClassification

from quintnet_dt import apply_tensor_parallel

MESHES = {
    "tp2": ((2,), ("tp",)),
    "tp4": ((4,), ("tp",)),
    "dp2 x tp2": ((2, 2), ("dp", "tp")),
    "hsdp 2 x 1 x 2": ((2, 1, 2), ("replicate", "dp", "tp")),
}


LAYOUTS = {
    "llama": ["tp2", "tp4", "dp2 x tp2"],
    "gpt2": ["tp4", "hsdp 2 x 1 x 2"],
    "t5": ["dp2 x tp2"],
    "resnet": ["tp2", "dp2 x tp2"],
}


def llama():
    return hf.llama(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)


def gpt2():
    return hf.gpt2(dropout=0.0, n_layer=2, n_head=8, n_positions=16)


def t5():
    return hf.t5(d_kv=4, num_layers=2, num_heads=8, dropout_rate=0.0)


def resnet():
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 2],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


def text(name, gen):
    ids = torch.randint(0, 67, (4, 10), generator=gen)
    inputs = (
        {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
        if name == "t5"
        else {"input_ids": ids}
    )
    return {**inputs, "use_cache": False}, torch.randint(0, 67, (4, 10), generator=gen)


def images(name, gen):
    pixels = torch.randn(4, 3, 32, 32, generator=gen, dtype=torch.float64)
    return {"pixel_values": pixels}, torch.randint(0, 10, (4,), generator=gen)


MODELS = {
    "llama": (llama, text, lambda m: m.model.layers),
    "gpt2": (gpt2, text, lambda m: m.transformer.h),
    "t5": (t5, text, lambda m: [*m.encoder.block, *m.decoder.block]),
    "resnet": (resnet, images, lambda m: m.resnet.encoder.stages),
}


def part(x, i, n):
    """The i-th of n parts of a batch."""
    if isinstance(x, dict):
        return {k: part(v, i, n) for k, v in x.items()}
    return x.chunk(n)[i] if torch.is_tensor(x) else x


def backward(model, inputs, labels, scale=1.0):
    logits = model(**inputs).logits
    (F.cross_entropy(logits.flatten(0, -2), labels.flatten()) * scale).backward()


def sharded(name, mesh, reshard=True, **options):
    """The model on a mesh, by blocks under FSDP2 where there is a dp dim."""
    build, data, blocks = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    inputs, _ = data(name, torch.Generator().manual_seed(0))
    apply_tensor_parallel(
        model,
        mesh=mesh["tp"] if mesh.ndim > 1 else mesh,
        example_inputs=inputs,
        **options,
    )
    if mesh.ndim > 1:
        dp = mesh[mesh.mesh_dim_names[:-1]] if mesh.ndim > 2 else mesh["dp"]
        for block in blocks(model):
            fully_shard(block, mesh=dp, reshard_after_forward=reshard)
        fully_shard(model, mesh=dp)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_end_where_the_whole_model_does(name):
    build, data, _ = MODELS[name]

    def ranks(rank, layout):
        shape, names = MESHES[layout]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        model, dp = sharded(name, mesh), mesh.size() // shape[-1]
        mine = rank // shape[-1]
        torch.manual_seed(0)
        whole = build().double()
        optimizer, reference = (
            torch.optim.AdamW(m.parameters(), 1e-3, eps=1e-6) for m in (model, whole)
        )
        for step in range(20):
            inputs, labels = data(name, torch.Generator().manual_seed(step))
            backward(model, part(inputs, mine, dp), part(labels, mine, dp))
            for i in range(dp):
                backward(whole, part(inputs, i, dp), part(labels, i, dp), 1 / dp)
            norms = [
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
                for m in (model, whole)
            ]
            assert abs(norms[0].full_tensor() - norms[1]) < 1e-9 * norms[1], (
                step,
                norms,
            )
            for o in optimizer, reference:
                o.step(), o.zero_grad()
        found = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True)
        )
        for key, p in whole.named_parameters():
            assert (found[key] - p).abs().max() < 1e-9, (
                layout,
                key,
                (found[key] - p).abs().max(),
            )

    for layout in LAYOUTS[name]:
        run_ranks(ranks, prod(MESHES[layout][0]), layout)


def full(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_a_training_loop_does(name):
    """Accumulation without reductions, activation checkpointing, paths that were not
    traced, torch's own state dicts; fused weights among them."""

    def ranks(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        # torch fills pieces wrongly from a broadcast: blocks, for the end of this test
        model = sharded(name, mesh, reshard=name == "llama", contiguous=True)
        mine = rank // 2
        torch.manual_seed(0)
        whole = MODELS[name][0]().double()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, reference = (
            torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, whole)
        )
        for step in range(2):
            batches = [
                text(name, torch.Generator().manual_seed(10 * step + i))
                for i in range(2)
            ]
            for i, (inputs, labels) in enumerate(batches):
                model.set_requires_gradient_sync(i == 1)
                backward(model, part(inputs, mine, 2), part(labels, mine, 2), 0.5)
                for j in range(2):
                    backward(whole, part(inputs, j, 2), part(labels, j, 2), 0.25)
            for o in optimizer, reference:
                o.step(), o.zero_grad()
        found = full(model)
        for key, p in whole.named_parameters():
            assert (found[key] - p).abs().max() < 1e-9, key

        # by itself: no gradients, a mask, another mode
        inputs, labels = text(name, torch.Generator().manual_seed(rank))
        inputs, labels = text(name, torch.Generator().manual_seed(mine))
        mask = torch.ones_like(labels)
        mask[:, :3] = 0
        model.eval(), whole.eval()
        with torch.no_grad():
            a, b = (m(**inputs, attention_mask=mask).logits for m in (model, whole))
        assert (a - b).abs().max() < 1e-9
        model.train(), whole.train()
        model(**part(inputs, mine, 2), labels=part(labels, mine, 2)).loss.backward()
        optimizer.zero_grad()

        state = {k: v + 1 for k, v in found.items()} if rank == 0 else {}
        set_model_state_dict(
            model,
            state,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        after = full(model)
        assert all(torch.equal(after[k], v + 1) for k, v in found.items())

    run_ranks(ranks, 4)


def test_mixed_precision():
    """bf16 computation as the whole model's in bf16, float32 parameters."""

    def ranks(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        torch.manual_seed(0)
        model, whole = llama(), None
        whole = copy.deepcopy(model).bfloat16()
        inputs, labels = text("llama", torch.Generator().manual_seed(0))
        apply_tensor_parallel(model, mesh=mesh["tp"], example_inputs=inputs)
        policy = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.model.layers:
            fully_shard(
                block, mesh=mesh["dp"], mp_policy=MixedPrecisionPolicy(**policy)
            )
        fully_shard(
            model,
            mesh=mesh["dp"],
            mp_policy=MixedPrecisionPolicy(**policy, output_dtype=torch.float32),
        )
        # the second path is traced under FSDP
        for with_labels in {}, {"labels": labels}:
            out, expected = model(**inputs, **with_labels), whole(
                **inputs, **with_labels
            )
            assert out.logits.dtype == torch.float32
            assert (
                out.logits - expected.logits
            ).abs().max() < 0.02 * expected.logits.abs().max()
            F.cross_entropy(out.logits.flatten(0, 1), labels.flatten()).backward()
            F.cross_entropy(
                expected.logits.float().flatten(0, 1), labels.flatten()
            ).backward()
            for (key, p), q in zip(model.named_parameters(), whole.parameters()):
                assert p.dtype == p.grad.dtype == torch.float32
                grad, like = p.grad.full_tensor(), q.grad.float()
                assert (grad - like).norm() < 0.1 * like.norm(), key
            model.zero_grad(), whole.zero_grad()

    run_ranks(ranks, 4)


def test_compiled_blocks():
    def ranks(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = sharded("llama", mesh)
        torch.manual_seed(0)
        whole = llama().double()
        for block in model.model.layers:
            # FSDP2's hooks are not compiled: no fullgraph=True
            block.compile(backend="aot_eager")
        for step in range(2):
            inputs, labels = text("llama", torch.Generator().manual_seed(step))
            backward(model, inputs, labels), backward(whole, inputs, labels)
        for (key, p), q in zip(model.named_parameters(), whole.parameters()):
            assert (p.grad.full_tensor() - q.grad).abs().max() < 1e-12, key
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0

    run_ranks(ranks, 4, timeout=120)
