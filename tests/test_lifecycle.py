"""What a user does to a model before and after it is split: hooks, copies, dtypes,
other weights, calls of other kinds, errors."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers import compare, pair
from models.attention import Attention, both, given, near, step
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from torch.utils.checkpoint import checkpoint

from quintnet_dt import apply_tensor_parallel

# ---- hooks


@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_look_on(before):
    """Registered before, they see what they would see in the whole model; afterwards,
    where that is whole anyway."""

    def look(model, seen):
        block = model[0]
        for m in (
            model,
            block,
            *((block[0].qkv, block[0].o, *block[0].f) if before else ()),
        ):
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
            # the first call of a kind is traced, and hooks see that too
            if len(new[0]) == len(new[1]):
                assert len(new[0]) >= 4
                torch.testing.assert_close(new[1], new[0])
        assert len(new[0]) == len(new[1])

    run_ranks(ranks, 2)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_that_would_see_shards_are_refused(kind):
    def ranks(sharded, whole):
        compare(sharded, whole, given())
        if kind == "forward":
            handle = sharded.f[0].register_forward_hook(
                lambda m, args, out: out / out.norm()
            )
        else:
            handle = sharded.f[0].register_full_backward_hook(
                lambda m, grads, out: None
            )
        with pytest.raises(
            RuntimeError, match="f.0: a hook was added .* before apply_tensor_parallel"
        ):
            sharded(*given())
        handle.remove()
        compare(sharded, whole, given())

    both(ranks)


def test_a_hook_that_makes_the_weight():
    def build():
        return nn.Sequential(
            nn.utils.weight_norm(nn.Linear(16, 32)), nn.GELU(), nn.Linear(32, 16)
        )

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
        full = get_model_state_dict(
            sharded, options=StateDictOptions(full_state_dict=True)
        )
        assert all(torch.equal(full[k], v) for k, v in whole.state_dict().items())
        for model in (sharded, whole):
            model.apply(
                lambda m: (
                    nn.init.constant_(m.weight, 0.1)
                    if isinstance(m, nn.Linear)
                    else None
                )
            )
        compare(sharded, whole, given())

    both(ranks)


def test_modules_of_a_copy_are_its_own():
    """Replaced or set in a copy or in the model, they change the calls of that alone:
    softmax of shards, by the programs of a model with tanh there, would be wrong."""

    def build():
        norm = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(64))
        return nn.Sequential(nn.Linear(16, 64), norm, nn.Linear(64, 16))

    def ranks(rank):
        x = given(8, 16, dtype=torch.float64)
        sharded, whole = pair(build, 2, example_inputs=x)
        copied, copy_of_whole = copy.deepcopy((sharded, whole))
        compare(sharded, whole, x), compare(copied, copy_of_whole, x)
        # The states of calls: how norms are set in the model that is called.
        for model in copied, copy_of_whole:
            model[1][1].eval()
        compare(copied, copy_of_whole, x), compare(sharded, whole, x)
        paths = [model._forward_pre_hooks for model in (sharded, copied)]
        hooks = [next(h.__self__ for h in hooks.values()) for hooks in paths]
        states = [h.context.paths.states for h in hooks]
        assert states[1].moded[""][0] is copied[1][1]
        assert states[0].moded[""][0] is sharded[1][1]
        for model in copied, copy_of_whole:
            model[1][0] = nn.Softmax(-1)
        compare(copied, copy_of_whole, x), compare(sharded, whole, x)
        for model in sharded, whole:
            model[1][0] = nn.Tanh()
        compare(sharded, whole, x), compare(copied, copy_of_whole, x)

    run_ranks(ranks, 2)


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
            near(
                *(model(*given(dtype=torch.float32)) for model in (sharded, whole)),
                0.05,
            )
        step(sharded, whole, *given(dtype=torch.float32), 1e-4)

    both(ranks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_from_the_start(dtype):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = (
                nn.Linear(16, 32),
                nn.Linear(32, 16).float(),
                nn.LayerNorm(16),
            )

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
        for wrong in (
            given(2, 5, 15)[0],
            given(7, 5, 16)[0],
            given()[0].float(),
            "no",
            None,
        ):
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
    """An attribute, which the signature of a call does not show: the forward goes on
    with other programs in the middle."""

    class Layer(nn.Module):
        on = True

        def __init__(self, i=16, o=16):
            super().__init__()
            self.base, self.a, self.b = (
                nn.Linear(i, o),
                nn.Linear(i, 4),
                nn.Linear(4, o),
            )

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
                m(x).view(*x.shape[:2], 4, 4).transpose(1, 2)
                for m in (self.q, self.k, self.v)
            )
            x = x + self.o(
                F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            )
            return x + self.g(F.gelu(self.f(x)))

    def ranks(sharded, whole):
        for Layer.on in (first, not first, first, not first):
            compare(sharded, whole, given()), compare(
                sharded, whole, given(), grad=False
            )
        assert {e.how for e in sharded.tensor_parallel_plan.entries.values()} >= {
            "local"
        }

    def build():
        Layer.on = first
        return Adapted()

    both(ranks, build=build)


def test_checkpoints_of_two_kinds_of_call_before_one_backward():
    """A checkpoint runs again with the programs of its own forward, whatever was called
    since."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.s, self.n, self.m = (
                nn.Parameter(torch.randn(16)),
                nn.LayerNorm(16),
                nn.LayerNorm(16),
            )
            self.f, self.g = (
                nn.Sequential(nn.Linear(16, 128), nn.GELU(), nn.Linear(128, 16))
                for _ in range(2)
            )

        def forward(self, x, more=True):
            x = x * self.s
            y = torch.tanh(checkpoint(self.f, self.n(x), use_reentrant=True))
            return y + checkpoint(self.g, self.m(x), use_reentrant=True) if more else y

    def ranks(sharded, whole):
        for order in (0, 1), (1, 0):
            for model in (sharded, whole):
                model.zero_grad()
                out = [
                    model(*given(), more=bool(more)).square().sum() for more in order
                ]
                with torch.no_grad():
                    model(given()[0][0])
                sum(out).backward()
            for p, q in zip(sharded.parameters(), whole.parameters()):
                near(p.grad, q.grad, 1e-9)

    both(ranks, build=Two)
