"""Models of transformers, of a few thousand parameters."""

# By name: modules of transformers are imported when a name of theirs is first asked
# for, which is then before the ranks are forked, and not on each.
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def llama(**config):
    sizes = dict(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


def gpt2(dropout=0.1, **config):
    sizes = dict(vocab_size=67, n_embd=32, n_layer=1, n_head=4)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **rates, **config}))


def t5(**config):
    sizes = dict(vocab_size=67, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return T5ForConditionalGeneration(
        T5Config(**{**sizes, "decoder_start_token_id": 0, **config})
    )
