"""plan.to_code(): the plan as plain PyTorch runs, and computes what the whole model
does."""

import black
import torch
from helpers import double, loss_of, make, run
from models import gpt, hf
from ranks import run_ranks
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from quintnet_dt import TensorParallelPlan, plan_tensor_parallel


def parallelize(code):
    """The function that the code defines."""
    names = {}
    exec(code, names)
    return names["parallelize"]


def check_code(build, given, n=2, sharded=None):
    """On n ranks, a model split by its plan's code has the whole one's outputs and
    gradients; the code."""
    torch.manual_seed(3)
    inputs = double(given())
    code = plan_tensor_parallel(make(build), n, example_inputs=inputs).to_code()
    assert black.format_str(code, mode=black.Mode()) == code

    def ranks(rank):
        whole, model = make(build), make(build)
        parallelize(code)(model, init_device_mesh("cpu", (n,)))
        split = {k for k, p in model.named_parameters() if isinstance(p, DTensor)}
        expected, found = run(whole, inputs), run(model, inputs)
        loss_of(expected).backward()
        loss_of(found).backward()
        assert abs(loss_of(found) - loss_of(expected)) < 1e-9 * abs(loss_of(expected))
        largest = max(p.grad.abs().max() for p in whole.parameters())
        there = dict(model.named_parameters())
        assert there.keys() == dict(whole.named_parameters()).keys()
        for name, p in whole.named_parameters():
            grad = there[name].grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert (grad - p.grad).abs().max() < 1e-9 * largest, name
        return split

    assert run_ranks(ranks, n)[0] >= set(sharded or ())
    return code


def tokens():
    return {"input_ids": torch.randint(0, 60, (2, 6)), "use_cache": False}


def test_a_llama():
    def build():
        return hf.llama(tie_word_embeddings=True, num_hidden_layers=2)

    code = check_code(build, tokens, sharded=["model.layers.1.self_attn.q_proj.weight"])
    assert '"model.layers.*.self_attn.k_proj": ColwiseParallel(),' in code
    assert '"model.layers.*.mlp.down_proj": RowwiseParallel(),' in code
    assert '"lm_head.weight": "model.embed_tokens.weight",' in code


def test_an_mlp():
    code = check_code(gpt.mlp, gpt.features(4, 16), sharded=["0.weight", "0.bias"])
    assert '"0": ColwiseParallel(),\n    "2": RowwiseParallel(),' in code
    assert "#" not in code and "tied" not in code


def test_norms_of_heads_have_their_gradients_summed():
    def build():
        return gpt.Attention(norm=True)

    code = check_code(build, gpt.features(2, 6, 32), sharded=["q.weight"])
    assert 'summed = [\n    "k_norm.weight",\n    "q_norm.weight",\n]' in code


def test_what_torchs_styles_cannot_do_is_said():
    def build():
        return gpt.GPT(style="fixed", layers=2)

    code = check_code(build, gpt.ids(64, 2, 6))
    # views with the number of heads in them
    assert "# blocks.*.attn.q.weight: completed at once" in code
    assert '"blocks.*.mlp.0": ColwiseParallel(),' in code
    fused = check_code(lambda: gpt.FusedAttention(), gpt.features(2, 6, 32))
    assert "# qkv.weight: fused pieces" in fused


def test_uneven_parts_and_convolutions_stay_whole():
    uneven = check_code(lambda: gpt.mlp(d=15, h=33), gpt.features(4, 15))
    assert "unequal parts" in uneven
    whole_input = check_code(lambda: gpt.mlp(h=33), gpt.features(4, 16))
    assert '"0": RowwiseParallel(input_layouts=Replicate()),' in whole_input
    conv = check_code(
        lambda: gpt.ConvNet(nn.Identity), lambda: (torch.randn(2, 3, 8, 8),)
    )
    assert "# c1.weight: not used by an nn.Linear or nn.Embedding alone" in conv


def test_a_plan_that_was_edited_or_read_back():
    plan = plan_tensor_parallel(gpt.mlp(), 2, example_inputs=(torch.randn(4, 16),))
    assert TensorParallelPlan.from_json(plan.to_json()).to_code() == plan.to_code()
    plan["2.weight"] = Shard(0)
    code = plan.to_code()
    assert '"0": ColwiseParallel(output_layouts=Replicate()),' in code
    assert '"2": ColwiseParallel(output_layouts=Replicate()),' in code
