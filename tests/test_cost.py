"""What a plan says that a step costs, against what a step is seen to do."""

import contextlib
import unittest.mock

import pytest
import torch
import torch.distributed as dist
from models.regions import D, ResNet, attention, features, fused_mlp, ids, llama
from ranks import run_ranks
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from quintnet_dt import apply_tensor_parallel, comm_ops, plan_tensor_parallel
from quintnet_dt.devices import DEVICES, DeviceSpec, device_spec


def on_cpu(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


# torch counts attention on GPUs alone.
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: on_cpu}


def to_others(y, x, taken, given):
    """The bytes of an all-to-all that do not stay."""
    stays = given[dist.get_rank()]
    return x.nbytes // max(len(x), 1) * (len(x) - stays)


@contextlib.contextmanager
def sent_bytes(n):
    """The bytes that this rank sends within, in a list, under ring collectives."""
    sent = []

    def tap(owner, name, count):
        real = getattr(owner, name)

        def run(*args, **kwargs):
            sent.append(count(*args))
            return real(*args, **kwargs)

        return unittest.mock.patch.object(owner, name, run)

    share = (n - 1) / n
    with (
        tap(dist, "all_reduce", lambda x, *_: 2 * share * x.nbytes),
        tap(comm_ops, "_gather_flat", lambda y, *_: share * y.nbytes),
        tap(dist, "all_to_all_single", to_others),
    ):
        yield sent


def mlp(*widths):
    layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
    return lambda: nn.Sequential(*[m for x in layers for m in (x, nn.GELU())])


MODELS = {
    "MLP": (mlp(D, 96, D), features(2, 5, D)),
    "MLP of 99": (mlp(D, 99, D), features(2, 5, D)),
    "attention": (attention(), features(2, 5, D)),
    "uneven heads": (attention(heads=5), features(2, 5, D)),
    "gated": (fused_mlp("chunk"), features(2, 5, D)),
    "norms of all heads": (attention(norm="spelled"), features(2, 5, D)),
    "ResNet": (ResNet, features(2, 3, 8, 8)),
    "Llama": (lambda: llama(attn_implementation="eager").eval(), ids(2, 6)),
    "Llama, fused attention": (lambda: llama().eval(), ids(2, 6)),
}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_flops_and_bytes_are_those_of_a_real_step(name, n):
    build, given = MODELS[name]

    def ranks(rank):
        torch.manual_seed(0)
        model, inputs = build(), given()
        # the whole model's, which is not changed
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as whole:
            run(model, inputs)
        apply_tensor_parallel(model, n, example_inputs=inputs)
        cost = model.tensor_parallel_plan.cost
        assert cost.whole_flops == whole.get_total_flops()
        for _ in range(2):  # in the first what is compared is communicated too
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as own:
                out = run(model, inputs)
            with sent_bytes(n) as sent:
                run(model, inputs).square().mean().backward()
        assert rank or cost.flops == own.get_total_flops(), (
            cost,
            own.get_total_flops(),
        )
        assert out.requires_grad
        return cost.bytes_sent, sum(sent)

    counted = run_ranks(ranks, n)
    planned, seen = counted[0][0], [sent for _, sent in counted]
    assert planned == pytest.approx(max(seen), abs=1), (planned, seen)


def run(model, inputs):
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(out, "logits", out)


def test_a_device_by_name_by_itself_and_by_where_the_weights_lie():
    fast = DeviceSpec("own", 1e12, 1e12, 1e12, 1e12, 1e12)
    assert device_spec(fast, "cpu") is fast
    assert device_spec("A100", "cpu") is DEVICES["A100"]
    assert device_spec(None, "cpu") is DEVICES["CPU"]
    assert device_spec(None, "meta") is DEVICES["H100"]
    with pytest.raises(ValueError, match="device: .*H100.*found 'A1000'"):
        device_spec("A1000", "cpu")
    with pytest.raises(TypeError, match="device: .*DeviceSpec.*found 3"):
        device_spec(3, "cpu")


def test_seconds_are_by_the_device():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.ones(8, 64)
    costs = [
        plan_tensor_parallel(model, 2, example_inputs=(x,), device=device).cost
        for device in ("A100", "H100")
    ]
    assert [c.device for c in costs] == ["A100", "H100"]
    assert costs[0].seconds > costs[1].seconds
    assert costs[0].flops == costs[1].flops == costs[0].whole_flops // 2
