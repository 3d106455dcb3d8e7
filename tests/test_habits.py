"""What users do around a split model, before the split and between its calls."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import close, compare, make, pair
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from quintnet_dt import apply_tensor_parallel
from quintnet_dt.planning.paths import VALUES
from quintnet_dt.running.structure import hooks_on


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.b(self.a(x).relu())


# ---- hung on the model before the split


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_optimizers_of_before(kind):
    """They go on with the DTensors, and with the state that they have."""

    def ranks(rank):
        x, models = inputs(4, 16), [make(MLP), make(MLP)]
        options = {"momentum": 0.9} if kind == "SGD" else {}
        optimizers = [
            getattr(torch.optim, kind)(m.parameters(), lr=0.05, **options)
            for m in models
        ]
        held = list(models[0].parameters())
        for step in range(4):
            if step == 2:
                apply_tensor_parallel(models[0], 2, example_inputs=(x,))
            for model, optimizer in zip(models, optimizers):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        assert all(p is q for p, q in zip(held, models[0].parameters()))
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            close(p.detach().full_tensor(), q.detach(), "a parameter")
        assert all(isinstance(p, DTensor) for p in optimizers[0].state)

    run_ranks(ranks, 2)


def test_what_else_holds_parameters():
    def ranks(rank):
        model = make(MLP)
        holder = type("Holder", (), {})()
        holder.weight, by_name = model.a.weight, {"w": model.b.weight}
        apply_tensor_parallel(model, 2, example_inputs=(inputs(4, 16),))
        assert holder.weight is model.a.weight and by_name["w"] is model.b.weight
        other = make(MLP)
        holder.both = (other.a.weight, other.b.weight)
        with pytest.raises(RuntimeError, match="found them in a tuple"):
            apply_tensor_parallel(other, 2, example_inputs=(inputs(4, 16),))

    run_ranks(ranks, 2)


def test_hooks_on_parameters():
    """They run once, on the DTensor's gradient; a handle takes its own off."""

    def ranks(rank):
        x, model, ran = inputs(4, 16), make(MLP), []
        handle = model.a.weight.register_hook(lambda g: ran.append(type(g)) or g * 0)
        model.b.weight.register_post_accumulate_grad_hook(
            lambda p: ran.append(type(p.grad))
        )
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        model(x).sum().backward()
        assert ran == [DTensor, DTensor] and not model.a.weight.grad.full_tensor().any()
        handle.remove()
        model.zero_grad()
        model(x).sum().backward()
        assert len(ran) == 3 and model.a.weight.grad.full_tensor().any()

    run_ranks(ranks, 2)


# ---- changed between calls


@pytest.mark.parametrize("how", ["inference mode", "numpy", "data"])
def test_a_refilled_input(how):
    class Entry(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.down = nn.Parameter(torch.rand(64)), nn.Linear(64, 8)

        def forward(self, x):
            return self.down((x * self.gain).relu())

    def ranks(rank):
        sharded, whole = pair(Entry, 2, example_inputs=(inputs(4, 64),))
        with torch.inference_mode() if how == "inference mode" else torch.no_grad():
            x = torch.zeros(4, 64, dtype=torch.float64)
            for seed in range(4):
                new = inputs(4, 64, seed=seed)
                if how == "numpy":
                    x.numpy()[:] = new.numpy()
                else:
                    (x.data if how == "data" else x).copy_(new)
                close(sharded(x), whole(x), f"call {seed}")

    run_ranks(ranks, 2)


def test_a_buffer_moved_through_data():
    class Shifted(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.zeros(64))

        def forward(self, x):
            return self.b((self.a(x) + self.shift).relu())

    def ranks(rank):
        sharded, whole = pair(Shifted, 2, example_inputs=(inputs(4, 16),))
        for seed in range(3):
            for model in sharded, whole:
                model.shift.data.copy_(inputs(64, seed=seed))
            compare(sharded, whole, (inputs(4, 16),))

    run_ranks(ranks, 2)


class Dropping(nn.Module):
    def __init__(self, by_function=False):
        super().__init__()
        self.up, self.inner, self.down, self.outer = (
            nn.Linear(32, 64),
            nn.Dropout(0.0),
            nn.Linear(64, 32),
            nn.Dropout(0.0),
        )
        self.norm, self.p, self.by_function = nn.LayerNorm(32), 0.0, by_function

    def forward(self, x):
        y = self.down(self.inner(self.up(x).relu()))
        y = F.dropout(y, self.p, self.training) if self.by_function else self.outer(y)
        return self.norm(x + y)


def test_dropout_turned_on_later():
    """By its p, within a region and outside of it, and by the mode of the Dropout
    modules alone; ranks that are seeded otherwise draw the same."""

    def alike(sharded, whole, x, rank):
        torch.manual_seed(7)
        found = sharded(x)
        torch.manual_seed(7)
        close(found, whole(x), "the output")
        torch.manual_seed(100 + rank)
        found = sharded(x).detach()
        everyone = [torch.empty_like(found) for _ in range(2)]
        torch.distributed.all_gather(everyone, found)
        assert torch.equal(*everyone)

    def ranks(rank):
        x = inputs(4, 32)
        for by_function in False, True:
            sharded, whole = pair(lambda: Dropping(by_function), 2, example_inputs=(x,))
            for _ in range(3):
                sharded(x)
            for settings in (
                {"inner": 0.5},
                {"inner": 0.0, "outer": 0.3, "p": 0.3},
                {"outer": 0.0, "p": 0.0},
            ):
                for model in sharded, whole:
                    for name, p in settings.items():
                        setattr(
                            *(
                                (model, "p")
                                if name == "p"
                                else (getattr(model, name), "p")
                            ),
                            p,
                        )
                alike(sharded, whole, x, rank)
            for model in sharded, whole:
                model.eval()
                model.inner.p = model.outer.p = 0.5
            for _ in range(3):
                close(sharded(x), whole(x), "in eval mode")
            for model in sharded, whole:
                model.inner.train(), model.outer.train()
            alike(sharded, whole, x, rank)

    run_ranks(ranks, 2)


@pytest.mark.parametrize("n", [2, 4])
def test_masks_are_drawn_in_the_whole_models_order(n):
    """Of a tensor that is not contiguous in the whole model, where a collective makes
    it so."""

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
            self.first, self.last = nn.Conv1d(16, 32, 1), nn.Linear(32, 16)

        def forward(self, x):
            y = self.down(self.up(x).relu().transpose(0, 1)).transpose(0, 1)
            y = F.dropout(y, 0.3, self.training)
            z = self.first(y.transpose(1, 2)).transpose(1, 2)
            return self.last(F.dropout(z, 0.3, self.training)) * torch.rand_like(
                y.transpose(0, 1)
            ).transpose(0, 1)

    def ranks(rank):
        sharded, whole = pair(Transposed, n, example_inputs=(inputs(2, 6, 16),))
        compare(sharded, whole, (inputs(2, 6, 16),))
        compare(sharded, whole, (inputs(3, 5, 16),))

    run_ranks(ranks, n)


def test_attributes_set_later():
    """Class weights of a cross entropy on sharded classes; the dim of a softmax on
    shards."""

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.h, self.weights, self.dim = (
                nn.Embedding(64, 32),
                nn.Linear(32, 64, bias=False),
                None,
                1,
            )

        def forward(self, i, t):
            logits = self.h(self.e(i)).softmax(self.dim) * 9
            return F.cross_entropy(
                logits.flatten(0, 1), t.flatten(), weight=self.weights
            )

    def ranks(rank):
        i, t = (
            torch.randint(0, 64, (3, 6), generator=torch.Generator().manual_seed(k))
            for k in range(2)
        )
        sharded, whole = pair(
            Classes, 2, example_inputs=(i, t), plan={"h.weight": Shard(0)}
        )
        for weights, dim in (
            (None, 1),
            (torch.linspace(0, 5, 64).double(), 1),
            (None, 1),
            (None, 2),
            (None, 0),
        ):
            for model in sharded, whole:
                model.weights, model.dim = weights, dim
            compare(sharded, whole, (i, t))

    run_ranks(ranks, 2)


def test_numbers_that_change_at_every_call():
    """After the second value a number is unknown: the call is shown once more, and
    never again."""

    class Timed(MLP):
        def forward(self, x, t, step=0):
            return self.b(self.a(x).relu() * t) + step

    def ranks(rank):
        sharded, whole = pair(Timed, 2, example_inputs=(inputs(4, 16), 0.5))
        for i in range(6):
            compare(sharded, whole, (inputs(4, 16), 0.1 * i, i))
        known = hooks_on(sharded).context.paths.learned
        assert len(known) <= 2 * (VALUES + 1)

    run_ranks(ranks, 2)


# ---- kept and seen

SEEN = []


class Store:
    def __init__(self):
        self.maps, self.last = [], None

    def __call__(self, x):
        self.maps.append(x)
        self.last = {"x": x}
        return x


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.store = Store()

    def forward(self, x):
        q, k, v = (
            m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        a = self.store((q @ k.mT).softmax(-1))
        SEEN.append(a)
        return self.o((a @ v).transpose(1, 2).flatten(2))


def test_what_a_forward_leaves_elsewhere_is_whole():
    def ranks(rank):
        gc.unfreeze()  # SEEN was there before the fork
        x = inputs(2, 5, 32)
        sharded, whole = pair(Watched, 2, example_inputs=(x,))
        assert not SEEN  # what was traced is taken out of it
        compare(sharded, whole, (x,))
        for a, b in (
            SEEN,
            (sharded.store.maps[-1], whole.store.maps[-1]),
            (sharded.store.last["x"], whole.store.last["x"]),
        ):
            close(a.detach(), b.detach(), "what was kept")

    run_ranks(ranks, 2)


def test_hooks_on_all_modules():
    def ranks(rank):
        x, shapes = inputs(4, 16), []
        model = make(MLP)
        register = nn.modules.module.register_module_forward_hook
        handle = register(lambda m, args, out: shapes.append(tuple(out.shape)))
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        shapes.clear()
        model(x)
        assert shapes == [(4, 64), (4, 8), (4, 8)]
        handle.remove()
        model = apply_tensor_parallel(make(MLP), 2, example_inputs=(x,))
        handle = register(lambda m, args, out: None)
        with pytest.raises(
            RuntimeError, match="registered for all modules since the model was split"
        ):
            model(x)
        handle.remove()
        model(x)

    run_ranks(ranks, 2)


# ---- weights changed from outside


def test_data_assigned():
    def ranks(rank):
        x = inputs(4, 16)
        sharded, whole = pair(MLP, 2, example_inputs=(x,))
        for model in sharded, whole:
            for p in model.parameters():
                p.data += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(sharded, whole, (x,))
        for p in sharded.parameters():
            p.data = p.data * 2
        with pytest.raises(
            RuntimeError,
            match="a.weight.*found `.data` assigned, which changes nothing",
        ):
            sharded.eval()(x)
        with torch.no_grad():
            for p, q in zip(sharded.parameters(), whole.parameters()):
                p.copy_(2 * p), q.copy_(2 * q)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compare(sharded, whole.eval(), (x,))

    run_ranks(ranks, 2)


def test_initialised_after_the_split():
    def ranks(rank):
        x = inputs(4, 16)
        model = apply_tensor_parallel(
            make(lambda: nn.Sequential(MLP(), nn.LayerNorm(8))), 2, example_inputs=(x,)
        )
        torch.manual_seed(rank)
        nn.init.normal_(model[1].weight)
        with pytest.raises(
            RuntimeError, match="1.weight: expected the same values on every rank"
        ):
            model(x)
        nn.init.ones_(model[1].weight)
        torch.manual_seed(0)
        nn.init.normal_(model[0].a.weight)
        with pytest.warns(
            UserWarning,
            match="0.a.weight: every rank's shard begins with the same numbers",
        ):
            model.eval()(x)

    run_ranks(ranks, 2)


class TakesItsOwnGradients(nn.Module):
    def __init__(self, of_a_parameter):
        super().__init__()
        self.up, self.down, self.of_a_parameter = (
            nn.Linear(8, 32),
            nn.Linear(32, 8),
            of_a_parameter,
        )

    def forward(self, x):
        z = x.detach().requires_grad_()
        y = self.down(self.up(z).tanh())
        (g,) = torch.autograd.grad(
            y.sum(), self.up.weight if self.of_a_parameter else z, create_graph=True
        )
        return y, g.sum()


def test_hooks_on_parameters_in_a_forward_that_takes_gradients():
    """Of something else than the parameter they are none of its affair."""

    def ranks(rank):
        x = torch.randn(
            3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        torch.manual_seed(0)
        whole = TakesItsOwnGradients(False).double()
        model = copy.deepcopy(whole)
        for m in whole, model:
            m.up.weight.register_hook(lambda grad: 2 * grad)
        apply_tensor_parallel(model, 2, example_inputs=(x,))
        for m in whole, model:
            sum(out.sum() for out in m(x)).backward()
        for p, q in zip(model.parameters(), whole.parameters()):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad)
        model = TakesItsOwnGradients(True).double()
        model.up.weight.register_hook(lambda grad: 2 * grad)
        with pytest.raises(
            RuntimeError,
            match="up.weight: expected no hook .* a forward takes itself, found one",
        ):
            apply_tensor_parallel(model, 2, example_inputs=(x,))

    run_ranks(ranks, 2)
