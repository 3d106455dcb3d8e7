"""Ways to write a forward: kinds of outputs, weights used elsewhere, writes in place,
branches, calls that were not traced. Sharded it gives what it gives whole."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import check, compare, pair, same_output
from models.gpt import GPT, ConvNet, features, ids, mlp
from ranks import run_ranks
from torch import nn


def test_dict_output_and_keyword_only_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, *, x, scale=1.0):
            return {
                "out": self.net(x) * scale,
                "scale": scale,
                "nested": [x, {"y": self.net[0](x)}],
            }

    check(
        Net,
        lambda: {"x": torch.randn(3, 16)},
        2,
        calls=[lambda: {"x": torch.randn(5, 16), "scale": 2.0}],
    )


@dataclass
class Result:
    out: torch.Tensor
    hidden: torch.Tensor | None = None


def test_dataclass_output():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            h = self.a(x).relu()
            return Result(self.b(h), h)

    check(Net, features(3, 8), 2)


def test_module_called_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.fc = mlp(), nn.Linear(16, 16)

        def forward(self, x):
            return self.fc(self.net(self.net(x).relu()))

    check(Net, features(3, 16), 2, share=0.6)


def test_weight_used_outside_its_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.net = nn.Embedding(24, 16), mlp()

        def forward(self, ids):
            return F.linear(self.net(self.emb(ids)), self.emb.weight)

    check(Net, ids(24, 2, 3), 2, share=0.6)


def test_childs_weights_used_by_the_parent_only():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            h = torch.addmm(self.a.bias, x, self.a.weight.t()).tanh()
            return h @ self.b.weight.T + self.b.bias

    check(Net, features(3, 8), 2, share=0.6)


def test_parameter_given_to_a_child():
    class Child(nn.Module):
        def forward(self, x, weight, bias):
            return F.linear(x, weight, bias)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.b1 = nn.Parameter(torch.randn(32, 8)), nn.Parameter(
                torch.randn(32)
            )
            self.w2, self.child = nn.Parameter(torch.randn(8, 32)), Child()

        def forward(self, x):
            return self.child(
                self.child(x, self.w1, self.b1).relu(), self.w2, bias=None
            )

    check(Net, features(3, 8), 2, share=0.65)


def test_buffers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
            self.register_buffer("gain", torch.randn(32))
            self.register_buffer("seen", torch.zeros(32))
            self.register_buffer("calls", torch.tensor(0), persistent=False)

        def forward(self, x):
            self.calls += 1
            h = self.a(x) * self.gain
            if self.training:
                self.seen.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            return self.b(h)

    check(Net, features(3, 8), 2, calls=[features(3, 8)])


def set_first(h, x):
    h[..., 0] = 1.0


def set_slice(h, x):
    h[..., 4:] = 0


def set_every_other(h, x):
    h[:, ::2] = x.mean()


def add_to_slice(h, x):
    h[:, 3:5] += x[:, :2]


def zero_selected(h, x):
    h.select(-1, 0).zero_()


def zero_narrowed(h, x):
    h.narrow(-1, 0, 4).zero_()


def relu_and_scale(h, x):
    h *= 2
    h.add_(x.mean())
    F.relu(h, inplace=True)


@pytest.mark.parametrize(
    "change",
    [
        set_first,
        set_slice,
        set_every_other,
        add_to_slice,
        zero_selected,
        zero_narrowed,
        relu_and_scale,
    ],
)
def test_in_place_operators(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            h = self.a(x) * 1
            change(h, x)
            return self.b(h).add_(x)

    check(Net, features(3, 8), 2)


def test_value_dependent_branch():
    """The other branch, with the same kinds of inputs as the traced one, takes a mean
    over the sharded units."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            h = self.a(x)
            h = h.relu() if x.sum() > 0 else h * h.mean(-1, keepdim=True)
            return self.b(h)

    check(
        Net,
        lambda: (torch.ones(3, 8),),
        2,
        calls=[lambda: (-torch.ones(3, 8),), lambda: (torch.ones(3, 8),)],
    )


def test_branch_on_what_the_weights_give():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32, bias=False), nn.Linear(32, 8)

        def forward(self, x):
            h = self.a(x)
            h = h.relu() if h.sum() > 0 else h * h.mean(-1, keepdim=True)
            return self.b(h)

    check(Net, lambda: (torch.ones(3, 8),), 2, calls=[lambda: (-torch.ones(3, 8),)])


class Routed(nn.Module):
    def __init__(self, d=16, experts=4):
        super().__init__()
        self.router = nn.Linear(d, experts)
        self.experts = nn.ModuleList(mlp(d, 24) for _ in range(experts))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        weight, chosen = scores.topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            if token.numel():
                out.index_add_(0, token, expert(x[token]) * weight[token, slot, None])
        return out


@pytest.mark.parametrize("n", [2, 4])
def test_router_with_a_list_of_experts(n):
    check(
        Routed,
        features(6, 16),
        n,
        calls=[features(1, 16), features(20, 16)],
        share=1 / n + 0.1,
    )


class HeadMean(nn.Module):
    """A mean over heads if asked for: by an argument, a float, or an attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.mean = nn.Linear(8, 32), nn.Linear(32, 8), False

    def forward(self, x, mean=False, strength=0.0):
        h = self.a(x).view(*x.shape[:-1], -1, 8)
        if mean or self.mean or strength > 0.5:
            h = h - h.mean(-2, keepdim=True)
        return self.b(h.flatten(-2))


def test_flag_that_was_not_traced():
    x = torch.randn(3, 8)
    calls = [
        lambda: {"x": x, "mean": True},
        lambda: {"x": x, "mean": False},
        lambda: (x, True),
    ]
    check(HeadMean, lambda: {"x": x}, 2, calls=calls)


@pytest.mark.parametrize("how", ["float", "attribute", "length", "type"])
def test_path_that_the_signature_may_miss(how):
    """Right, or a clear RuntimeError; never wrong."""

    class Net(HeadMean):
        def forward(self, x, strength=0.0):
            return super().forward(
                x, mean=how == "length" and x.shape[0] > 4, strength=strength
            )

    def ranks(rank):
        x = torch.randn(
            3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        sharded, whole = pair(Net, 2, example_inputs=(x, 0.1))
        compare(sharded, whole, (x, 0.1))
        given = {
            "float": (x, 0.9),
            "attribute": (x, 0.1),
            "length": (x.repeat(3, 1), 0.1),
            "type": (x, 1),
        }[how]
        sharded.mean = whole.mean = how == "attribute"
        try:
            compare(sharded, whole, given)
        except RuntimeError as e:
            assert "path" in str(e) and "example_inputs" in str(e)

    run_ranks(ranks, 2)


@pytest.mark.parametrize("n, style", [(2, "infer"), (2, "written"), (4, "written")])
def test_other_sizes_and_arguments_than_traced(n, style):
    def mask():
        return torch.randint(0, 64, (2, 6)), torch.zeros(2, 1, 6, 6).masked_fill(
            torch.rand(2, 1, 6, 6) < 0.2, -1e9
        )

    def per_head():
        return torch.randint(0, 64, (2, 5)), torch.randn(2, 4, 5, 5)

    calls = [ids(64, 5, 9), ids(64, 1, 1), mask, per_head, ids(64, 2, 6)]
    check(lambda: GPT(style=style), ids(64, 2, 6), n, calls=calls)


class Cache:
    """Keeps what it was given, as a KV cache does."""

    def __init__(self):
        self.kept = None

    def update(self, k):
        self.kept = k if self.kept is None else torch.cat([self.kept, k], 1)
        return self.kept


def test_cache_that_the_forward_fills():
    """Showing a new call right must not touch the caller's cache. Filled, it holds
    shards, which the next call goes on with."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x, cache=None):
            k = self.a(x)
            return self.b((k if cache is None else cache.update(k)).sum(1))

    def then(sharded, whole):
        caches, x = [Cache(), Cache()], torch.ones(2, 3, 8, dtype=torch.float64)
        found, expected = (m(x, cache=c) for m, c in zip((sharded, whole), caches))
        assert torch.allclose(found, expected, rtol=1e-9)
        assert (
            caches[0].kept.shape == (2, 3, 16) and type(caches[0].kept) is torch.Tensor
        )
        with torch.no_grad():
            for length in (3, 1, 2):
                x = torch.randn(
                    2,
                    length,
                    8,
                    dtype=torch.float64,
                    generator=torch.Generator().manual_seed(length),
                )
                same_output(*(m(x, cache=c) for m, c in zip((sharded, whole), caches)))
            again, half = copy.deepcopy(caches[0]), copy.deepcopy(caches[0])
            same_output(sharded(x, cache=again), whole(x, cache=caches[1]))
            half.__dict__.pop("_tp_shards")  # nothing says any more that it is a shard
            with pytest.raises(RuntimeError, match="shards from an earlier call"):
                sharded(x, cache=half)

    check(Net, features(2, 3, 8), 2, then=then)


def test_inputs_made_up():
    check(lambda: GPT(), ids(64, 2, 6), 2, example=False, share=0.55)
    check(ConvNet, features(2, 3, 8, 8), 2, example=False)


def test_inputs_that_cannot_be_made_up():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, a, b):
            return self.net(a["x"]) + b[0]

    with pytest.warns(UserWarning, match="example_inputs"):
        from quintnet_dt import plan_tensor_parallel

        plan_tensor_parallel(Net(), 2)
    check(
        Net,
        lambda: ({"x": torch.randn(2, 16)}, [torch.randn(16)]),
        2,
        example=False,
        share=0.6,
    )
