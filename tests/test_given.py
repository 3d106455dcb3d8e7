"""What functions of state are given that they cannot take: an error that says what was
expected, on every rank, also where one rank alone is wrong; and parameters of every
dtype."""

import torch
from ranks import run_ranks
from test_checkpoint import everywhere
from torch import nn
from torch.distributed.tensor import DTensor

from quintnet_dt import (
    apply_tensor_parallel,
    export_safetensors,
    load_checkpoint,
    load_safetensors,
    materialize,
    save_checkpoint,
    whole_shapes,
)
from quintnet_dt.state.files import DTYPES

MODEL = nn.Linear(2, 2)
MODELS = {
    None: "None",
    "gpt2": "a str, 'gpt2'",
    nn.Linear: "the class Linear",
    (MODEL,): "a tuple",
    3: "a int, 3",
}


def shown(x):
    with whole_shapes(x):
        pass


def calls(folder):
    """(a call of one strange argument, what it takes, the start of the error)."""
    for fn in (
        shown,
        materialize,
        lambda m: save_checkpoint(folder, m),
        lambda m: load_checkpoint(folder, m),
        lambda m: export_safetensors(folder, m),
        lambda m: load_safetensors(folder, m),
    ):
        yield fn, MODELS, "TypeError: model: expected an nn.Module, found {}"
    optimizers = {
        "adam": "a str, 'adam'",
        torch.optim.SGD: "the class SGD",
        MODEL: "a Linear",
    }
    for fn in save_checkpoint, load_checkpoint:
        yield (
            lambda o, fn=fn: fn(folder, MODEL, o),
            optimizers,
            "TypeError: optimizer: expected a torch.optim.Optimizer or None, found {}",
        )
    paths = {None: "None", 3: "a int, 3", MODEL: "a Linear", b"c": "a bytes"}
    for fn, name in (
        (save_checkpoint, "path"),
        (load_checkpoint, "path"),
        (export_safetensors, "folder"),
        (load_safetensors, "source"),
    ):
        yield (
            lambda p, fn=fn: fn(p, MODEL),
            paths,
            f"TypeError: {name}: expected a path, found {{}}",
        )
        yield (
            lambda p, fn=fn: fn(p, MODEL),
            {"": "an empty text"},
            f"ValueError: {name}: expected a path, found {{}}",
        )
    inits = {"normal": "a str, 'normal'", 3: "a int, 3"}
    yield (
        lambda i: materialize(MODEL, i),
        inits,
        "TypeError: init: expected a function or None, found {}",
    )
    yield (
        lambda i: load_safetensors(folder, MODEL, init=i),
        inits,
        "TypeError: init: expected a function or None, found {}",
    )
    for fn in lambda d: materialize(MODEL, device=d), lambda d: load_safetensors(
        folder, MODEL, device=d
    ):
        yield (
            fn,
            {
                "gpu": "'gpu'",
                MODEL: "Linear",
            },
            "ValueError: device: expected a torch.device or its name, found {}",
        )


def test_strange_arguments(tmp_path):
    def ranks(rank):
        for fn, strange, error in calls(tmp_path / "c"):
            for x, found in strange.items():
                everywhere(lambda: fn(x), error.format(found))
        assert not list(tmp_path.iterdir())
        export_safetensors(tmp_path / "s", MODEL, progress=False)
        mine = None if rank else MODEL  # on one rank only
        for fn in (
            lambda: save_checkpoint(tmp_path / "c", mine),
            lambda: load_checkpoint(tmp_path / "c", mine),
            lambda: materialize(mine),
            lambda: export_safetensors(tmp_path / "s", mine),
            lambda: load_safetensors(tmp_path / "s", mine),
        ):
            everywhere(fn, "model: expected an nn.Module, found None")
        everywhere(
            lambda: save_checkpoint(None if rank else tmp_path / "c", MODEL),
            "path: expected a path, found None",
        )
        model = MODEL if rank else nn.Linear(2, 2, device="meta")
        everywhere(
            lambda: materialize(model),
            r"expected one on the meta device on every rank, found none on ranks \[1\]",
        )

    run_ranks(ranks, 2)


class Typed(nn.Module):
    """A parameter and a buffer of every dtype, that no operator computes with; and a
    Linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, dtype in DTYPES.items():
            values = torch.randint(
                0,
                2 if dtype == torch.bool else 120,
                (4, 3 * dtype.itemsize),
                dtype=torch.uint8,
            )
            self.register_parameter(
                f"codes_{name}", nn.Parameter(values.view(dtype), requires_grad=False)
            )
            self.register_buffer(f"scales_{name}", values.flip(0).view(dtype))
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        return self.f(x)


def bits(model, rank=None):
    """The bytes of every tensor; of a split model those of this rank's rows, of a whole
    one those of a rank's."""
    found = {}
    for name, t in model.state_dict().items():
        part = t.to_local() if isinstance(t, DTensor) else t
        part = (
            part.chunk(2)[rank]
            if rank is not None and name.startswith("codes")
            else part
        )
        found[name] = part.contiguous().view(torch.uint8).tolist()
    return {name: x for name, x in found.items() if not name.startswith("f.")}


def cleared(model):
    for t in model.state_dict().values():
        (t.to_local() if isinstance(t, DTensor) else t).view(torch.uint8).zero_()
    return model


def test_every_dtype(tmp_path):
    def ranks(rank):
        model, expected = Typed(), bits(Typed(), rank)
        if rank == 1:  # rank 0's are taken
            cleared(model)
        apply_tensor_parallel(model, 2, example_inputs=(torch.ones(1, 4),))
        assert bits(model) == expected
        save_checkpoint(tmp_path / "c", model)
        export_safetensors(tmp_path / "s", model, progress=False)
        for load in (
            lambda: load_checkpoint(tmp_path / "c", model),
            lambda: load_safetensors(tmp_path / "s", model, progress=False),
            lambda: model.load_state_dict(Typed().state_dict()),
        ):
            cleared(model), load()
            assert bits(model) == expected

    run_ranks(ranks, 2)
