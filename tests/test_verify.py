"""verify_tensor_parallel: finds faults that are seeded into a split model, names the
module, and never hangs."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from models import gpt, hf
from ranks import alone, run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from quintnet_dt import (
    apply_tensor_parallel,
    register_axis_rule,
    verification,
    verify_tensor_parallel,
)
from quintnet_dt.axes.action import ADD_ONCE
from quintnet_dt.axes.rules import RULES
from quintnet_dt.running import call_program, on_shard
from quintnet_dt.running.actions import ACTIONS
from quintnet_dt.running.structure import hooks_on

N = 2


def verify(model, given=None, fault=None, n=N, **options):
    """The report of n ranks on which a model is verified, `fault(split model, rank)`
    being done to it before its step."""

    def ranks(rank):
        split = verification.apply_tensor_parallel

        def faulty(whole, **options):
            split(whole, **options)
            if fault is not None:
                with torch.no_grad():
                    fault(whole, rank)

        verification.apply_tensor_parallel = faulty
        inputs = given and given()
        return verify_tensor_parallel(model, n, example_inputs=inputs, **options)

    first, *others = run_ranks(ranks, n)
    assert all(report == first for report in others)
    return first


def local(model, name):
    return model.get_parameter(name).to_local()


# ------------------------------------------------------------------ what is right


@pytest.mark.parametrize(
    "model, options",
    [
        (lambda: gpt.GPT(dropout=0.1, norm=True, tied=True), {}),
        (gpt.ConvNet, dict(dtype=None)),
        (lambda: gpt.GPT(kv_heads=2), dict(n=4)),
        (lambda: hf.gpt2(), dict(optimizer=torch.optim.AdamW)),
        (lambda: gpt.GPT().requires_grad_(False), dict(dtype=torch.bfloat16)),
    ],
    ids=["gpt", "conv", "grouped", "gpt2", "frozen"],
)
def test_what_is_right_is_found_so(model, options):
    report = verify(model, **options)
    assert report.ok, report
    assert "computes what the whole model does" in str(report)
    outputs, gradients, buffers, parameters = report.compared
    frozen = "dtype" in options and options["dtype"] is not None
    assert (gradients.count == 0) is frozen
    assert parameters.count == len(list(model().parameters()))
    assert buffers.count == len(list(model().buffers()))


def test_the_model_stays_as_it_is():
    def ranks(rank):
        x = torch.randn(2, 16)
        torch.manual_seed(rank)  # its values are its own
        model = gpt.mlp()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        state = torch.get_rng_state()
        report = verify_tensor_parallel(model, N, example_inputs=(x,))
        assert report.ok, report
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())

    run_ranks(ranks, N)


def test_a_plan_of_the_users():
    plan = {"0.weight": Replicate()}
    report = verify(gpt.mlp, lambda: (torch.randn(2, 16),), plan=plan)
    assert report.ok


# ------------------------------------------------------------------------ faults


def test_a_contiguous_split_of_fused_qkv():
    whole = torch.randn(96, 32, dtype=torch.float64)

    def fault(model, rank):
        local(model, "qkv.weight").copy_(whole.chunk(N)[rank])

    def model():
        attention = gpt.FusedAttention()
        attention.qkv.weight = nn.Parameter(whole.float())
        return attention

    whole = whole.float().double()
    report = verify(model, lambda: (torch.randn(2, 6, 32),), fault)
    assert not report.ok and report.first_output.module == "qkv", report


def test_a_missing_reduction_of_a_norms_gradient():
    def fault(model, rank):
        norm = hooks_on(model.get_submodule("blocks.1.attn.q_norm"))
        norm.program.params["blocks.1.attn.q_norm.weight"] = ()
        norm.params.take(norm.program)

    ids = gpt.ids(64, 2, 6)
    report = verify(lambda: gpt.GPT(norm=True, layers=2), ids, fault)
    assert report.first_output is None
    assert report.first_gradient.module == "blocks.1.attn.q_norm", report
    assert "blocks.1.attn.q_norm.weight" in str(report)
    wrong = [d.name for d in report.compared[1].differences]
    assert wrong == ["blocks.1.attn.q_norm.weight"]


def test_a_row_bias_added_by_every_rank(monkeypatch):
    monkeypatch.setitem(ACTIONS, ADD_ONCE, lambda x, split, group: x)
    report = verify(gpt.GPT)
    assert report.first_output.module == "blocks.0.attn.o", report


def test_two_heads_swapped():
    def fault(model, rank):
        weight = local(model, "blocks.1.attn.q.weight")
        weight.copy_(torch.cat([weight[8:], weight[:8]]))

    report = verify(lambda: gpt.GPT(layers=2), fault=fault)
    assert report.first_output.module == "blocks.1.attn.q", report
    # heads differ in what comes after them too
    assert report.first_gradient is not None


def test_a_dropout_mask_shared_by_the_ranks(monkeypatch):
    def masked(context, action, order, func, x, *rest, **kwargs):
        return func(x, *rest, **kwargs)

    monkeypatch.setattr(on_shard, "_drop_out", masked)
    report = verify(lambda: gpt.GPT(dropout=0.5))
    assert report.first_output.module == "blocks.0.attn.dropout", report


class CutByNumbers(nn.Module):
    """Attention whose q, k and v a loop cuts out of a fused projection."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        fused = self.qkv(x)
        q, k, v = (fused[..., i * 32 : (i + 1) * 32] for i in range(3))
        q, k, v = (x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in (q, k, v))
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LayerNorm(32), CutByNumbers())


def test_a_wrong_slice_of_heads(monkeypatch):
    right = call_program._arguments

    def wrong(call, *given):
        """Of the keys', the bounds as the code has them, which fit a shard too."""
        keys = {b.given for b in call.bounds.values()} == {32, 64}
        call = replace(call, bounds={}) if keys and shown(given[0]) else call
        return right(call, *given)

    def shown(frame):
        return isinstance(frame.context.group, dist.ProcessGroup)

    monkeypatch.setattr(call_program, "_arguments", wrong)
    report = verify(Block, lambda: (torch.randn(2, 6, 32),))
    assert report.first_output.module in ("1", "1.out"), report


@pytest.fixture
def wrong_rule():
    """An operator whose rule says that it does the same at each place, which it does
    not."""
    kept = dict(RULES)
    library = torch.library.Library("verified", "DEF")
    library.define("normed(Tensor x) -> Tensor")
    library.impl("normed", lambda x: x.softmax(-1), "CompositeExplicitAutograd")
    register_axis_rule("verified::normed", "t a -> t a")
    yield
    RULES.clear()
    RULES.update(kept)


class Normed(nn.Module):
    def forward(self, x):
        return torch.ops.verified.normed(x)


def frozen():
    model = nn.Sequential(nn.Linear(16, 64), Normed(), nn.Linear(64, 16))
    return model.requires_grad_(False)


def test_a_wrong_rule_names_the_module_that_calls_the_operator(wrong_rule):
    report = verify(frozen, lambda: (torch.randn(8, 16),))
    assert report.first_output.module == "1", report


def test_apply_raises_where_the_split_is_wrong_and_leaves_the_model_whole(wrong_rule):
    def ranks(rank):
        model = frozen()
        with pytest.raises(RuntimeError, match="stays whole.*is wrong") as e:
            x = torch.randn(8, 16)
            apply_tensor_parallel(model, N, example_inputs=(x,), verify=True)
        assert "first output that differs: 1" in str(e.value)
        assert not any(isinstance(p, DTensor) for p in model.parameters())

    run_ranks(ranks, N)


def test_apply_splits_what_is_right():
    def ranks(rank):
        model = gpt.GPT(dropout=0.1)
        state = torch.get_rng_state()
        apply_tensor_parallel(model, N, verify=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert next(model.parameters()).dtype == torch.float32
        assert all(p.grad is None for p in model.parameters())

    run_ranks(ranks, N)


# ------------------------------------------- processes of its own; what is refused


def raises_on_rank_1(output):
    """A loss that one rank fails to compute of the split model, when the others go on
    into its backward."""
    raises_on_rank_1.calls += 1
    if raises_on_rank_1.calls == 2 and dist.get_rank() == 1:
        raise ArithmeticError("this rank alone")
    return output.sum()


raises_on_rank_1.calls = 0


def test_it_starts_processes_where_no_launcher_did():
    def from_a_script():
        x = torch.randn(4, 16)
        found = verify_tensor_parallel(gpt.mlp(), N, example_inputs=(x,))
        assert found.ok, found
        assert not dist.is_initialized()

    alone(from_a_script, timeout=300)


def test_an_error_on_one_rank_alone_reaches_the_caller():
    def from_a_script():
        x, loss = torch.randn(4, 16), raises_on_rank_1
        with pytest.raises(RuntimeError, match="rank 1 raised") as e:
            verify_tensor_parallel(gpt.mlp, N, example_inputs=(x,), loss=loss)
        assert "ArithmeticError: this rank alone" in str(e.value)

    alone(from_a_script, timeout=300)


def test_what_cannot_be_sent_to_a_process_is_said():
    model = gpt.mlp()
    model.made_here = lambda: None
    with pytest.raises(TypeError, match="model: expected.*Sequential.*a factory"):
        verify_tensor_parallel(model, N)
    with pytest.raises(TypeError, match="loss: expected.*function"):
        verify_tensor_parallel(gpt.mlp, N, loss=lambda output: output.sum())


@pytest.mark.parametrize(
    "model, options, error",
    [
        (lambda: gpt.mlp().to("meta"), {}, "0.weight: .*found one on the meta device"),
        (gpt.mlp, dict(dtype=torch.int64), "dtype: expected None or one of"),
        (lambda: 3, {}, "model: expected an nn.Module, found int"),
        (lambda: nn.Bilinear(3, 4, 5), {}, "expected example_inputs"),
    ],
    ids=["meta", "dtype", "no model", "no inputs"],
)
def test_what_is_refused(model, options, error):
    def ranks(rank):
        with pytest.raises((TypeError, ValueError), match=error):
            verify_tensor_parallel(model, 1, **options)

    run_ranks(ranks, 1)
