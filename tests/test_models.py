"""Real models of transformers, from tiny configs: sharded they compute what they
compute whole."""

import pytest
import torch
import transformers as hf
from helpers import check

# Their norms and softmaxes compute in float32 whatever the model's dtype is.
TOL = 2e-5

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
)
GROUPED = dict(TEXT, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)


def ids(batch=2, length=8):
    return lambda: {
        "input_ids": torch.randint(3, 64, (batch, length)),
        "use_cache": False,
    }


def masked():
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    return {
        "input_ids": torch.randint(3, 64, (2, 8)),
        "attention_mask": mask,
        "use_cache": False,
    }


def labels():
    x = torch.randint(3, 64, (2, 8))
    return {"input_ids": x, "labels": x, "use_cache": False}


DECODERS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**GROUPED, tie_word_embeddings=True)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**GROUPED, sliding_window=4)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**TEXT, hidden_dropout=0.1)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**GROUPED, num_local_experts=4, experts_implementation="eager")
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(**TEXT, num_key_value_heads=2, pad_token_id=0)
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    def then(sharded, whole):
        """With a KV cache, step by step."""
        sharded.eval(), whole.eval()
        x = torch.randint(3, 64, (1, 4), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            tokens = [
                m.generate(
                    x,
                    max_new_tokens=3,
                    do_sample=False,
                    pad_token_id=0,
                    use_cache=False,
                )
                for m in (sharded, whole)
            ]
        assert torch.equal(*tokens)

    share = 0.62 if name not in ("gpt2", "phi3") else 0.75
    check(
        DECODERS[name],
        ids(),
        2,
        tol=TOL,
        calls=[masked, labels],
        share=share,
        then=then,
    )


def test_attention_weights_were_not_traced():
    def attentions():
        return {**ids()(), "output_attentions": True, "output_hidden_states": True}

    def build():
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(**GROUPED, attn_implementation="eager")
        )

    check(build, ids(), 2, tol=TOL, calls=[attentions])


def test_bert():
    def build():
        return hf.BertForMaskedLM(hf.BertConfig(**TEXT, max_position_embeddings=32))

    def given():
        return {
            "input_ids": torch.randint(3, 64, (2, 8)),
            "token_type_ids": torch.randint(0, 2, (2, 8)),
        }

    check(
        build,
        lambda: {"input_ids": torch.randint(3, 64, (2, 8))},
        2,
        tol=TOL,
        calls=[given],
        share=0.65,
    )


def test_t5():
    def build():
        return hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=64,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=1,
                num_heads=4,
                decoder_start_token_id=0,
            )
        )

    def given():
        x = torch.randint(3, 64, (2, 8))
        return {"input_ids": x, "labels": x[:, :5].contiguous(), "use_cache": False}

    check(build, given, 2, tol=TOL, share=0.6, calls=[given])


@pytest.mark.parametrize("train", [True, False])
def test_vit(train):
    def build():
        config = {k: v for k, v in TEXT.items() if k != "vocab_size"}
        return hf.ViTForImageClassification(
            hf.ViTConfig(**config, image_size=16, patch_size=4, num_labels=5)
        )

    check(
        build,
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16)},
        2,
        tol=TOL,
        train=train,
        share=0.65,
    )
