"""Code that checks its sizes against the module's own numbers: on a shard it finds how
many heads this rank has."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, pair
from models.regions import D, check_all, features
from ranks import run_ranks
from torch import nn

LOCAL = {"q.weight": 0, "k.weight": 0, "v.weight": 0, "o.weight": 1}


class Checked(nn.Module):
    """As XGLM's attention, and many others' of its time."""

    def __init__(self, heads, dim=4):
        super().__init__()
        self.heads, self.dim = heads, dim
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v = (nn.Linear(D, heads * dim) for _ in range(3))
        self.o = nn.Linear(heads * dim, D)

    def split(self, x):
        b, t, _ = x.shape
        x = x.view(b, t, self.heads, self.dim).transpose(1, 2)
        return x.reshape(b * self.heads, t, self.dim)

    def forward(self, x):
        b, t, _ = x.shape
        y = self.norm(x)
        q, k, v = (self.split(w(y)) for w in (self.q, self.k, self.v))
        scores = q @ k.mT / self.dim**0.5
        if scores.size() != (b * self.heads, t, t):
            raise ValueError(f"scores should be of size {(b * self.heads, t, t)}")
        mixed = scores.softmax(-1) @ v
        assert mixed.shape[0] == b * self.heads, mixed.shape
        mixed = mixed.view(b, self.heads, t, self.dim).transpose(1, 2)
        return x + self.o(mixed.reshape(b, t, self.heads * self.dim))


class ByChance(Checked):
    """Another number that is as many: it must stay what it is."""

    def __init__(self, heads):
        super().__init__(heads)
        self.scale = heads

    def forward(self, x):
        return super().forward(x) * self.scale


class Deep(nn.Module):
    """Two kinds of modules with numbers of their own, one in the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Checked(12), Gated(24), Checked(12)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Gated(nn.Module):
    def __init__(self, units):
        super().__init__()
        self.units = units
        self.up, self.down = nn.Linear(D, 2 * units), nn.Linear(units, D)

    def forward(self, x):
        gate, y = self.up(x).chunk(2, -1)
        assert y.shape[-1] == self.units
        return x + self.down(F.silu(gate) * y)


CASES = {
    "heads": dict(build=lambda: Checked(12), local=LOCAL),
    "uneven heads": dict(build=lambda: Checked(5)),
    "fewer heads than ranks": dict(build=lambda: Checked(3)),
    "by chance": dict(build=lambda: ByChance(12)),
    "several kinds": dict(build=Deep, local={**LOCAL, "down.weight": 1}),
}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_numbers_are_the_whole_models(n):
    common = dict(given=features(2, 5, D), share=0.25)
    check_all({name: {**common, **case} for name, case in CASES.items()}, n)


def test_a_module_has_its_own_number_between_calls():
    """After an exception too, and a copy of it that is made within a forward."""

    def ranks(rank):
        seen = []

        class Looks(Checked):
            def split(self, x):
                seen.append(self.heads)
                if x.shape[1] == 9:
                    raise ArithmeticError("nine")
                return super().split(x)

        x = (torch.randn(2, 5, D).double(),)
        sharded, whole = pair(
            lambda: Looks(12), 2, example_inputs=copy.deepcopy(x), device="H100"
        )
        assert sharded.tensor_parallel_plan["q.weight"].how == "local"
        seen.clear()
        sharded(*x)
        assert seen == [6, 6, 6] and sharded.heads == 12
        with pytest.raises(ArithmeticError):
            sharded(torch.randn(2, 9, D).double())
        assert sharded.heads == 12
        compare(sharded, whole, x)
        compare(sharded, whole, (torch.randn(3, 7, D),))  # other sizes
        assert sharded.heads == 12

    run_ranks(ranks, 2)


def test_compiled_code_finds_them_too():
    def ranks(rank):
        x = torch.randn(2, 5, D).double()
        sharded, whole = pair(Deep, 2, example_inputs=(x,), device="H100")
        expected = whole(x)
        compiled = torch.compile(sharded, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected)
        assert [m.heads for m in sharded.layers if isinstance(m, Checked)] == [12, 12]

    run_ranks(ranks, 2, timeout=120)
