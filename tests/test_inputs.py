"""Example inputs: what a user may give, and what is made up."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quintnet_dt import plan_tensor_parallel
from quintnet_dt.tracing.inputs import check, made_up

CPU = torch.device("cpu")


class Model(nn.Module):
    """A model with the given layer and a forward of the given signature."""

    def __init__(self, layer, forward=None):
        super().__init__()
        self.layer = layer
        if forward is not None:
            self.forward = forward

    def forward(self, x):
        return self.layer(x)


def first(model):
    return next(iter(made_up(model, CPU)))


def fits(model):
    """The first of the made-up inputs that the model takes."""
    for args, kwargs in made_up(model, CPU):
        try:
            model(*args, **kwargs)
            return args, kwargs
        except Exception:
            continue
    raise AssertionError("none fits")


def test_check():
    x = torch.ones(2)
    assert (
        check((x,)) == ((x,), {})
        and check([x]) == ((x,), {})
        and check({"x": x}) == ((), {"x": x})
    )
    assert check(()) == ((), {}) and check({}) == ((), {})


@pytest.mark.parametrize("wrong", [torch.ones(2), 3, "ab", {1, 2}])
def test_check_says_what_it_wants(wrong):
    with pytest.raises(TypeError, match=f"tuple.*dict.*{type(wrong).__name__}"):
        check(wrong)
    with pytest.raises(TypeError, match="example_inputs"):
        plan_tensor_parallel(nn.Linear(2, 2), 2, example_inputs=wrong)


def test_token_ids_for_an_embedding():
    args, kwargs = first(Model(nn.Embedding(10, 4)))
    assert args == () and set(kwargs) == {"x"}
    ids = kwargs["x"]
    assert (
        ids.dtype == torch.int64
        and ids.dim() == 2
        and 0 <= ids.min()
        and ids.max() < 10
    )


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_token_ids_for_a_tiny_embedding(rows):
    fits(Model(nn.Embedding(rows, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_for_a_linear(dtype):
    _, kwargs = first(Model(nn.Linear(6, 4, dtype=dtype)))
    assert kwargs["x"].shape[-1] == 6 and kwargs["x"].dtype == dtype


@pytest.mark.parametrize("conv, dims", [(nn.Conv1d, 3), (nn.Conv2d, 4), (nn.Conv3d, 5)])
def test_an_image_for_a_convolution(conv, dims):
    _, kwargs = first(Model(conv(3, 4, 3)))
    assert kwargs["x"].dim() == dims and kwargs["x"].shape[1] == 3


def test_an_image_that_fits_a_flattened_head():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 32 * 32, 10)
    )
    _, kwargs = fits(model)
    assert list(kwargs.values())[0].shape[-1] == 32


DECLARED = {"config": SimpleNamespace(image_size=48)}, {
    "pretrained_cfg": {"input_size": (3, 48, 48)}
}


@pytest.mark.parametrize("declared", DECLARED)
def test_an_image_of_the_size_that_the_model_declares(declared):
    """As timm's models and those of transformers do: with another size a forward may
    take another path."""
    model = Model(nn.Conv2d(3, 4, 3))
    vars(model).update(declared)
    _, kwargs = first(model)
    assert kwargs["x"].shape[-2:] == (48, 48)


def test_other_required_arguments_are_filled_and_optional_ones_left():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, y, scale=1.0, *, flag=False):
            return self.layer(x) + y

    _, kwargs = fits(Two())
    assert set(kwargs) == {"x", "y"}


def test_positional_only_arguments():
    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, /):
            return self.layer(x)

    args, kwargs = first(Positional())
    assert len(args) == 1 and kwargs == {}


def test_a_models_main_input_name_and_cache():
    class Hub(nn.Module):
        main_input_name = "input_ids"

        def __init__(self):
            super().__init__()
            self.layer = nn.Embedding(10, 4)

        def forward(self, attention_mask=None, input_ids=None, use_cache=True):
            return self.layer(input_ids)

    _, kwargs = first(Hub())
    assert set(kwargs) == {"input_ids", "use_cache"} and kwargs["use_cache"] is False


def test_a_forward_without_arguments():
    class Nullary(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 4))

        def forward(self):
            return self.w * 2

    assert first(Nullary()) == ((), {})
    assert plan_tensor_parallel(Nullary(), 2).note == ""


def test_they_are_the_same_each_time_and_leave_the_random_state():
    model = Model(nn.Linear(6, 4))
    state = torch.get_rng_state()
    a, b = (first(model)[1]["x"] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())


def test_a_model_that_nothing_fits_is_planned_with_a_warning():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, batch):
            return self.layer(batch["features"])

    with pytest.warns(UserWarning, match="example_inputs"):
        plan = plan_tensor_parallel(Odd(), 2)
    assert "example_inputs" in plan.note and plan["layer.weight"].dim is not None


@pytest.mark.parametrize("longest, length", [(None, 1024), (512, 508), (4096, 1024)])
def test_inputs_of_a_training_steps_size(longest, length):
    """2,048 tokens, or as many as the model's config says that it takes."""
    model = Model(nn.Embedding(10, 4))
    if longest:
        model.config = SimpleNamespace(n_positions=longest)
    plan = plan_tensor_parallel(model, 2)
    assert plan.cost.inputs == f"2 x {length} int64"


def test_an_image_of_a_training_steps_size():
    plan = plan_tensor_parallel(Model(nn.Conv2d(3, 4, 3)), 2)
    assert plan.cost.inputs == "2 x 3 x 224 x 224 float32"


class Loops(nn.Module):
    """A recurrence over tokens in Python."""

    def __init__(self, reads=False):
        super().__init__()
        self.emb, self.cell = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.reads = reads

    def forward(self, x):
        state, steps = 0.0, []
        for token in self.emb(x).unbind(1):
            state = torch.tanh(self.cell(token) + state)
            if not self.reads or state.sum() != 0:
                steps.append(state)
        return torch.stack(steps, 1)


@pytest.mark.parametrize("reads", [False, True])
def test_short_ones_where_a_forward_loops_over_tokens_or_reads_values(reads):
    """It would be traced call by call, or run on the weights themselves."""
    plan = plan_tensor_parallel(Loops(reads), 2)
    assert plan.cost.inputs == "2 x 16 int64"
