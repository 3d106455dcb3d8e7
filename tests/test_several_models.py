"""Several split models in one process: in threads, one within another, one part in two
of them."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from helpers import compare, double, make
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from quintnet_dt import apply_tensor_parallel


def mlp():
    return nn.Sequential(
        nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4)
    )


def test_threads():
    """Two threads split a model each, and call it in ways that are new to it: each
    computes as the whole does."""

    def ranks(rank):
        groups = [
            DeviceMesh.from_group(dist.new_group([0, 1]), "cpu") for _ in range(2)
        ]
        models = [make(mlp) for _ in range(2)]
        found = [None] * 2

        def work(i):
            try:
                whole = copy.deepcopy(models[i])
                model = apply_tensor_parallel(
                    models[i],
                    mesh=groups[i],
                    example_inputs=double((torch.ones(5, 16),)),
                )
                for step in range(30):
                    model.train(step % 10 < 5), whole.train(step % 10 < 5)
                    with torch.set_grad_enabled(step % 4 < 2):
                        x = torch.full(
                            (2 + step % 3, 16), 0.1 * step + i, dtype=torch.float64
                        )
                        assert torch.allclose(model(x), whole(x), rtol=1e-9)
                found[i] = "right"
            except Exception as e:
                found[i] = repr(e)

        threads = [
            threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert found == ["right"] * 2

    run_ranks(ranks, 2)


class Student(nn.Module):
    """Its teacher is in a list, so no part of it."""

    def __init__(self, teacher):
        super().__init__()
        self.a, self.b, self.teacher, self.ask = (
            nn.Linear(16, 64),
            nn.Linear(64, 16),
            [teacher],
            True,
        )

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return self.teacher[0](y) if self.ask else y


def test_a_split_model_within_anothers_forward():
    """Refused when it is planned, and when a call that was not planned comes to it;
    called outside it is right."""

    def ranks(rank):
        x, teacher, whole = double(torch.ones(5, 16)), make(mlp), make(mlp)
        apply_tensor_parallel(teacher, 2, example_inputs=(x,))
        for example in {"example_inputs": (x,)}, {}:
            student = make(lambda: Student(teacher))
            with pytest.raises(
                RuntimeError,
                match=(
                    "Sequential: expected a forward that calls no model which was split"
                ),
            ):
                apply_tensor_parallel(student, 2, **example)
        student = make(lambda: Student(teacher))
        alone = copy.deepcopy(student)
        student.ask = alone.ask = False
        apply_tensor_parallel(student, 2, example_inputs=(x,))
        assert torch.allclose(teacher(student(x)), whole(alone(x)), rtol=1e-9)
        student.ask = True
        with pytest.raises(RuntimeError, match="split by itself|another path"):
            student.eval()(x)

    run_ranks(ranks, 2)


class Head(nn.Module):
    def __init__(self, body, size):
        super().__init__()
        self.body, self.out = body, nn.Linear(4, size)

    def forward(self, x):
        return self.out(self.body(x))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        body = mlp()
        self.actor, self.critic = Head(body, 6), Head(body, 2)

    def forward(self, x):
        return self.actor(x), self.critic(x)


def test_a_backbone_of_two_models():
    """Split in one and then in the other it is refused; split as parts of one module
    both are right."""

    def ranks(rank):
        x, one_by_one = double(torch.ones(5, 16)), make(Both)
        actor = apply_tensor_parallel(one_by_one.actor, 2, example_inputs=(x,))
        with pytest.raises(
            ValueError,
            match=(
                "body: expected modules of one model, found one that is a part of a"
                " Head"
            ),
        ):
            apply_tensor_parallel(one_by_one.critic, 2, example_inputs=(x,))
        whole, both = make(Both), make(Both)
        compare(actor, whole.actor, (x,))
        apply_tensor_parallel(both, 2, example_inputs=(x,))
        for part in "actor", "critic":
            assert torch.allclose(
                getattr(both, part)(x), getattr(whole, part)(x), rtol=1e-9
            )
        compare(both, whole, (x,))

    run_ranks(ranks, 2)
