"""Modules of torch.nn in training, in eval and under inference mode, many to a
launch."""

import copy

import torch
from helpers import close, compare, double, pair, run, same_output, share_of
from ranks import run_ranks
from torch import nn

randn = torch.randn
causal = nn.Transformer.generate_square_subsequent_mask


def check_all(cases, n=2, modes=("train", "eval"), share=None):
    """One launch for many models, (build, inputs of calls, ...): training with
    gradients; in eval mode under no_grad, the first call with gradients and under
    inference_mode too."""

    def ranks(rank):
        for name, (build, *calls) in cases.items():
            for mode in modes:
                torch.manual_seed(3)
                given = [double(f()) for f in calls]
                sharded = None
                try:
                    sharded, whole = pair(
                        build,
                        n,
                        mode == "train",
                        example_inputs=copy.deepcopy(given[0]),
                    )
                    assert (
                        share is None or share_of(sharded) <= share
                    ), f"holds {share_of(sharded):.1%}"
                    for i, x in enumerate(given):
                        if mode == "train" or i == 0:
                            compare(sharded, whole, x)
                        if mode == "eval":
                            compare(sharded, whole, x, grad=False)
                    if mode == "eval":
                        with torch.inference_mode():
                            same_output(run(sharded, given[0]), run(whole, given[0]))
                    for (p_name, p), q in zip(
                        sharded.named_parameters(), whole.parameters()
                    ):
                        # a forward may write to it (max_norm)
                        close(p.detach().full_tensor(), q.detach(), p_name)
                except Exception as error:
                    error.add_note(
                        f"{name},"
                        f" {mode}\n{getattr(sharded, 'tensor_parallel_plan', None)}"
                    )
                    raise

    run_ranks(ranks, n, timeout=120)


def encoder(layers=1, norm=None, width=32, heads=4, **options):
    layer = nn.TransformerEncoderLayer(
        width, heads, 2 * width, **{"batch_first": True, **options}
    )
    return lambda: nn.TransformerEncoder(
        layer, layers, norm=nn.LayerNorm(width) if norm else None
    )


def padding(batch, length):
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


def left_padding(batch, length):
    return padding(batch, length).flip(1)


def same(*shape):
    """One tensor as query, key and value."""
    x = randn(*shape, dtype=torch.float64)
    return x, x, x
