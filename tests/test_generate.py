"""Key-value caches: they hold this rank's shards, and generation is the whole model's,
token for token."""

import copy

import pytest
import torch
from helpers import make, same_output
from models import hf
from ranks import run_ranks
from transformers import MistralConfig, MistralForCausalLM

from quintnet_dt import apply_tensor_parallel

SIZES = dict(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
)


def llama(kv=4):
    return hf.llama(**SIZES, num_key_value_heads=kv)


def mistral():
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    return MistralForCausalLM(config)


def gpt2():
    sizes = dict(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return hf.gpt2(**sizes, eos_token_id=1)


def t5():
    sizes = dict(
        vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    return hf.t5(**sizes)


def prompt():
    return torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(4))


def spread(model):
    """Weights so large that the next token depends on every layer."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize(
    "build, n", [(llama, 2), (llama, 4), (mistral, 2), (gpt2, 2), (t5, 2)]
)
def test_generation(build, n):
    ways = [
        dict(),
        dict(num_beams=3),
        dict(do_sample=True),
        dict(cache_implementation="static"),
    ]

    def ranks(rank):
        whole = make(lambda: spread(build()), train=False)
        sharded = apply_tensor_parallel(copy.deepcopy(whole), n)
        ids = prompt()
        for way in ways if n == 2 else ways[:2]:
            found = []
            for model in (sharded, whole):
                torch.manual_seed(5)
                found.append(
                    model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=6,
                        pad_token_id=0,
                        **way,
                    )
                )
            assert torch.equal(*found), (way, found)

    run_ranks(ranks, n)


@pytest.mark.parametrize("n, kv, held", [(2, 4, 2), (4, 4, 1), (2, 1, 1), (4, 2, 2)])
def test_a_cache_holds_the_heads_of_this_rank(n, kv, held):
    """Where key-value heads do not divide, every rank keeps all of them."""

    def ranks(rank):
        whole = make(lambda: spread(llama(kv)), train=False)
        sharded = apply_tensor_parallel(copy.deepcopy(whole), n)
        step = torch.tensor([[3], [4]])
        with torch.no_grad():
            caches = [
                m(prompt(), use_cache=True).past_key_values for m in (sharded, whole)
            ]
            for _ in range(2):
                outputs = [
                    m(step, past_key_values=c) for m, c in zip((sharded, whole), caches)
                ]
                same_output(*(o.logits for o in outputs))
            branch = [copy.deepcopy(c) for c in caches]
            for c in branch:
                c.reorder_cache(torch.tensor([1, 0]))
            same_output(
                *(
                    m(step, past_key_values=c).logits
                    for m, c in zip((sharded, whole), branch)
                )
            )
        assert [layer.keys.shape[1] for layer in caches[0].layers] == [held] * 2

    run_ranks(ranks, n)
