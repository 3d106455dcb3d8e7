"""Adapters of peft: added before the split and after it, trained, saved, merged, taken
off."""

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from quintnet_dt import (
    apply_tensor_parallel,
    load_checkpoint,
    save_checkpoint,
    whole_shapes,
)

GPT2 = dict(
    vocab_size=67,
    n_embd=32,
    n_layer=2,
    n_head=8,
    n_positions=16,
    resid_pdrop=0,
    embd_pdrop=0,
    attn_pdrop=0,
)
LLAMA = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
)
MODELS = {
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, num_key_value_heads=4)),
        dict(target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]),
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
        dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    ),
}
IDS = torch.randint(0, 67, (2, 10), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS, "use_cache": False}


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def adapted(model, name):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_dropout=0.0, init_lora_weights=False, **MODELS[name][1]
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).double()


def same(a, b, tol=1e-12):
    a = a.full_tensor() if isinstance(a, DTensor) else a
    assert a.shape == b.shape and (a - b).abs().max() < tol


def split(model):
    return apply_tensor_parallel(model, 2, example_inputs=INPUTS)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters(name, when, tmp_path):
    def ranks(rank):
        whole = adapted(build(name), name)
        if when == "before":
            model = split(adapted(build(name), name))
        else:
            model = split(build(name))
            held = {
                n: e.placement for n, e in model.tensor_parallel_plan.entries.items()
            }
            model(**INPUTS)
            with whole_shapes(model):
                model = adapted(model, name)
            with pytest.raises(RuntimeError, match="the model was changed since"):
                model(**INPUTS)
            split(model)
            for n, placement in held.items():  # what was split stays so
                kept = [
                    p
                    for m, p in model.named_parameters()
                    if m.replace(".base_layer", "").endswith(n)
                ]
                assert kept and kept[0].placements == (placement,)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        trained = [
            [p for p in m.parameters() if p.requires_grad] for m in (model, whole)
        ]
        assert 0 < len(trained[0]) == len(trained[1]) < len(list(whole.parameters()))
        optimizers = [torch.optim.AdamW(p, 1e-2, eps=1e-6) for p in trained]
        for step in range(4):
            for m, params, optimizer in zip((model, whole), trained, optimizers):
                F.cross_entropy(
                    m(**INPUTS).logits.flatten(0, 1), IDS.flatten()
                ).backward()
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step(), optimizer.zero_grad()
            if step == 2:
                save_checkpoint(tmp_path / "c", model, optimizers[0])
        for p, q in zip(model.parameters(), whole.parameters()):
            same(p, q, 1e-9)
        adapters, expected = map(peft.get_peft_model_state_dict, (model, whole))
        assert adapters.keys() == expected.keys()
        for k, x in expected.items():
            same(adapters[k], x, 1e-9)
        model.load_state_dict(model.state_dict())
        load_checkpoint(tmp_path / "c", model, optimizers[0])
        F.cross_entropy(model(**INPUTS).logits.flatten(0, 1), IDS.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained[0], 1.0)
        optimizers[0].step()
        with torch.no_grad():
            with model.disable_adapter(), whole.disable_adapter():
                same(model(**INPUTS).logits, whole(**INPUTS).logits, 1e-9)
            model.merge_adapter(), whole.merge_adapter()
            same(model(**INPUTS).logits, whole(**INPUTS).logits, 1e-9)
            model.unmerge_adapter(), whole.unmerge_adapter()
            merged, expected = model.merge_and_unload(), whole.merge_and_unload()
            for p, q in zip(merged.parameters(), expected.parameters()):
                same(p, q, 1e-9)
            # A module at whose border something was reduced is gone: what is left is
            # shown right anew.
            same(merged(**INPUTS).logits, expected(**INPUTS).logits, 1e-9)
            split(merged)
            same(merged(**INPUTS).logits, expected(**INPUTS).logits, 1e-9)

    run_ranks(ranks, 2)


class Wrapped(nn.Module):
    """A layer, and one beside it: their sum is reduced once, at this module's
    border."""

    def __init__(self, base):
        super().__init__()
        self.base, self.beside = base, nn.Linear(64, 16, bias=False)

    def forward(self, x):
        return self.base(x) + self.beside(x)


def test_a_module_that_is_taken_off_is_missed():
    """What was done at its border would be missing: the forward without it is shown
    right anew."""

    def ranks(rank):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), Wrapped(nn.Linear(64, 16, bias=False))
        ).double()
        x = torch.ones(2, 16, dtype=torch.float64)
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        expected = model(x)
        wrapper, model[2] = model[2], model[2].base
        weight, bias = (p.full_tensor() for p in model[0].parameters())
        whole = F.linear(
            F.relu(F.linear(x, weight, bias)), model[2].weight.full_tensor()
        )
        same(model(x), whole)
        model[2] = wrapper
        same(model(x), expected)
        model[2] = wrapper.base
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        same(model(x), whole)
        with pytest.raises(
            ValueError,
            match="expected a model that is whole, or that this function split",
        ):
            stranger = nn.Sequential(model[0])
            stranger[0] = nn.Linear(4, 4)
            stranger[0].weight = model[0].weight
            apply_tensor_parallel(stranger, 2, example_inputs=(x,))

    run_ranks(ranks, 2)
