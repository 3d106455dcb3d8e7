"""Functional transforms, and operators that no Python code calls in a way that can be
intercepted: inside a model they get whole tensors; around a split model transforms
raise one clear error."""

import pytest
import torch
from helpers import check, close, pair
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import grad, jacrev, jvp, vmap

from quintnet_dt import (
    apply_tensor_parallel,
    load_checkpoint,
    plan_tensor_parallel,
    save_checkpoint,
)


@torch.jit.script
def scripted(x, bias):
    return (x + bias).tanh() * x.mean(-1, keepdim=True)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
        self.mlp = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(
            torch.randn(64)
        )


class Vmapped(Base):
    """A submodule, a shard in the middle of a region, a parameter and a tensor that the
    function closes over."""

    def forward(self, x):
        h = self.mlp[0](x)
        g = vmap(lambda row: row * h.sum(0) + row.sum())(h)
        return vmap(self.net)(self.mlp[2](g)) + vmap(lambda row: self.weight @ row)(x)


class Differentiated(Base):
    def forward(self, x):
        slopes = vmap(grad(lambda row: (self.net(row) * self.weight[0]).sum()))(x)
        tangents = jvp(self.net, (x,), (torch.ones_like(x),))[1]
        return (
            self.mlp(slopes)
            + tangents
            + vmap(jacrev(lambda row: self.net(row).sum()))(x)
        )


class Scripted(Base):
    def forward(self, x):
        return self.mlp[2](scripted(self.mlp[0](x), self.bias)) + self.net(x)


class Conditional(Base):
    def forward(self, x):
        h = self.mlp(x)
        return self.net(
            torch.cond(h.sum() > 0, lambda y: y @ self.weight, lambda y: -y, (h,))
        )


def rows():
    return (torch.randn(3, 8),)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [Vmapped, Differentiated, Scripted, Conditional])
def test_what_cannot_be_intercepted_gets_whole_tensors(build):
    def other():
        return (-torch.randn(5, 8),)

    def then(sharded, whole):
        how = {name: e.how for name, e in sharded.tensor_parallel_plan.entries.items()}
        # what such operators do not touch is sharded through
        if build in (Differentiated, Scripted):
            assert (
                how["net.0.weight" if build is Scripted else "mlp.0.weight"] == "local"
            )

    check(build, rows, calls=[other], then=then)


class Flex(nn.Module):
    def __init__(self, score_mod=None, mask=None, heads=None):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 16))
        self.requires_grad_(False)  # on a CPU it has no backward
        self.score_mod, self.mask, self.heads = score_mod, mask, heads

    def forward(self, x):
        from torch.nn.attention.flex_attention import (  # which imports much
            create_block_mask,
            flex_attention,
        )

        length, mask = x.shape[1], None
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        if self.mask is not None:
            mask = create_block_mask(
                self.mask, None, self.heads, length, length, device="cpu"
            )
        x = self.out(
            flex_attention(q, k, v, self.score_mod, mask).transpose(1, 2).flatten(2)
        )
        return x + self.mlp(x)


def causal(b, h, q, k):
    return q >= k


def by_head(score, b, h, q, k):
    return score * (1 + h)


def by_place(score, b, h, q, k):
    return score + (q - k)


FLEX = {
    "plain": ({}, True),
    "a mask for all heads": ({"mask": causal, "heads": None}, True),
    "a mask for each head": ({"mask": causal, "heads": 4}, False),
    "scores by head": ({"score_mod": by_head}, False),
    # it might read the head: it is not looked into
    "scores by place": (
        {"score_mod": by_place},
        False,
    ),
}


@pytest.mark.filterwarnings("ignore")
def test_flex_attention():
    """Its heads are split where nothing given reads a head's number; else it gets whole
    tensors."""

    def ranks(rank):
        for name, (options, split) in FLEX.items():
            torch.manual_seed(1)
            x = torch.randn(2, 128, 16, dtype=torch.float64)
            with torch.no_grad():
                sharded, whole = pair(lambda: Flex(**options), 2, example_inputs=(x,))
                for length in 128, 64:
                    close(
                        sharded(x[:, :length]),
                        whole(x[:, :length]),
                        f"{name}, {length}",
                        1e-5,
                    )
                plan = sharded.tensor_parallel_plan
                assert plan["mlp.0.weight"].how == "local", (name, plan)
                assert (plan["qkv.weight"].how == "local") == split, (name, plan)
                # another path, shown anew
                sharded.score_mod, whole.score_mod = (
                    by_head,
                    by_head,
                )
                close(sharded(x), whole(x), f"{name}, then by head", 1e-5)

    run_ranks(ranks, 2, timeout=200)


def test_modules_within_cond_are_refused():
    class Within(Base):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda y: self.net(y), lambda y: -y, (x,))

    with pytest.raises(
        RuntimeError,
        match=(
            r"net.*: expected a forward that calls its modules itself.*within .*cond in"
            r" the root"
        ),
    ):
        plan_tensor_parallel(Within(), 2, example_inputs=(torch.randn(3, 8),))


AROUND = {
    "torch.func.grad": lambda model, x: grad(lambda y: model(y).sum())(x),
    "torch.func.vmap": lambda model, x: vmap(model)(x[None]),
    "torch.func.jvp": lambda model, x: jvp(model, (x,), (x,)),
    "torch.autograd.forward_ad": lambda model, x: torch.autograd.forward_ad.make_dual(
        x, x
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_transform_around_a_split_model_raises_one_clear_error(name):
    def ranks(rank):
        (x,) = make_rows()
        model, whole = pair(Plain, 2, example_inputs=(x,))
        with pytest.raises(
            RuntimeError,
            match=(
                f"the model: expected a plain call.*within {name}.*use torch.autograd"
            ),
        ):
            if name == "torch.autograd.forward_ad":
                with torch.autograd.forward_ad.dual_level():
                    model(AROUND[name](model, x))
            else:
                AROUND[name](model, x)
        close(model(x), whole(x), "output")  # it is none the worse

    run_ranks(ranks, 2)


class Plain(Base):
    def forward(self, x):
        return self.mlp(x)


def make_rows():
    torch.manual_seed(4)
    return tuple(x.double() for x in rows())


def test_products_of_hessians_and_vectors_and_jacobians():
    def ranks(rank):
        (x,) = make_rows()
        model, whole = pair(Plain, 2, example_inputs=(x,))
        found, expected = [
            (
                torch.autograd.functional.hvp(lambda y: net(y).pow(2).sum(), x, x)[1],
                torch.autograd.functional.vhp(lambda y: net(y).pow(3).sum(), x, x)[1],
                torch.autograd.functional.jacobian(lambda y: net(y).sum(0), x),
                torch.autograd.functional.jvp(lambda y: net(y), x, x)[1],
            )
            for net in (model, whole)
        ]
        for a, b in zip(found, expected):
            close(a, b, "product")

    run_ranks(ranks, 2)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.lin = nn.Linear(64, 64)

    def forward(self, x):
        return self.lin(x) * self.scale


SCRIPTS = {
    "scripted": lambda: torch.jit.script(Swish()),
    "scripted, with weights": lambda: torch.jit.script(Scaled().double()),
    "several": lambda: torch.jit.script(
        nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64)).double()
    ),
    "traced": lambda: torch.jit.trace(
        nn.Linear(64, 64).double(), torch.randn(2, 64).double()
    ),
}


class WithScript(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.up, self.script, self.down = nn.Linear(8, 64), make(), nn.Linear(64, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))

    def forward(self, x):
        return self.mlp(self.down(self.script(self.up(x))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_script_modules_are_left_whole(name, tmp_path):
    """Their parameters stay plain tensors, the first rank's on all; what is around them
    is split; checkpoints have all."""

    def ranks(rank):
        models = []
        # the second is built otherwise on each rank, and gets the first's weights
        for seed in (
            0,
            rank,
        ):
            torch.manual_seed(seed)
            models.append(WithScript(SCRIPTS[name]).double())
        whole, model = models
        apply_tensor_parallel(model, 2, example_inputs=rows())
        assert model.tensor_parallel_plan["mlp.0.weight"].units
        for _ in range(2):
            (x,) = make_rows()
            for m in whole, model:
                m.zero_grad()
                m(x).square().sum().backward()
            for (key, p), q in zip(model.named_parameters(), whole.parameters()):
                found = p.grad.full_tensor() if isinstance(p, DTensor) else p.grad
                torch.testing.assert_close(found, q.grad, rtol=1e-9, atol=1e-9, msg=key)
        model.eval()
        with torch.no_grad():
            close(model(x), whole(x), "output")
        save_checkpoint(tmp_path / "c", model)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        load_checkpoint(tmp_path / "c", model)
        close(model(x), whole(x), "output")

    run_ranks(ranks, 2)
