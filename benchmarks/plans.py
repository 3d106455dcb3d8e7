"""Plans of models at the size that people run: what a rank computes, holds and sends.

No weights are allocated (the meta device) and no group is needed. Four layers of each,
2,048 tokens (8 images), 8 ranks; `--tp` and `--layers` change that, names pick some.
"""

import argparse
import time
import warnings
from dataclasses import dataclass, field

import torch
import transformers

from quintnet_dt import plan_tensor_parallel

TOKENS, IMAGES = 2048, 8
DEPTHS = "num_hidden_layers n_layer num_layers num_decoder_layers".split()


@dataclass
class Case:
    """A config of transformers at a published size; `heads`: of its attention."""

    kind: str
    heads: int
    size: dict = field(default_factory=dict)
    task: str = "causal_lm"


CASES = {
    "Llama 3.1 70B": Case(
        "llama",
        64,
        dict(
            hidden_size=8192,
            intermediate_size=28672,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
    ),
    "Mixtral 8x22B": Case(
        "mixtral",
        48,
        dict(
            hidden_size=6144,
            intermediate_size=16384,
            num_attention_heads=48,
            num_key_value_heads=8,
        ),
    ),
    "Qwen3-MoE 235B": Case(
        "qwen3_moe",
        64,
        dict(
            hidden_size=4096,
            moe_intermediate_size=1536,
            num_attention_heads=64,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            vocab_size=151936,
        ),
    ),
    "Qwen3-Next 80B": Case("qwen3_next", 16),  # three of four layers are delta nets
    "GPT-OSS 120B": Case("gpt_oss", 64),
    "DeepSeek-V3": Case("deepseek_v3", 128, dict(first_k_dense_replace=1)),
    "GPT-2 XL": Case("gpt2", 25, dict(n_embd=1600, n_head=25, n_positions=4096)),
    "Phi-4": Case(
        "phi3",
        40,
        dict(
            hidden_size=5120,
            intermediate_size=17920,
            num_attention_heads=40,
            num_key_value_heads=10,
            vocab_size=100352,
            pad_token_id=0,
        ),
    ),
    "Falcon-40B": Case(
        "falcon",
        128,
        dict(
            hidden_size=8192,
            num_attention_heads=128,
            num_kv_heads=8,
            new_decoder_architecture=True,
            vocab_size=65024,
        ),
    ),
    "StarCoder2 3B": Case("starcoder2", 24),
    "BLOOM 7B": Case("bloom", 32, dict(hidden_size=4096, n_head=32, n_layer=30)),
    "BERT": Case("bert", 12, task="masked_lm"),
    "ModernBERT": Case("modernbert", 12, task="masked_lm"),
    "T5": Case("t5", 8, task="seq2seq_lm"),
    "ViT": Case("vit", 12, task="image_cls"),
    "ResNet-50": Case("resnet", 0, task="image_cls"),
}
AUTO = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "seq2seq_lm": transformers.AutoModelForSeq2SeqLM,
    "image_cls": transformers.AutoModelForImageClassification,
}


def build(case, layers):
    config = transformers.AutoConfig.for_model(case.kind, **case.size)
    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(layers, getattr(config, name)))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        return AUTO[case.task].from_config(config)


def inputs(case, model):
    if case.task == "image_cls":
        return {"pixel_values": torch.zeros(IMAGES, 3, 224, 224)}
    longest = getattr(model.config, "max_position_embeddings", None) or TOKENS
    length = min(TOKENS, longest)
    ids = torch.arange(TOKENS).view(-1, length) % 90 + 3
    if case.task == "seq2seq_lm":
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids, **({"use_cache": False} if case.heads else {})}


def megatron(model, tokens, layers, tp, decoders=1.0):
    """Bytes of four all-reduces a layer (https://arxiv.org/abs/1909.08053)."""
    hidden = getattr(model.config, "hidden_size", None) or model.config.d_model
    return 4 * layers * decoders * tokens * hidden * 4 * 2 * (tp - 1) / tp


def row(name, case, tp, layers):
    model = build(case, layers)
    given = inputs(case, model)
    start = time.perf_counter()
    plan = plan_tensor_parallel(model, tp, example_inputs=given, loss_parallel=True)
    seconds, cost = time.perf_counter() - start, plan.cost
    sent = "-"
    if case.task != "image_cls":
        # a decoder with cross attention has six beside its encoder's four
        halves = 2.5 if case.task == "seq2seq_lm" else 1.0
        sent = f"{cost.bytes_sent / megatron(model, TOKENS, layers, tp, halves):.2f}"
    heads = f"{-(-case.heads // tp) / case.heads:.3f}" if case.heads else "-"
    return (
        name,
        heads,
        f"{cost.flops / cost.whole_flops:.3f}",
        f"{cost.activation_bytes / cost.whole_activation_bytes:.2f}",
        f"{plan.share:.3f}",
        sent,
        f"{seconds:.1f}",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES))
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    head = "model", "heads", "FLOPs", "activations", "held", "bytes", "planned in, s"
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in args.names:
        cells = row(name, CASES[name], args.tp, args.layers)
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
