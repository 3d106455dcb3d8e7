"""What a model is set to around the split: dropout, eval, frozen parameters, adapters,
hooks, copies."""

import pytest
import torch
import torch.nn.functional as F
from helpers import check, compare, pair
from models.gpt import GPT, ConvNet, features, ids, mlp
from ranks import run_ranks
from torch import nn


@pytest.mark.parametrize("style", ["infer", "written"])
def test_dropout_equals_the_whole_models(style):
    def then(sharded, whole):
        sharded.eval(), whole.eval()
        compare(sharded, whole, (torch.arange(10).view(2, 5),))
        compare(sharded, whole, (torch.arange(10).view(2, 5),), grad=False)
        with torch.inference_mode():
            assert torch.allclose(
                sharded(torch.arange(8).view(1, 8)), whole(torch.arange(8).view(1, 8))
            )
        sharded.train(), whole.train()
        compare(sharded, whole, (torch.arange(10).view(2, 5),))

    check(
        lambda: GPT(dropout=0.3, style=style),
        ids(64, 2, 6),
        2,
        calls=[ids(64, 3, 4)],
        share=0.55,
        then=then,
    )


@pytest.mark.parametrize(
    "kind",
    [nn.Dropout2d, nn.AlphaDropout, nn.RReLU, "functional", "attention", "bernoulli"],
)
def test_other_random_operators(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)
            self.drop = (
                kind(0.4)
                if isinstance(kind, type) and kind is not nn.RReLU
                else nn.RReLU()
            )

        def forward(self, x):
            h = self.a(x)
            if kind == "functional":
                h = torch.dropout(h, 0.4, self.training)
                h = F.dropout(input=h, p=0.4, training=self.training)
                h = torch.nn.functional.dropout(
                    h.transpose(0, 1), 0.4, self.training
                ).transpose(0, 1)
            elif kind == "attention":
                h = h.view(h.shape[0], h.shape[1], 4, 8).transpose(1, 2)
                h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.4)
                h = h.transpose(1, 2).flatten(2)
            elif kind == "bernoulli":
                h = h * torch.bernoulli(torch.full_like(h, 0.5)) * (
                    torch.rand_like(h) > 0.3
                ) + torch.randn(h.shape)
            else:
                h = self.drop(h)
            return self.b(h)

    check(Net, features(2, 6, 8), 2)


def test_eval_after_train_with_batch_norm():
    def then(sharded, whole):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for train in (False, True, False):
            sharded.train(train), whole.train(train)
            compare(sharded, whole, (x,))

    check(ConvNet, features(2, 3, 8, 8), 2, then=then)


def test_frozen_parameters_and_no_grad():
    def half():
        model = GPT(norm=True)
        for p in [*model.wte.parameters(), *model.blocks[0].attn.parameters()]:
            p.requires_grad_(False)
        return model

    def all_frozen():
        return GPT(norm=True).requires_grad_(False)

    check(half, ids(64, 2, 6), 2, share=0.55)
    check(all_frozen, ids(64, 2, 6), 2, grad=False, share=0.55)


@pytest.mark.parametrize("called_before", [False, True])
def test_thawed_after_it_was_sharded(called_before):
    def ranks(rank):
        x = torch.arange(12).view(2, 6)
        sharded, whole = pair(
            lambda: GPT(norm=True).requires_grad_(False), 2, example_inputs=(x,)
        )
        if called_before:
            compare(sharded, whole, (x,), grad=False)
        sharded.requires_grad_(), whole.requires_grad_()
        compare(sharded, whole, (x,))

    run_ranks(ranks, 2)


def test_adapters_on_a_frozen_model():
    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(
                4, base.out_features, bias=False
            )

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    def build():
        model = GPT().requires_grad_(False)
        for block in model.blocks:
            for name in "qvo":
                setattr(block.attn, name, LoRA(getattr(block.attn, name)))
        return model

    check(build, ids(64, 2, 6), 2, share=0.6)


def test_hooks_that_are_there_already():
    """A hook of the user's may change inputs and outputs, and runs once a call."""

    def build():
        model = nn.Sequential(mlp(), nn.Linear(16, 8))
        model.register_forward_pre_hook(lambda m, args: (args[0].flatten(1),))
        model[0][0].register_forward_hook(lambda m, args, out: out * 2)
        model[0].register_forward_pre_hook(
            lambda m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
        )
        model.count = []
        model.register_forward_hook(lambda m, args, out: m.count.append(1))
        return model

    def then(sharded, whole):
        assert len(sharded.count) == len(whole.count)

    calls = [features(5, 4, 4), features(1, 4, 4)]
    check(build, features(3, 4, 4), 2, share=0.6, calls=calls, then=then)


def test_hook_that_changes_the_kind_of_input():
    def build():
        model = mlp()
        model.register_forward_pre_hook(lambda m, args: (torch.stack(args[0], -1),))
        return model

    def given():
        return ([torch.randn(3) for _ in range(16)],)

    check(build, given, 2, calls=[lambda: ([torch.randn(1) for _ in range(16)],)])


def test_copy_and_reload_of_a_sharded_model():
    import copy

    def then(sharded, whole):
        again = copy.deepcopy(sharded)
        again.tensor_parallel_mesh = sharded.tensor_parallel_mesh
        compare(
            again,
            whole,
            (torch.randn(2, 16, generator=torch.Generator().manual_seed(0)),),
        )
        with torch.no_grad():
            for model in (again, whole):
                for p in model.parameters():
                    p.mul_(1.5)
        sharded.load_state_dict(again.state_dict())
        compare(sharded, whole, (torch.ones(2, 16),))

    check(mlp, features(3, 16), 2, then=then)


def test_after_an_exception_the_model_still_works():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x, fail=False):
            h = self.a(x).view(x.shape[0], 4, 8)
            if fail:
                raise KeyError("in the middle")
            return self.b(h.reshape(x.shape[0], 32))

    def then(sharded, whole):
        for _ in range(2):
            with pytest.raises(KeyError):
                sharded(torch.ones(2, 8).double(), fail=True)
        with pytest.raises(RuntimeError):
            sharded(torch.ones(2, 9).double())
        compare(sharded, whole, (torch.ones(2, 8),))

    check(Net, features(3, 8), 2, then=then)
