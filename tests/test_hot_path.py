"""What runs at each step: parameters are read, calls watched, and modules looked at, as
seldom as may be, and right all the same."""

import copy

import torch
from helpers import check, pair, same_grads
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from quintnet_dt import apply_tensor_parallel
from quintnet_dt.running import structure


class Block(nn.Module):
    """Heads by hard-coded sizes, so that its calls are watched, and a norm, whose are
    not."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x):
        b, s, d = x.shape
        y = self.norm(x)
        shape = b, s, self.heads, d // self.heads
        q, k, v = (linear(y).view(shape).transpose(1, 2) for linear in self.qkv)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, s, d))
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    """A tied embedding, blocks of which a slice is run, checkpoints if asked for."""

    def __init__(self, checkpoints=False):
        super().__init__()
        self.checkpoints, self.blocks = checkpoints, nn.ModuleList([Block(), Block()])
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks[:2]:
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x)


def ids():
    return (torch.randint(0, 32, (2, 6)),)


def loss(model, given):
    return model(*given).square().mean()


def test_gradients_accumulate_in_tied_and_checkpointed_weights():
    def ranks(rank):
        for checkpoints in (False, True):
            torch.manual_seed(3)
            given = ids()
            model, whole = pair(lambda: Model(checkpoints), 2, example_inputs=given)
            for set_to_none in (True, False):
                model.zero_grad(set_to_none=set_to_none)
                whole.zero_grad(set_to_none=set_to_none)
                for m in (model, whole):
                    loss(m, given).backward()
                    again = loss(m, given)
                    again.backward(retain_graph=True)
                    again.backward()
                same_grads(model, whole)

    run_ranks(ranks, 2)


def test_hooks_on_gradients_run_in_order_and_once():
    def ranks(rank):
        given, ran = ids(), []
        model, whole = pair(Model, 2, example_inputs=given)
        for m in (model, whole):
            p = m.blocks[0].up.weight
            p.register_hook(lambda g: ran.append("one") or 2 * g)
            p.register_hook(lambda g: ran.append(type(g).__name__) or g + 1)
            p.register_post_accumulate_grad_hook(
                lambda p: ran.append(p.grad is not None)
            )
            loss(m, given).backward()
        assert ran == ["one", "DTensor", True, "one", "Tensor", True]
        same_grads(model, whole)

    run_ranks(ranks, 2)


def test_gradients_of_gradients_by_the_parameters():
    def ranks(rank):
        given = ids()
        model, whole = pair(Model, 2, example_inputs=given)
        for m in (model, whole):
            params = list(m.parameters())
            grads = torch.autograd.grad(loss(m, given), params, create_graph=True)
            squares = [
                (
                    g.full_tensor().square().sum()
                    if isinstance(g, DTensor)
                    else (g * g).sum()
                )
                for g in grads
            ]
            assert all(p.grad is None for p in params)
            sum(squares).backward()
        same_grads(model, whole)
        model.zero_grad(), whole.zero_grad()
        for m in (model, whole):
            loss(m, given).backward(inputs=[m.embed.weight])
        same_grads(model, whole)

    run_ranks(ranks, 2)


class Turned(nn.Module):
    """The gradient of `scale` comes with its dims the other way round in memory."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8, 32))
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(
            self.up(x).relu() * (x.t() @ self.scale.t().t()[:, :1]).sum()
        ) @ (self.scale.t().reshape(32, 8).t())


def test_a_gradient_laid_out_otherwise():
    def then(model, whole):
        for p in model.parameters():
            assert p.grad.stride() == p.stride()
            assert p.grad.to_local().stride() == p.to_local().stride()

    check(Turned, lambda: (torch.randn(8, 8),), then=then)


class Around(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Modes(nn.Module):
    """Other modes are put on and off around modules and calls that are watched."""

    def __init__(self):
        super().__init__()
        self.block, self.norm = Block(), nn.LayerNorm(16)

    def forward(self, x):
        with Around():
            x = self.norm(self.block(x))
            with torch.device("cpu"):
                return self.block(x) + torch.ones(16, dtype=x.dtype)


def test_modes_of_the_models_own_around_what_is_watched():
    def then(model, whole):
        with Around():
            check_again(model, whole)
        assert torch.overrides._get_current_function_mode() is None

    def check_again(model, whole):
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        torch.testing.assert_close(model(x), whole(x))

    check(Modes, lambda: (torch.randn(2, 5, 16),), then=then)


class Failing(Block):
    fails = False

    def forward(self, x):
        y = super().forward(x)
        if self.fails:
            raise ValueError("as asked")
        return y


def test_no_mode_is_left_on_after_an_error():
    def then(model, whole):
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        model.fails = True
        try:
            model(x)
        except ValueError:
            pass
        model.fails = False
        assert torch.overrides._get_current_function_mode() is None
        torch.testing.assert_close(model(x), whole(x))

    check(Failing, lambda: (torch.randn(2, 5, 16),), then=then)


def test_a_slice_of_blocks_is_no_change_of_the_model(monkeypatch):
    def ranks(rank):
        given, looked = ids(), []
        model = apply_tensor_parallel(Model(), 2, example_inputs=copy.deepcopy(given))
        model(*given)
        structure_of = structure.structure_of
        monkeypatch.setattr(
            structure,
            "structure_of",
            lambda *args: looked.append(args) or structure_of(*args),
        )
        model(*given)
        assert looked == []
        model.blocks[1] = nn.Sequential(model.blocks[1])
        model(*given)
        assert looked != []
        looked.clear()
        # a module that was added has no hooks of its own
        model.blocks[1].append(nn.ReLU())
        after = model(*given)
        assert looked != []
        assert after.shape == (2, 6, 32)

    run_ranks(ranks, 2)
