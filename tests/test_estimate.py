"""What a plan says that a step will take, against what a step takes on real ranks."""

import contextlib
import copy
import pickle
import unittest.mock
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import hf
from models.regions import D, ResNet, attention, features, fused_mlp, ids, llama
from models.torch_modules import encoder
from ranks import own_process, run_ranks
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import Replicate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from quintnet_dt import (
    TensorParallelPlan,
    apply_tensor_parallel,
    comm_ops,
    compare_tp_sizes,
    plan_tensor_parallel,
)
from quintnet_dt.running import context

# --------------------------------------------------------- what a real step takes


class Watch(TorchDispatchMode):
    """The bytes that are in use, beside those of the tensors `known`."""

    def __init__(self, known, held):
        super().__init__()
        self.known = {id(t.untyped_storage()): t.untyped_storage() for t in known}
        self.now = self.peak = 0
        self.add(held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add(tree_iter(out))
        return out

    def add(self, made):
        for t in made:
            if not isinstance(t, torch.Tensor) or hasattr(t, "_spec"):
                continue
            storage = t.untyped_storage()
            key, nbytes = id(storage), storage.nbytes()
            if key not in self.known:
                gone = partial(self.gone, key, nbytes)
                self.known[key] = weakref.ref(storage, gone)
                self.now += nbytes
        self.peak = max(self.peak, self.now)

    def gone(self, key, nbytes, _):
        del self.known[key]
        self.now -= nbytes


@contextlib.contextmanager
def sent(n):
    """(collective, bytes) that this rank sends within, in a list, as rings."""
    log, share = [], (n - 1) / n

    def tap(owner, name, collective, count):
        real = getattr(owner, name)

        def run(*args, **kwargs):
            log.append((collective, count(*args)))
            return real(*args, **kwargs)

        return unittest.mock.patch.object(owner, name, run)

    def to_others(y, x, taken, given):
        return x.nbytes // max(len(x), 1) * (len(x) - given[dist.get_rank()])

    with (
        tap(dist, "all_reduce", "all-reduce", lambda x, *_: 2 * share * x.nbytes),
        tap(comm_ops, "_gather_flat", "all-gather", lambda y, *_: share * y.nbytes),
        tap(dist, "all_to_all_single", "all-to-all", to_others),
    ):
        yield log


def call(model, inputs):
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(out, "logits", out)


def local(tensors):
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


def totals(log):
    counts, nbytes = Counter(name for name, _ in log), Counter()
    for name, n in log:
        nbytes[name] += n
    return {name: (counts[name], round(nbytes[name])) for name in counts}


def measured(model, inputs, n):
    """What the first rank is seen to take in a step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(2):  # what is compared at first is communicated too
        out = call(model, inputs)
        out.backward(torch.ones_like(out))
        optimizer.step()
        optimizer.zero_grad()
    params = local(model.parameters())
    state = [t for s in optimizer.state.values() for t in local(s.values())]
    given = [t for t in tree_iter(inputs) if isinstance(t, torch.Tensor)]
    known = {id(t.untyped_storage()) for t in (*params, *given, *model.buffers())}
    saved = {}

    def pack(t):
        saved[id(t.untyped_storage())] = t.untyped_storage()
        return t

    # a forward that draws random numbers first compares the ranks' states
    alone = unittest.mock.patch.object(context, "share_random_state", lambda mesh: None)
    watch = Watch([*params, *state], [*given, *model.buffers()])
    with alone, watch, sent(n) as log:
        with saved_tensors_hooks(pack, lambda t: t):
            out = call(model, inputs)
        saved[id(out.untyped_storage())] = out.untyped_storage()
        activations = sum(s.nbytes() for key, s in saved.items() if key not in known)
        saved.clear()
        forward = len(log)
        out.backward(torch.ones_like(out))
        del out
        gradients = sum(g.nbytes for g in local(p.grad for p in model.parameters()))
        optimizer.step()
    parameters = sum(p.nbytes for p in params)
    optimizer_state = sum(t.nbytes for t in state)
    return {
        "parameters": parameters,
        "gradients": gradients,
        "optimizer_state": optimizer_state,
        "forward": totals(log[:forward]),
        "backward": totals(log[forward:]),
        "activations": activations,
        "peak": watch.peak + parameters + optimizer_state,
    }


# ------------------------------------------------------------------ the models


class Checkpointed(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class Experts(nn.Module):
    """Reads values: which expert is hit."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])
        self.up, self.down = nn.Linear(D, 64), nn.Linear(64, D)

    def forward(self, x):
        x = self.down(F.gelu(self.up(F.dropout(x, 0.1))))
        scores = self.router(x)
        chosen = scores[:, 0].argsort() % 3  # all are hit
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if rows.numel() and chosen.float().mean().item() >= 0:
                y[rows] = expert(x[rows]) * scores[rows, i, None]
        return y


def mlp(*widths, kind=nn.Sequential):
    blocks = [
        nn.Sequential(nn.Linear(a, 4 * a), nn.GELU(), nn.Linear(4 * a, a))
        for a in widths
    ]
    return lambda: kind(*blocks)


def source_and_target():
    source, target = ids(2, 9)(), ids(2, 5)()
    return {"input_ids": source[0], "decoder_input_ids": target[0]}


MODELS = {
    "MLP": (mlp(32, 32), features(2, 24, 32)),
    "checkpointed": (mlp(32, 32, kind=Checkpointed), features(2, 24, 32)),
    "attention": (attention(), features(2, 5, D)),
    "uneven heads": (attention(heads=5), features(2, 5, D)),
    "gated": (fused_mlp("chunk"), features(2, 5, D)),
    "norms of all heads": (attention(norm="spelled"), features(2, 5, D)),
    "ResNet": (ResNet, features(2, 3, 8, 8)),
    "Llama": (lambda: llama(attn_implementation="eager"), ids(2, 12)),
    "Llama, fused attention": (llama, ids(2, 12)),
    "GPT-2, dropout": (lambda: hf.gpt2(dropout=0.1, attn_pdrop=0.0), ids(2, 12)),
    "encoder of torch.nn": (encoder(2, width=32), features(2, 9, 32)),
    "experts": (Experts, features(16, D)),
    "T5": (lambda: hf.t5(dropout_rate=0.0), source_and_target),
}


SOME = ["uneven heads", "ResNet"]


@pytest.mark.parametrize("n, names", [(2, list(MODELS)), (4, SOME)])
def test_an_estimate_is_what_a_real_step_takes(n, names):
    def ranks(rank):
        found = []
        for name in names:
            build, given = MODELS[name]
            torch.manual_seed(0)
            model, inputs = build(), given()
            estimate = None
            if rank == 0:
                plan = plan_tensor_parallel(model, n, example_inputs=inputs)
                estimate = plan.estimate()
            apply_tensor_parallel(model, n, example_inputs=inputs)
            found.append((estimate, measured(model, inputs, n)))
        return found

    for name, (found, real) in zip(names, run_ranks(ranks, n)[0]):
        for what in ("parameters", "gradients", "optimizer_state"):
            assert getattr(found, what) == real[what], (name, what)
        for backward, direction in enumerate(("forward", "backward")):
            planned = {
                c.name: (c.count, c.bytes)
                for c in found.collectives
                if c.backward == backward
            }
            assert planned == real[direction], (name, direction)
        # what a model returns beside the logits is held here
        assert found.activations == pytest.approx(real["activations"], rel=0.02), name
        assert sum(found.activations_of.values()) == found.activations
        assert found.peak == pytest.approx(real["peak"], rel=0.1), name


@own_process
def test_on_one_rank_nothing_is_sent():
    model, inputs = mlp(32)(), features(2, 24, 32)()
    found = plan_tensor_parallel(model, 1, example_inputs=inputs).estimate("sgd")
    assert found.parameters == sum(p.nbytes for p in model.parameters())
    assert (found.optimizer_state, found.bytes_sent) == (0, 0)
    assert found.activations_of == {
        "0.0": 2 * 24 * 128 * 4,
        "0.1": 2 * 24 * 128 * 4,
        "0.2": 2 * 24 * 32 * 4,
    }


# ------------------------------------------------------------- what is told of it


def small_plan():
    return plan_tensor_parallel(mlp(32)(), 2, example_inputs=features(2, 24, 32)())


@own_process
def test_it_reads_well():
    text = str(small_plan().estimate())
    assert text.startswith("a training step on 2 x 24 x 32 float32 takes of each of 2")
    assert "optimizer (adamw)" in text and "all-reduce forward" in text


@own_process
def test_a_frozen_weight_has_no_gradient():
    model = mlp(32)()
    model[0][0].requires_grad_(False)
    plan = plan_tensor_parallel(model, 2, example_inputs=features(2, 24, 32)())
    found = plan.estimate()
    frozen = model[0][0].weight.nbytes // 2 + model[0][0].bias.nbytes // 2
    assert found.gradients == found.parameters - frozen
    assert found.optimizer_state == 2 * found.gradients + 4 * 2


@own_process
def test_as_if_of_another_dtype():
    plan = small_plan()
    whole, half = plan.estimate(), plan.estimate(dtype=torch.bfloat16)
    assert (half.parameters, half.gradients, half.activations, half.bytes_sent) == (
        whole.parameters // 2,
        whole.gradients // 2,
        whole.activations // 2,
        whole.bytes_sent // 2,
    )


@own_process
def test_a_plan_keeps_what_was_counted_and_no_model():
    plan = small_plan()
    found = plan.estimate()
    assert TensorParallelPlan.from_json(plan.to_json()).estimate() == found
    assert pickle.loads(pickle.dumps(plan)).estimate() == found
    copied = copy.deepcopy(small_plan())
    with pytest.raises(ValueError, match="plan as plan_tensor_parallel made it"):
        copied.estimate()
    plan["0.0.weight"] = Replicate()
    with pytest.raises(ValueError, match="plan again"):
        plan.estimate()
    with pytest.raises(ValueError, match="optimizer: expected one of none, sgd"):
        small_plan().estimate("adamax")


@own_process
def test_a_backward_that_does_not_run_on_fake_tensors_is_told():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    class Model(nn.Linear):
        def forward(self, x):
            return Reads.apply(super().forward(x))

    plan = plan_tensor_parallel(Model(8, 8), 2, example_inputs=features(2, 8)())
    with pytest.raises(RuntimeError, match="Model: expected a forward and backward"):
        plan.estimate()


@own_process
def test_it_is_counted_unseen():
    """Nothing of the user's sees the fake step: hooks, lists, random state, modes."""
    seen, kept = [], []

    class Keeps(nn.Linear):
        def forward(self, x):
            kept.append(out := super().forward(x))
            return out

    model = nn.Sequential(Keeps(8, 8), nn.Linear(8, 8))
    model[1].register_full_backward_hook(lambda *given: seen.append(given))
    plan = plan_tensor_parallel(model, 2, example_inputs=features(2, 8)())
    state = torch.get_rng_state()
    with Watch([], []) as watch:
        plan.estimate()
    assert (seen, kept, watch.peak) == ([], [], 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@own_process
def test_sizes_side_by_side():
    with torch.device("meta"):
        model = llama()
    found = compare_tp_sizes(model, (1, 2), example_inputs=ids(2, 12)(), device="A100")
    alone = plan_tensor_parallel(
        model, 2, example_inputs=ids(2, 12)(), device="A100"
    ).estimate()
    assert found.estimates[1] == alone
    lines = str(found).splitlines()
    assert "adamw, on A100" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["ranks", "1", "2"]
    with pytest.raises(ValueError, match="tp_size: .* found 0"):
        compare_tp_sizes(model, (1, 0))
    with pytest.raises(ValueError, match="sizes: .* found none"):
        compare_tp_sizes(model, ())
