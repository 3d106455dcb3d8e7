"""What a user does to a model before and after it is split: hooks, copies, dtypes, other weights,
errors; and what is refused."""

import copy
import gc
import io
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import compare, pair
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from quintnet_dt import apply_tensor_parallel, plan_tensor_parallel, rewrite


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.f = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.register_buffer("mask", torch.tril(torch.ones(16, 16)).bool())

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        s = (q @ k.mT).masked_fill(~self.mask[: x.shape[1], : x.shape[1]], -1e4)
        x = x + self.o((s.softmax(-1) @ v).transpose(1, 2).flatten(2))
        if len(x) == 7:
            raise ValueError("seven")
        return x + self.f(x)

    def encode(self, x):
        return self.f(self.qkv(x)[..., :16])


def given(*shape, dtype=torch.float64):
    return (
        torch.randn(*shape or (2, 5, 16), generator=torch.Generator().manual_seed(5)).to(dtype),
    )


def both(ranks, n=2, build=Attention, **options):
    """Run `ranks(sharded, whole)` on n ranks; what it raises is raised."""
    run_ranks(lambda rank: ranks(*pair(build, n, example_inputs=given(), **options)), n)


def near(found, whole, tol):
    found = found.full_tensor() if isinstance(found, DTensor) else found
    assert found.dtype == whole.dtype
    error = (found.double() - whole.double()).abs().max() / whole.double().abs().max().clamp(
        min=1e-30
    )
    assert error <= tol, f"relative error {error:.1e}"


def step(sharded, whole, x, tol):
    """Outputs and gradients of one step in any dtype."""
    out = [model(x) for model in (sharded, whole)]
    near(*out, tol)
    for model, y in zip((sharded, whole), out):
        model.zero_grad()
        y.float().square().sum().backward()
    for p, q in zip(sharded.parameters(), whole.parameters()):
        near(p.grad, q.grad, 2 * tol)


# ---- hooks


@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_look_on(before):
    """Registered before, they see what they would see in the whole model; afterwards, where that is
    whole anyway."""

    def look(model, seen):
        block = model[0]
        for m in (model, block, *((block[0].qkv, block[0].o, *block[0].f) if before else ())):
            m.register_forward_hook(
                lambda m, args, out: seen.append((args[0].detach(), out.detach()))
            )
            m.register_full_backward_pre_hook(lambda m, grads: seen.append(grads))

    def ranks(rank):
        seen = [], []
        unhooked = iter(seen)

        def build():
            model = nn.Sequential(nn.Sequential(Attention()), nn.Linear(16, 16))
            if before:
                look(model, next(unhooked))
            return model

        models = pair(build, 2, example_inputs=given())[::-1]
        for model, found in zip(() if before else models, seen):
            look(model, found)
        for x in (given(), given(), given(1, 7, 16), given(1, 8, 16)):
            kept = [list(found) for found in seen]
            compare(*models[::-1], x)
            new = [found[len(old) :] for found, old in zip(seen, kept)]
            if len(new[0]) == len(
                new[1]
            ):  # the first call of a kind is traced, and hooks see that too
                assert len(new[0]) >= 4
                torch.testing.assert_close(new[1], new[0])
        assert len(new[0]) == len(new[1])

    run_ranks(ranks, 2)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_that_would_see_shards_are_refused(kind):
    def ranks(sharded, whole):
        compare(sharded, whole, given())
        if kind == "forward":
            handle = sharded.f[0].register_forward_hook(lambda m, args, out: out / out.norm())
        else:
            handle = sharded.f[0].register_full_backward_hook(lambda m, grads, out: None)
        with pytest.raises(
            RuntimeError, match="f.0: a hook was added .* before apply_tensor_parallel"
        ):
            sharded(*given())
        handle.remove()
        compare(sharded, whole, given())

    both(ranks)


def test_a_hook_that_makes_the_weight():
    def build():
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(16, 32)), nn.GELU(), nn.Linear(32, 16))

    with pytest.warns(FutureWarning):
        build()

    def ranks(rank):
        import warnings

        warnings.simplefilter("ignore")
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(build().double())
        sharded, whole = models
        for model in models:
            del model[0].weight  # a tensor computed from parameters is not copied
            model(*given(2, 16))
        apply_tensor_parallel(sharded, 2, example_inputs=given(2, 16))
        compare(sharded, whole, given(2, 16)), compare(sharded, whole, given(3, 16))

    run_ranks(ranks, 2)


# ---- copies, other weights, dtypes


def test_copies_and_saved_weights():
    def ranks(sharded, whole):
        compare(sharded, whole, given())
        again, part, layer = (
            copy.deepcopy(sharded),
            copy.deepcopy(sharded.f),
            copy.deepcopy(sharded.f[0]),
        )
        state = io.BytesIO()
        torch.save(sharded.state_dict(), state), state.seek(0)
        with torch.no_grad():
            for p in sharded.parameters():
                p.mul_(2)
        for copied, from_ in (again, whole), (part, whole.f), (layer, whole.f[0]):
            copied.tensor_parallel_mesh = sharded.tensor_parallel_mesh
            compare(
                copied,
                copy.deepcopy(from_),
                given(3, 16, dtype=torch.float64) if from_ is not whole else given(),
            )
        sharded.load_state_dict(torch.load(state))
        compare(sharded, whole, given(3, 4, 16))
        full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        assert all(torch.equal(full[k], v) for k, v in whole.state_dict().items())
        for model in (sharded, whole):
            model.apply(
                lambda m: nn.init.constant_(m.weight, 0.1) if isinstance(m, nn.Linear) else None
            )
        compare(sharded, whole, given())

    both(ranks)


def test_other_dtypes_afterwards():
    def ranks(sharded, whole):
        for dtype, tol in (
            (torch.bfloat16, 0.05),
            (torch.float32, 1e-4),
            (torch.float16, 0.02),
            (torch.float64, 1e-9),
        ):
            sharded.to(dtype), whole.to(dtype)
            step(sharded, whole, *given(dtype=dtype), tol)
        sharded.float(), whole.float()
        with torch.autocast("cpu", torch.bfloat16):
            near(*(model(*given(dtype=torch.float32)) for model in (sharded, whole)), 0.05)
        step(sharded, whole, *given(dtype=torch.float32), 1e-4)

    both(ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_from_the_start(dtype):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = nn.Linear(16, 32), nn.Linear(32, 16).float(), nn.LayerNorm(16)

        def forward(self, x):
            return self.n(self.b(F.gelu(self.a(x)).to(self.b.weight.dtype)).to(x.dtype))

    def ranks(rank):
        for build in Attention, Mixed:
            models = []
            for _ in range(2):
                torch.manual_seed(0)
                models.append(build().to(dtype))
            if build is Mixed:
                models[0].b.float(), models[1].b.float()
            apply_tensor_parallel(models[0], 2, example_inputs=given(dtype=dtype))
            step(*models, *given(dtype=dtype), 0.05)

    run_ranks(ranks, 2)


# ---- calls of other kinds, and errors


def test_parts_methods_and_toggled_gradients():
    def ranks(sharded, whole):
        for part in "f", "qkv", "f.2":
            x = given(3, 32) if part == "f.2" else given(3, 16)
            models = sharded.get_submodule(part), whole.get_submodule(part)
            models[0].tensor_parallel_mesh = sharded.tensor_parallel_mesh
            compare(*models, x)
        near(sharded.encode(*given()), whole.encode(*given()), 1e-9)
        for model in (sharded, whole):
            model.requires_grad_(False)
            model.f[0].requires_grad_(True)
        compare(sharded, whole, given())
        x, y = (given()[0].requires_grad_() for _ in range(2))
        for model, t in (sharded, x), (whole, y):
            model.requires_grad_(False)(t).sum().backward()
        near(x.grad, y.grad, 1e-9)
        with torch.inference_mode():
            near(sharded(*given()), whole(*given()), 1e-9)

    both(ranks)


def test_after_errors_the_next_call_works():
    def ranks(sharded, whole):
        for wrong in given(2, 5, 15)[0], given(7, 5, 16)[0], given()[0].float(), "no", None:
            with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError)):
                sharded(wrong)
            compare(sharded, whole, given())
        x = given()[0].requires_grad_()
        y = sharded(x)
        x.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            y.sum().backward()
        compare(sharded, whole, given())

    both(ranks)


@pytest.mark.parametrize("first", [True, False])
def test_a_switch_that_changes_the_path(first):
    """An attribute, which the signature of a call does not show: the forward goes on with other
    programs in the middle."""

    class Layer(nn.Module):
        on = True

        def __init__(self, i=16, o=16):
            super().__init__()
            self.base, self.a, self.b = nn.Linear(i, o), nn.Linear(i, 4), nn.Linear(4, o)

        def forward(self, x):
            y = self.base(x)
            return y + self.b(self.a(x)) if Layer.on else y

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o, self.f, self.g = (
                *(Layer() for _ in "qkvo"),
                Layer(16, 32),
                Layer(32, 16),
            )

        def forward(self, x):
            q, k, v = (
                m(x).view(*x.shape[:2], 4, 4).transpose(1, 2) for m in (self.q, self.k, self.v)
            )
            x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.g(F.gelu(self.f(x)))

    def ranks(sharded, whole):
        for Layer.on in (first, not first, first, not first):
            compare(sharded, whole, given()), compare(sharded, whole, given(), grad=False)
        assert {e.how for e in sharded.tensor_parallel_plan.entries.values()} >= {"local"}

    def build():
        Layer.on = first
        return Adapted()

    both(ranks, build=build)


def test_checkpoints_of_two_kinds_of_call_before_one_backward():
    """A checkpoint runs again with the programs of its own forward, whatever was called since."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.s, self.n, self.m = (
                nn.Parameter(torch.randn(16)),
                nn.LayerNorm(16),
                nn.LayerNorm(16),
            )
            self.f, self.g = (
                nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 16)) for _ in range(2)
            )

        def forward(self, x, more=True):
            x = x * self.s
            y = torch.tanh(checkpoint(self.f, self.n(x), use_reentrant=True))
            return y + checkpoint(self.g, self.m(x), use_reentrant=True) if more else y

    def ranks(sharded, whole):
        for order in (0, 1), (1, 0):
            for model in (sharded, whole):
                model.zero_grad()
                out = [model(*given(), more=bool(more)).square().sum() for more in order]
                with torch.no_grad():
                    model(given()[0][0])
                sum(out).backward()
            for p, q in zip(sharded.parameters(), whole.parameters()):
                near(p.grad, q.grad, 1e-9)

    both(ranks, build=Two)


# ---- refused


class Holds(nn.Module):
    """Reads its weight through something that keeps the parameter itself."""

    def __init__(self, how):
        super().__init__()
        self.w = w = nn.Parameter(torch.randn(16, 16))
        if how == "list":
            self.read = [w]
        elif how == "partial":
            self.read = partial(torch.matmul, other=w)
        elif how == "lambda":
            self.read = lambda x: x @ w
        else:
            self.optimizer = torch.optim.SGD([w], 0.1)

    def forward(self, x):
        read = getattr(self, "read", None)
        return x @ self.w if read is None else x @ read[0] if isinstance(read, list) else read(x)


@pytest.mark.parametrize("how", ["list", "partial", "lambda", "optimizer"])
def test_parameters_that_something_else_holds(how):
    """It would go on with the whole, old parameter."""
    with pytest.raises(ValueError, match="w: expected every parameter .* attribute of its module"):
        plan_tensor_parallel(Holds(how), 2, example_inputs=(torch.ones(2, 16),))


def test_parameters_that_were_replaced():
    def ranks(sharded, whole):
        state = copy.deepcopy(sharded.state_dict())
        for assigned in whole.state_dict(), state:  # whole tensors, and DTensors
            sharded.load_state_dict(assigned, assign=True)
            compare(sharded, whole, given())
        sharded.f[2].weight = nn.Parameter(torch.randn(16, 32, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="f.2.weight: expected the DTensor"):
            sharded(*given())
        apply_tensor_parallel(sharded, 2, example_inputs=given())  # splits what is new
        whole.f[2].weight.data.copy_(sharded.f[2].weight.full_tensor())
        compare(sharded, whole, given())
        with pytest.raises(ValueError, match="split already"):
            apply_tensor_parallel(sharded, 2)

    both(ranks)


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_whole_state_that_one_rank_has(contiguous):
    """torch fills fused pieces wrongly from a broadcast; it is told, or with `contiguous` it is
    right."""

    def ranks(sharded, whole):
        fused = sharded.tensor_parallel_plan["qkv.weight"]
        assert fused.pieces == (1 if contiguous else 3)
        state = {k: v + 1 for k, v in whole.state_dict().items()} if dist.get_rank() == 0 else {}
        state.update({"mask": whole.mask} if state else {})
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        if not contiguous:
            with pytest.raises(RuntimeError, match="filled qkv.weight, .* wrongly"):
                set_model_state_dict(sharded, state, options=options)
            state, options = {k: v + 1 for k, v in whole.state_dict().items()}, StateDictOptions(
                full_state_dict=True
            )
            state["mask"] = whole.mask
        set_model_state_dict(sharded, state, options=options)
        whole.load_state_dict(
            {k: v + 1 if v.is_floating_point() else v for k, v in whole.state_dict().items()}
        )
        compare(sharded, whole, given())

    both(ranks, contiguous=contiguous)


def test_fused_weights_are_blocks_before_torch_2_13(monkeypatch):
    """There DTensor cannot gather the other kind."""
    monkeypatch.setattr(rewrite, "SINCE_2_13", False)

    def ranks(sharded, whole):
        assert sharded.tensor_parallel_plan["qkv.weight"].pieces == 1
        compare(sharded, whole, given())

    both(ranks)


class Scaled(Attention):
    def forward(self, x, scale):
        return super().forward(x) * scale["by"]


@pytest.mark.parametrize("blind", [True, False])
def test_a_model_that_is_split_again(blind):
    """Placements stay, fused pieces among them, also where no inputs are known that fit; what was
    asked for besides holds, or is refused."""

    def ranks(rank):
        inputs = (*given(), {"by": torch.tensor(2.0, dtype=torch.float64)})
        sharded, whole = pair(Scaled, 2, example_inputs=inputs)
        before = {name: p.placements for name, p in sharded.named_parameters()}
        assert sharded.tensor_parallel_plan["qkv.weight"].pieces == 3
        sharded.o, whole.o = (nn.Linear(16, 16, dtype=torch.float64) for _ in range(2))
        with pytest.raises(
            ValueError, match="plan: expected none for a model that was split before, found a dict"
        ):
            apply_tensor_parallel(sharded, 2, example_inputs=inputs, plan={})
        with (
            pytest.warns(UserWarning, match="planned without a forward") if blind else nullcontext()
        ):
            apply_tensor_parallel(
                sharded,
                2,
                example_inputs=None if blind else inputs,
                contiguous=True,
                loss_parallel=not blind,
            )
        for name, p in sharded.named_parameters():
            assert p.placements == before[name] or name.startswith("o.")
        whole.o.load_state_dict({k: p.full_tensor() for k, p in sharded.o.state_dict().items()})
        assert sharded.tensor_parallel_plan.loss_parallel != blind
        if blind:
            compare(sharded, whole, inputs)
        else:
            found = sharded(*inputs)
            near(found, whole(*inputs), 1e-9)

    run_ranks(ranks, 2)


def test_a_plan_keeps_its_loss_parallel():
    def ranks(rank):
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 32, bias=False)).double()
        plan = plan_tensor_parallel(model, 2, example_inputs=given(), loss_parallel=True)
        apply_tensor_parallel(model, 2, example_inputs=given(), plan=plan)
        assert model.tensor_parallel_plan.loss_parallel
        outputs = [
            type(model(*given())),
            type(model.eval()(*given())),
        ]  # a path that was traced, and one that was not
        assert outputs[0] is outputs[1]

    run_ranks(ranks, 2)


def test_nothing_is_kept_of_a_step():
    """The autograd graph of a forward is freed with its output, also where one tensor enters
    several regions."""

    def ranks(sharded, whole):
        def alive():
            gc.collect()
            return sum(type(x) is torch.Tensor and x.grad_fn is not None for x in gc.get_objects())

        (x,) = given()
        x.requires_grad_()
        for step in range(6):
            loss = sharded(x).square().sum()
            if step % 2:
                loss.backward()
            with torch.no_grad():
                sharded(x)
            del loss
            if step == 1:
                before = alive()
        assert alive() == before and not hasattr(x, "_tp_kept")

    both(ranks)
