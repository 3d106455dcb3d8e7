"""Optimizers, clipping, loss scaling and averages on split models: after twenty steps,
what the whole model gives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from quintnet_dt import apply_tensor_parallel


class Model(nn.Module):
    """Fused projections, a replicated norm within a sharded region, a tied head, a
    vocabulary that 2 does not divide."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(37, 16), nn.Linear(16, 37, bias=False)
        self.qkv, self.q_norm, self.out = (
            nn.Linear(16, 48),
            nn.LayerNorm(4),
            nn.Linear(16, 16),
        )
        self.up, self.down, self.norm = (
            nn.Linear(16, 64),
            nn.Linear(64, 16),
            nn.LayerNorm(16),
        )
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        q, k, v = (
            t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        x = x + self.out(
            F.scaled_dot_product_attention(self.q_norm(q), k, v)
            .transpose(1, 2)
            .flatten(2)
        )
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))


def batch(step):
    return torch.randint(0, 37, (2, 6), generator=torch.Generator().manual_seed(step))


def pair(dtype=torch.float64):
    """(split, whole)."""
    torch.manual_seed(0)
    whole = Model().to(dtype)
    return (
        apply_tensor_parallel(copy.deepcopy(whole), 2, example_inputs=(batch(0),)),
        whole,
    )


def backward(model, step, scale=1.0):
    loss = F.cross_entropy(model(batch(step)).flatten(0, 1), batch(step + 1).flatten())
    (loss * scale).backward()


def same(model, whole, tol=1e-9):
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        error = (p.full_tensor() - q).abs().max() / q.abs().max()
        assert error < tol, (name, error)


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


KINDS = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_clipping_accumulation_schedule_and_averages(kind):
    def ranks(rank):
        def sgd(params):
            return torch.optim.SGD(
                params,
                0.1,
                momentum=0.9,
                nesterov=True,
                weight_decay=0.01,
                **KINDS[kind],
            )

        def adamw(params):
            return torch.optim.AdamW(params, 1e-2, eps=1e-6, **KINDS[kind])

        # torch's DTensor does not know SGD(fused=True)
        for make in ((adamw,) if kind == "fused" else (adamw, sgd)):
            models = pair()
            optimizers = [make(m.parameters()) for m in models]
            schedules = [
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 20) for o in optimizers
            ]
            ema = [copy.deepcopy(m) for m in models]
            averages = [
                AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for m in models
            ]
            for step in range(20):
                for m in models:
                    backward(m, 2 * step, 0.5), backward(m, 2 * step + 1, 0.5)
                norms = [
                    full(get_total_norm([p.grad for p in m.parameters()]))
                    for m in models
                ]
                assert torch.allclose(*norms, rtol=1e-10, atol=0)
                clipped = [
                    clip_grad_norm_(m.parameters(), 0.3, foreach=kind == "foreach")
                    for m in models
                ]
                assert torch.allclose(full(clipped[0]), clipped[1], rtol=1e-10, atol=0)
                for m in models:
                    clip_grad_value_(m.parameters(), 0.05)
                for o, s in zip(optimizers, schedules):
                    o.step(), s.step(), o.zero_grad()
                for e, m, a in zip(ema, models, averages):
                    a.update_parameters(m)
                    with torch.no_grad():
                        for p, q in zip(e.parameters(), m.parameters()):
                            p.lerp_(q, 0.1)
            same(*models), same(*ema), same(*(a.module for a in averages))
            outputs = [m(batch(3)) for m in (*ema, *(a.module for a in averages))]
            assert (
                (outputs[0] - outputs[1]).abs().max()
                < 1e-9
                > (outputs[2] - outputs[3]).abs().max()
            )

    run_ranks(ranks, 2)


def test_autocast_and_loss_scaling():
    def ranks(rank):
        models = pair(torch.float32)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in models]
        scalers = [
            torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
            for _ in models
        ]
        for step in range(20):
            for i, (m, o, s) in enumerate(zip(models, optimizers, scalers)):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = m(batch(step))
                s.scale(
                    F.cross_entropy(
                        logits.float().flatten(0, 1), batch(step + 1).flatten()
                    )
                ).backward()
                if step in (7, 12):  # in one rank's shard alone
                    grad = m.up.weight.grad
                    if i == 1:
                        grad[-1] = torch.inf
                    elif rank == 1:
                        grad.to_local()[-1] = torch.inf
                before = [full(p).clone() for p in m.parameters()]
                s.unscale_(o)
                norm = full(clip_grad_norm_(m.parameters(), 1.0))
                s.step(o), s.update(), o.zero_grad()
                skipped = all(
                    torch.equal(a, full(b)) for a, b in zip(before, m.parameters())
                )
                assert skipped == (step in (7, 12)) and norm.isfinite() != skipped, (
                    rank,
                    i,
                    step,
                    norm,
                )
            assert scalers[0].get_scale() == scalers[1].get_scale()
        same(*models, tol=0.02)
        models = pair()
        for m in models:
            o, s = torch.optim.SGD(m.parameters(), 0.1), torch.amp.GradScaler(
                "cpu", init_scale=2.0**10
            )
            for step in range(20):
                with torch.autocast("cpu", enabled=False):
                    s.scale(
                        F.cross_entropy(
                            m(batch(step)).flatten(0, 1), batch(step + 1).flatten()
                        )
                    ).backward()
                s.step(o), s.update(), o.zero_grad()
        same(*models)

    run_ranks(ranks, 2)
