"""A parameter is one tensor by whatever way a forward reads it, and what is done to it
belongs to its use."""

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, pair
from ranks import run_ranks
from torch import nn
from torch.func import functional_call


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 8)

    def run(self, x):
        return self.b(self.a(x).relu())


def model(f, base=MLP):
    return type("Model", (base,), {"forward": f})


class Norm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(d))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Its norm's weight is replicated within a sharded region, its last bias is added
    once."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 32, bias=False) for _ in range(3))
        self.o, self.n = nn.Linear(32, 16), Norm(8)

    def run(self, x):
        q, k, v = (
            m(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
            for m in (self.q, self.k, self.v)
        )
        return self.o(
            F.scaled_dot_product_attention(self.n(q), self.n(k), v)
            .transpose(1, 2)
            .flatten(2)
        )


class Outer(nn.Module):
    """Reads what a module two levels below reads too."""

    def __init__(self):
        super().__init__()
        self.inner = model(Attention.run, Attention)()


TWICE = {
    "a bias, penalised": (
        model(lambda s, x: s.run(x).square().mean() + s.b.bias.pow(2).sum()),
        16,
    ),
    "a bias, taken off": (model(lambda s, x: s.run(x) - s.b.bias), 16),
    "a bias, before": (model(lambda s, x: (lambda c: s.run(x) * c)(s.b.bias * 2)), 16),
    "a bias, by a function too": (
        model(lambda s, x: F.linear(s.a(x).relu(), s.b.weight, s.b.bias) + s.b.bias),
        16,
    ),
    "two runs and a bias": (model(lambda s, x: s.run(x) + s.run(-x) + s.b.bias), 16),
    "a weight": (model(lambda s, x: s.run(x) @ s.b.weight), 16),
    "weights, penalised": (
        model(
            lambda s, x: s.run(x).mean()
            + s.a.weight.pow(2).sum()
            + s.b.bias.abs().sum()
        ),
        16,
    ),
    "a norm": (model(lambda s, x: s.run(x) + s.n.weight.pow(2).sum(), Attention), 16),
    "a norm, before": (
        model(lambda s, x: (lambda c: s.run(x) * c)(s.n.weight.mean()), Attention),
        16,
    ),
    "a norm, from above": (
        model(lambda s, x: s.inner(x) + s.inner.n.weight.pow(2).sum(), Outer),
        16,
    ),
    "a bias, from above": (model(lambda s, x: s.inner(x) - s.inner.o.bias, Outer), 16),
}


def stacked(s, x):
    both = [dict(m.named_parameters()) for m in (s.a, s.a)]
    params = {name: torch.stack([p[name] for p in both]) for name in both[0]}
    return torch.func.vmap(lambda p, y: functional_call(s.a, p, (y,)), (0, None))(
        params, x
    ).sum(0)


def one_step(s, x):
    """MAML's inner loop."""
    params = dict(s.a.named_parameters())
    loss = functional_call(s.a, params, (x,)).square().mean()
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    return s.b(
        functional_call(
            s.a, {k: p - 0.1 * g for (k, p), g in zip(params.items(), grads)}, (x,)
        )
    )


def of_state(s, x):
    state = s.state_dict(keep_vars=True)
    return F.linear(
        F.linear(x, state["a.weight"], state["a.bias"]).relu(), state["b.weight"]
    )


def of_dict(s, x):
    return F.linear(
        F.linear(x, s.a._parameters["weight"], s.a._parameters["bias"]).relu(),
        s.b._parameters["weight"],
    )


def penalty(s, x):
    return s.run(x).square().mean() + 0.01 * sum(p.pow(2).sum() for p in s.parameters())


def norms(s, x):
    return s.run(x).square().mean() + 0.01 * sum(
        p.norm() for n, p in s.named_parameters() if "weight" in n
    )


def flat(s, x):
    return (
        s.run(x).square().mean()
        + torch.cat([p.flatten() for p in s.parameters()]).abs().mean()
    )


def unpacked(s, x):
    (w, b), (w2, b2) = s.a.parameters(), s.b.parameters()
    return F.linear(F.linear(x, w, b).relu(), w2, b2)


def scaled(s, x):
    return s.b(
        functional_call(s.a, {k: v * 2 for k, v in s.a.named_parameters()}, (x,)).relu()
    )


def unchanged(s, x):
    return s.b(functional_call(s.a, dict(s.a.named_parameters()), (x,)).relu())


def both_ways(s, x):
    other = {k: v.detach() + 1 for k, v in s.a.named_parameters()}
    return s.b(functional_call(s.a, other, (x,)).relu()) + s.run(x)


WAYS = [
    penalty,
    norms,
    flat,
    unpacked,
    of_dict,
    of_state,
    scaled,
    unchanged,
    both_ways,
    stacked,
    one_step,
]


def all_right(cases, n, shape):
    def ranks(rank):
        torch.manual_seed(3)
        x = torch.randn(*shape)
        for name, kind in cases:
            sharded, whole = pair(kind, n, example_inputs=(x.double(),))
            try:
                compare(sharded, whole, (x,))
                compare(sharded, whole, (x[:2],))
                if kind.forward is not one_step:  # which takes gradients itself
                    compare(sharded, whole, (x,), grad=False)
            except (AssertionError, RuntimeError) as e:
                e.add_note(f"{name}:\n{sharded.tensor_parallel_plan}")
                raise

    run_ranks(ranks, n, timeout=120)


@pytest.mark.parametrize("n", [2, 4])
def test_read_by_two_modules(n):
    all_right([(name, kind) for name, (kind, _) in TWICE.items()], n, (3, 5, 16))


@pytest.mark.parametrize("n", [2, 4])
def test_read_in_other_ways(n):
    all_right([(f.__name__, model(f)) for f in WAYS], n, (3, 16))


def clamped(s, x):
    with torch.no_grad():
        for p in s.b.parameters():
            p.clamp_(min=0)
    return s.run(x)


def normalised(s, x):
    with torch.no_grad():
        s.a.weight.copy_(F.normalize(s.a.weight, dim=1))
        s.b.weight.data = F.normalize(s.b.weight.data, dim=-1)
    return s.run(x)


def averaged(s, x):
    with torch.no_grad():
        s.b.weight.mul_(0.9).add_(s.a.weight.T[:8].repeat(1, 1), alpha=0.1)
        s.b.bias.data = s.b.bias.data * 0.5 + 1
    return s.run(x)


@pytest.mark.parametrize("f", [clamped, normalised, averaged])
def test_forwards_that_write_to_parameters(f):
    """In place, or by assigning to `.data`: they stay whole, and have the values that
    they would have."""

    def ranks(rank):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        sharded, whole = pair(model(f), 2, example_inputs=(x.double(),))
        for _ in range(2):
            compare(sharded, whole, (x,))
        for (name, p), q in zip(sharded.named_parameters(), whole.parameters()):
            torch.testing.assert_close(
                p.detach().full_tensor(), q.detach(), rtol=1e-9, atol=1e-12, msg=name
            )

    run_ranks(ranks, 2)


def mlp():
    return nn.Sequential(
        nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 4)
    )


class FusedHeads(nn.Module):
    """Attention of n heads with one fused weight; exponentials, so that no second
    derivative is zero."""

    def __init__(self, n):
        super().__init__()
        self.qkv, self.out, self.n = nn.Linear(12, 36), nn.Linear(12, 6), n

    def forward(self, x):
        q, k, v = (
            y.view(*y.shape[:2], self.n, -1).transpose(1, 2)
            for y in self.qkv(x).split([12, 12, 12], -1)
        )
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2).tanh())


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(12, 12), nn.Linear(12, 12)

    def forward(self, ids):
        return nn.functional.cross_entropy(
            self.head(self.emb(ids).tanh()).flatten(0, 1), ids.flatten()
        )


@pytest.mark.parametrize("n", [2, 3])
def test_gradients_of_gradients(n):
    """A penalty on the norm of the gradient, by parameters and by inputs: where a bias
    is added once, where rows of a fused weight are exchanged, where a lookup and a loss
    are on shards."""

    def ranks(rank):
        x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)).double()
        ids = torch.arange(10).view(2, 5)
        cases = [
            (mlp, x, False),
            (lambda: FusedHeads(n), x[None], True),
            (lambda: FusedHeads(n), x[None], False),
            (LanguageModel, ids, False),
        ]
        for build, given, contiguous in cases:
            penalised(build, given, n, contiguous)

    def penalised(build, given, n, contiguous):
        sharded, whole = pair(build, n, example_inputs=(given,), contiguous=contiguous)
        inputs = [
            given.clone().requires_grad_(given.is_floating_point()) for _ in range(2)
        ]
        for m, x in zip((sharded, whole), inputs):
            wanted = [*m.parameters(), *([x] if x.requires_grad else [])]
            grads = torch.autograd.grad(m(x).square().mean(), wanted, create_graph=True)
            assert all(g.requires_grad for g in grads)
            total = sum(
                (
                    g.full_tensor().square().sum()
                    if hasattr(g, "full_tensor")
                    else g.square().sum()
                )
                for g in grads
            )
            total.backward()
        if given.is_floating_point():
            torch.testing.assert_close(
                inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-12
            )
        for (name, p), q in zip(sharded.named_parameters(), whole.named_parameters()):
            torch.testing.assert_close(
                p.grad.full_tensor(), q[1].grad, rtol=1e-9, atol=1e-12, msg=name
            )

    run_ranks(ranks, n)


def test_modules_that_keep_lists_of_their_parameters():
    """An LSTM's parameters are read by their module and by the one around it, and stay
    in their order."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(12, 16, 2), nn.Linear(16, 4)

        def forward(self, x):
            penalty = (
                sum(p.square().sum() for p in self.rnn.parameters())
                + self.rnn.bias_hh_l1.sum()
            )
            return self.out(self.rnn(x)[0]) + 0.1 * penalty

    def ranks(rank):
        x = torch.randn(3, 2, 12, generator=torch.Generator().manual_seed(0))
        sharded, whole = pair(Recurrent, 2, example_inputs=(x.double(),))
        for _ in range(2):
            compare(sharded, whole, (x,))
        assert list(dict(sharded.named_parameters())) == list(
            dict(whole.named_parameters())
        )
        assert list(sharded.state_dict()) == list(whole.state_dict())

    run_ranks(ranks, 2)
