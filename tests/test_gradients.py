"""Training a sharded model: checkpointing, accumulation, clipping and optimizers give
what they give for the whole one."""

import pytest
import torch
import torch.nn.functional as F
from helpers import check, compare, loss_of, pair, same_grads
from models.gpt import GPT, GatedMLP, features, ids, mlp
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint


@pytest.mark.parametrize(
    "n, options",
    [(2, dict(norm=True)), (4, dict(style="written", norm=True, tied=True))],
)
def test_adamw_and_clipping(n, options):
    def ranks(rank):
        torch.manual_seed(4)
        x = torch.randint(0, 64, (4, 2, 6))
        sharded, whole = pair(lambda: GPT(**options), n, example_inputs=(x[0],))
        # Parameters whose gradient is noise around zero (a key's bias) would move by
        # the learning rate in any direction.
        optimizers = [
            torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)
            for m in (sharded, whole)
        ]
        for batch in x:
            norms = []
            for model, opt in zip((sharded, whole), optimizers):
                opt.zero_grad()
                F.cross_entropy(model(batch).flatten(0, 1), batch.flatten()).backward()
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5))
                opt.step()
            total = (
                norms[0].full_tensor() if hasattr(norms[0], "full_tensor") else norms[0]
            )
            assert torch.allclose(total, norms[1], rtol=1e-9)
        for (name, p), q in zip(sharded.named_parameters(), whole.parameters()):
            assert torch.allclose(p.full_tensor(), q, rtol=1e-7, atol=1e-9), name

    run_ranks(ranks, n)


class Checkpointed(nn.Module):
    def __init__(self, reentrant, **options):
        super().__init__()
        self.gpt, self.reentrant = GPT(**options), reentrant

    def forward(self, ids):
        x = self.gpt.wte(ids)
        for block in self.gpt.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.gpt.head(self.gpt.norm(x))


@pytest.mark.parametrize("style", ["infer", "written"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, style):
    check(
        lambda: Checkpointed(reentrant, style=style, dropout=0.2),
        ids(64, 2, 6),
        2,
        calls=[ids(64, 1, 4)],
    )


def test_checkpointing_of_the_whole_model():
    def ranks(rank):
        sharded, whole = pair(lambda: GPT(style="written", dropout=0.2), 2)
        x = torch.arange(12).view(2, 6)
        for model in (whole, sharded):
            torch.manual_seed(5)
            loss_of(checkpoint(model, x, use_reentrant=False)).backward()
        same_grads(sharded, whole)

    run_ranks(ranks, 2)


def test_gradients_of_inputs():
    def ranks(rank):
        sharded, whole = pair(lambda: nn.Sequential(GatedMLP(), mlp()), 2)
        x = torch.randn(
            3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        grads = []
        for model in (whole, sharded):
            leaf = x.clone().requires_grad_()
            for _ in range(2):  # accumulated over two backward passes from one leaf
                loss_of(model(leaf)).backward()
            grads.append(leaf.grad)
        assert torch.allclose(*grads, rtol=1e-9, atol=1e-12)
        same_grads(sharded, whole)

    run_ranks(ranks, 2)


def test_accumulation_and_one_loss_of_two_calls():
    def ranks(rank):
        sharded, whole = pair(lambda: GPT(norm=True), 2)
        a, b = torch.arange(12).view(2, 6), torch.arange(20, 28).view(2, 4)
        for model in (whole, sharded):
            loss_of([model(a), model(b)]).backward()
            loss_of(model(b)).backward()
        same_grads(sharded, whole)

    run_ranks(ranks, 2)


def test_same_tensor_into_several_regions_and_out():
    """x feeds two sharded regions, a replicated one and the output: its gradient is one
    sum of all."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.a, self.b, self.gain = mlp(), mlp(), nn.Parameter(torch.rand(16))

        def forward(self, x):
            x = self.first(x)
            return self.a(x) + self.b(x) * self.gain + x, x

    check(Net, features(3, 16), 4)


def test_gradients_exist_before_sharding():
    def ranks(rank):
        def build():
            model = mlp().double()
            model(torch.ones(2, 16, dtype=torch.float64)).sum().backward()
            return model

        sharded, whole = pair(build, 2)
        same_grads(sharded, whole)
        for model in (sharded, whole):
            model(torch.ones(3, 16, dtype=torch.float64)).sum().backward()
        same_grads(sharded, whole)

    run_ranks(ranks, 2)


def test_first_call_without_gradients():
    def ranks(rank):
        sharded, whole = pair(lambda: GPT(norm=True, style="written"), 2, train=False)
        x = torch.arange(12).view(2, 6)
        with torch.inference_mode():
            sharded(x)
        compare(sharded, whole, (x,), grad=False)
        sharded.train(), whole.train()
        compare(sharded, whole, (x,))

    run_ranks(ranks, 2)


def test_part_of_the_forward_without_gradients():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.other = mlp(), mlp()

        def forward(self, x):
            with torch.no_grad():
                target = self.net(x)
            detached = self.other(self.net(x).detach())
            return self.net(x) - target, detached

    check(Net, features(3, 16), 2)


def test_autocast():
    def ranks(rank):
        sharded, whole = pair(mlp, 2)
        sharded.float(), whole.float()
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        outs = []
        for model in (whole, sharded):
            with torch.autocast("cpu", torch.bfloat16):
                outs.append(model(x))
            outs[-1].sum().backward()
        assert outs[0].dtype == outs[1].dtype == torch.bfloat16
        assert torch.allclose(*outs, atol=0.03, rtol=0.03)
        for (name, p), q in zip(sharded.named_parameters(), whole.parameters()):
            assert torch.allclose(
                p.grad.full_tensor(), q.grad, atol=0.1, rtol=0.05
            ), name

    run_ranks(ranks, 2)


def test_replicated_weights_stay_equal_over_steps():
    def ranks(rank):
        sharded, _ = pair(lambda: GPT(norm=True, dropout=0.1), 2)
        opt = torch.optim.SGD(sharded.parameters(), lr=0.5)
        torch.manual_seed(6)
        for _ in range(3):
            opt.zero_grad()
            loss_of(sharded(torch.randint(0, 64, (2, 5)))).backward()
            opt.step()
        return {
            n: p.to_local().detach()
            for n, p in sharded.named_parameters()
            if p.placements[0].is_replicate()
        }

    first, second = run_ranks(ranks, 2)
    assert first and all(torch.equal(p, second[n]) for n, p in first.items())
