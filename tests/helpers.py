"""A sharded model against the whole one, on real processes: outputs, every gradient,
and what must not change."""

import copy

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from quintnet_dt import apply_tensor_parallel
from quintnet_dt.utils import leaves


def double(obj):
    """Floating tensors in a nested argument as float64."""
    return pytree.tree_map(
        lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, obj
    )


def split_inputs(given):
    """(args, kwargs) of a tuple (positional) or a dict (keyword)."""
    return ((), dict(given)) if isinstance(given, dict) else (tuple(given), {})


def run(model, given, seed=1):
    args, kwargs = split_inputs(given)
    torch.manual_seed(seed)
    return model(*args, **kwargs)


def loss_of(output):
    """A scalar in which each element of each floating output has a weight of its
    own."""
    gen, total = torch.Generator().manual_seed(2), 0.0
    for _, x in leaves(output):
        if torch.is_tensor(x) and x.is_floating_point():
            total = (
                total
                + (x * torch.randn(x.shape, generator=gen, dtype=torch.float64)).sum()
            )
    return total


def close(found, whole, what, tol=1e-9):
    assert type(found) is type(
        whole
    ), f"{what}: expected {type(whole)}, found {type(found)}"
    if not torch.is_tensor(whole):
        assert found == whole, what
        return
    assert (
        found.shape == whole.shape
    ), f"{what}: expected shape {tuple(whole.shape)}, found {tuple(found.shape)}"
    assert (
        found.dtype == whole.dtype
    ), f"{what}: expected {whole.dtype}, found {found.dtype}"
    if whole.numel():
        a, b = found.detach().double(), whole.detach().double()
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
        assert error <= tol, f"{what}: relative error {error:.1e}"


def same_output(found, whole, tol=1e-9):
    assert type(found) is type(whole)
    a, b = dict(leaves(found)), dict(leaves(whole))
    assert a.keys() == b.keys()
    for path, x in b.items():
        close(a[path], x, f"output {path}", tol)


def same_grads(sharded, whole, tol=1e-9, floor=1e-11):
    """Every gradient equals the whole model's, and replicated ones are bit-identical on
    all ranks."""
    there = dict(sharded.named_parameters())
    largest = max(
        (
            p.grad.abs().max().item()
            for p in whole.parameters()
            if p.grad is not None and p.numel()
        ),
        default=1,
    )
    wrong, flat = [], []
    for name, p in whole.named_parameters():
        if not p.numel():
            continue
        grad = there[name].grad
        if p.grad is None or grad is None:
            # A weight that a call did not reach may get zeros.
            if (p.grad is None) != (grad is None) and (
                p.grad is not None or grad.full_tensor().any()
            ):
                wrong.append(
                    f"{name}: expected {'no' if p.grad is None else 'a'} gradient"
                )
            continue
        assert (
            isinstance(grad, DTensor) and grad.placements == there[name].placements
        ), name
        error = (grad.full_tensor() - p.grad).abs().max().item()
        scale = max(p.grad.abs().max().item(), floor / tol * largest)
        if not error <= tol * scale:
            wrong.append(
                f"{name} {grad.placements}: relative error {error / scale:.1e}"
            )
        if grad.placements[0].is_replicate():
            flat.append(grad.to_local().detach().double().flatten())
    assert not wrong, "wrong gradients: " + "; ".join(wrong)
    if flat:
        mine, group = torch.cat(flat), sharded.tensor_parallel_mesh.get_group()
        all_flat = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_flat, mine, group=group)
        assert all(
            torch.equal(x, mine) for x in all_flat
        ), "gradients of replicated parameters differ between ranks"


def describe(model):
    """What must not change when a model is sharded."""
    return {
        "keys": list(model.state_dict()),
        "types": {name: type(m) for name, m in model.named_modules()},
        "params": {
            name: (tuple(p.shape), p.dtype, p.requires_grad)
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        "ties": sorted(
            (n, m)
            for n, p in model.named_parameters(remove_duplicate=False)
            for m, q in model.named_parameters()
            if p is q
        ),
        "training": model.training,
    }


def share_of(model):
    """The share of the parameter elements that this rank holds."""
    held = sum(p.to_local().numel() for p in model.parameters())
    return held / sum(p.numel() for p in model.parameters())


def make(build, train=True):
    torch.manual_seed(0)
    return build().double().train(train)


def pair(build, mesh_or_n, train=True, **options):
    """(sharded, whole) from the same seed; checks that the sharded one is still
    itself."""
    whole, model = make(build, train), make(build, train)
    options = {
        **(
            {"tp_size": mesh_or_n}
            if isinstance(mesh_or_n, int)
            else {"mesh": mesh_or_n}
        ),
        **options,
    }
    before = describe(model)
    sharded = apply_tensor_parallel(model, **options)
    assert sharded is model
    after = describe(model)
    for what in before:
        assert after[what] == before[what], f"{what} changed"
    mesh = sharded.tensor_parallel_mesh
    assert all(
        isinstance(p, DTensor) and p.device_mesh == mesh for p in sharded.parameters()
    )
    for (name, p), q in zip(sharded.named_parameters(), whole.parameters()):
        assert torch.equal(
            p.detach().full_tensor(), q.detach()
        ), f"{name} was sharded wrongly"
    return sharded, whole


def compare(sharded, whole, given, tol=1e-9, grad=True):
    """One call of both: outputs, gradients, buffers."""
    given = double(given)
    mine = copy.deepcopy(given)
    sharded.zero_grad(), whole.zero_grad()
    with torch.set_grad_enabled(grad):
        expected, found = run(whole, given), run(sharded, mine)
    same_output(found, expected, tol)
    if grad:
        loss_of(expected).backward()
        loss_of(found).backward()
        same_grads(sharded, whole, tol)
    there = dict(sharded.named_buffers())
    for name, b in whole.named_buffers():
        close(there[name], b, f"buffer {name}", tol)


def check(
    build,
    given,
    n=2,
    *,
    train=True,
    calls=(),
    share=None,
    grad=True,
    tol=1e-9,
    then=None,
    example=True,
    **options,
):
    """On n ranks, `build()` sharded equals `build()` whole, on the example inputs
    `given` and on each of `calls`.

    Args:
        given: a function that returns a tuple (positional) or dict (keyword) of inputs,
            and is called with a fixed seed.
        calls: functions like `given`.
        share: a bound on the share of the elements that any rank holds.
        example: False lets the library make inputs up.
        then: called with (sharded, whole) at the end.
        options: for apply_tensor_parallel.
    """

    def ranks(rank):
        torch.manual_seed(3)
        inputs = [double(f()) for f in (given, *calls)]
        extra = {"example_inputs": copy.deepcopy(inputs[0])} if example else {}
        sharded, whole = pair(build, n, train, **extra, **options)
        if share is not None:
            assert (
                share_of(sharded) <= share
            ), f"holds {share_of(sharded):.1%}\n{sharded.tensor_parallel_plan}"
        for i, x in enumerate(inputs):
            try:
                compare(sharded, whole, x, tol, grad)
            except Exception as e:
                e.add_note(f"in call {i}, of\n{sharded.tensor_parallel_plan}")
                raise
        if then is not None:
            then(sharded, whole)

    run_ranks(ranks, n)
