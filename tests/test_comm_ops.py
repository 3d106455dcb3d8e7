"""The differentiable collectives: their equations, over real processes.

They speak of all ranks together. So one test writes the whole as a plain function of
every rank's input and compares values, gradients and second gradients with what the
ranks find; then `gradcheck` has to agree, without such a reference, on compositions
that take replicated inputs to replicated outputs.
"""

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from models.collectives import VARIES_IN, VARIES_OUT, cases, randn
from ranks import alone, run_ranks
from torch.distributed import init_device_mesh

from quintnet_dt import groups
from quintnet_dt.axes.split import Segment, Split
from quintnet_dt.comm_ops import all_gather, all_reduce, copy_in, reduce_scatter, split
from quintnet_dt.exchange import _route_of as routes_worked_out
from quintnet_dt.exchange import exchange
from quintnet_dt.groups import group_rank, group_size

# ------------------------------------------------------------- the equations


@pytest.mark.parametrize("n", [2, 4])
def test_values_gradients_and_second_gradients(n):
    """Of L = sum(w * sin(y)): g = dL/dx, then the gradients of sum(v * g) by x and w.

    The sums run over all ranks where y (for g: x) varies, and over one where it is
    replicated.
    """

    def ranks(rank):
        found = []
        for case in cases(n):
            x = case.input(rank).requires_grad_()
            before = x.detach().clone()
            y = case.call(x, dist.group.WORLD)
            w, v = case.weights(rank, x, y)
            (g,) = torch.autograd.grad((w * y.sin()).sum(), x, create_graph=True)
            gx, gw = torch.autograd.grad((v * g).sum(), (x, w))
            assert torch.equal(x, before), case
            found.append([t.detach().clone() for t in (y, g, gx, gw)])
        return found

    results = run_ranks(ranks, n)

    def of_the_whole():
        for i, case in enumerate(cases(n)):
            varies_in, varies_out = case.op in VARIES_IN, case.op in VARIES_OUT
            xs = [case.input(r).requires_grad_() for r in range(n if varies_in else 1)]
            ys = case.whole(xs if varies_in else xs * n)
            pairs = [
                case.weights(r, xs[r if varies_in else 0], ys[r]) for r in range(n)
            ]
            ws = [w for w, _ in pairs[: n if varies_out else 1]]
            loss = sum((w * y.sin()).sum() for w, y in zip(ws, ys))
            gs = torch.autograd.grad(loss, xs, create_graph=True)
            second = sum((v * g).sum() for (_, v), g in zip(pairs, gs))
            gxs = torch.autograd.grad(second, xs, retain_graph=True)
            gws = torch.autograd.grad(second, ws)
            for r in range(n):
                a, b = (r if varies_in else 0), (r if varies_out else 0)
                for found, right in zip(results[r][i], (ys[r], gs[a], gxs[a], gws[b])):
                    assert found.shape == right.shape, case
                    assert torch.allclose(found, right, rtol=1e-12, atol=1e-12), case

    alone(of_the_whole)


@pytest.mark.parametrize("n", [2, 4])
def test_gradcheck_where_the_whole_is_replicated(n):
    def ranks(rank):
        group = dist.group.WORLD

        def reduced(x):
            h = copy_in(x, group)
            return all_reduce((h * randn(h.shape, rank)).sin() * h, group)

        def gathered(x, dim, sizes):
            h = split(x, dim, group, sizes)
            return all_gather((h * randn(h.shape, rank)).sin() * h, dim, group, sizes)

        def gradcheck(f, x):
            x = x.clone().requires_grad_()
            fast = n > 2  # compares along random directions: fewer collectives
            first = torch.autograd.gradcheck(f, x, fast_mode=fast)
            return first and torch.autograd.gradgradcheck(f, x, fast_mode=fast)

        def scattered(x, dim, sizes):
            h = split(x.sin(), dim, group, sizes)
            h = all_gather(h, dim, group, sizes, partial_grad=True)
            h = reduce_scatter((h * randn(h.shape, rank)).cos(), dim, group, sizes)
            return all_gather(h * h, dim, group, sizes)

        x = randn((3, 2), 0)
        torch.manual_seed(0)  # gradcheck's own random numbers: the same on every rank
        assert gradcheck(reduced, x)
        for sizes in [(2, 1), (0, 3)] if n == 2 else [(1, 1, 1, 0), (0, 2, 0, 1)]:
            for f in (gathered, scattered):
                assert gradcheck(lambda x: f(x, 0, sizes), x)
                assert gradcheck(lambda x: f(x.T, -1, sizes), x)  # not contiguous

    run_ranks(ranks, n)


# ------------------------------------------------------------- the tensors


def test_all_reduce_gives_every_rank_the_same_bits():
    def ranks(rank):
        x = torch.linspace(-3, 3, 10007).sin() * 10.0**rank + rank / 3
        return all_reduce(x, dist.group.WORLD)

    first, *others = run_ranks(ranks, 4)
    for other in others:
        assert torch.equal(first.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64]
)
def test_dtypes(dtype):
    """Values are small integers, exact in every dtype; the sum too."""
    n = 2

    def ranks(rank):
        found = []
        for case in cases(n):
            x = (case.input(rank) * 4).round().to(dtype)
            x.requires_grad_(dtype.is_floating_point)
            y = case.call(x, dist.group.WORLD)
            assert y.requires_grad == x.requires_grad, case
            if y.requires_grad:
                y.sum().backward()
                assert x.grad.dtype == dtype and x.grad.shape == x.shape, case
            found.append(y.detach().clone())
        return found

    results = run_ranks(ranks, n)
    for i, case in enumerate(cases(n)):
        ys = case.whole([(case.input(r) * 4).round().to(dtype) for r in range(n)])
        for result, y in zip(results, ys):
            assert result[i].dtype == dtype and torch.equal(result[i], y), case


def test_empty_and_0d_tensors():
    def ranks(rank):
        group = dist.group.WORLD
        x = torch.tensor(rank + 1.0, dtype=torch.float64, requires_grad=True)
        y = all_reduce(copy_in(x, group) ** 2, group)
        (g,) = torch.autograd.grad(y, x)
        for dim, shape in itertools.product((0, 1), ((0, 3), (3, 0), (0, 0))):
            e = torch.zeros(shape, requires_grad=True)
            total = all_reduce(e, group).sum()
            for f in (all_gather, split, reduce_scatter):
                total = total + f(e, dim, group).sum()
            total = total + all_gather(e, dim, group, partial_grad=True).sum()
            total.backward()
            assert e.grad.shape == shape
            assert all_gather(e, dim, group).shape[1 - dim] == shape[1 - dim]
        return y.item(), g.item()

    # dx sums over both ranks' use of their x, taken to be one: 2 + 4
    assert run_ranks(ranks, 2) == [(5.0, 6.0), (5.0, 6.0)]


def test_gradients_that_are_expanded_or_shared_are_left_alone():
    def ranks(rank):
        group = dist.group.WORLD
        for case in cases(2):
            x = case.input(rank).requires_grad_()
            y = case.call(x, group)
            one = torch.ones(()).double()
            for dy in (one.expand(y.shape), randn(y.shape, 0)):
                before = dy.clone()
                torch.autograd.grad(y, x, dy, retain_graph=True)
                assert torch.equal(dy, before) and one == 1, case

    run_ranks(ranks, 2)


def test_memory_and_in_place_work():
    def ranks(rank):
        group = dist.group.WORLD
        for case in cases(2):
            x = case.input(rank).requires_grad_()
            y = case.call(x * 1, group)
            if case.op == "copy_in":
                with pytest.raises(RuntimeError, match="modified inplace"):
                    y.relu_()
                h = x * 1
                assert copy_in(h, group).data_ptr() == h.data_ptr()
                with torch.no_grad():
                    assert copy_in(h, group) is h
            else:
                assert y.is_contiguous(), case
                y.relu_().sum().backward()  # as the whole model may
            if case.op == "split":  # does not keep the whole alive
                assert y.untyped_storage().nbytes() == y.numel() * 8, case

    run_ranks(ranks, 2)


class Undefined(torch.autograd.Function):
    """The identity; its gradient is undefined where asked."""

    @staticmethod
    def forward(ctx, x, undefined):
        ctx.undefined = undefined
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return None if ctx.undefined else dy, None


def test_frozen_and_undefined_gradients_do_not_hang():
    def ranks(rank):
        group = dist.group.WORLD
        x = torch.ones(2, requires_grad=True)
        assert not all_reduce(x.detach(), group).requires_grad
        with torch.no_grad():
            assert not all_reduce(x, group).requires_grad
        # y's gradient: 3 on rank 0; undefined on rank 1, which joins the sum with 0
        y = Undefined.apply(copy_in(x, group), rank == 1)
        (3 * y).sum().backward()
        return x.grad.tolist()

    assert run_ranks(ranks, 2) == [[3.0, 3.0]] * 2


def test_groups_are_subgroups_too():
    def ranks(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        group = mesh["tp"].get_group()
        assert (group_rank(group), group_size(group)) == (rank % 2, 2)
        x = torch.tensor([float(rank)])
        return [
            all_reduce(x, group).tolist(),
            all_gather(x, 0, group).tolist(),
            reduce_scatter(torch.cat([x, x + 10]), 0, group).tolist(),
            split(torch.arange(2), 0, group).tolist(),
        ]

    assert run_ranks(ranks, 4) == [
        [[1.0], [0.0, 1.0], [1.0], [0]],
        [[1.0], [0.0, 1.0], [21.0], [1]],
        [[5.0], [2.0, 3.0], [5.0], [0]],
        [[5.0], [2.0, 3.0], [25.0], [1]],
    ]


def test_no_warnings_reach_the_user():
    def ranks(rank):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for case in cases(2):
                x = case.input(rank).requires_grad_()
                case.call(x, dist.group.WORLD).sum().backward()

    run_ranks(ranks, 2)


def test_compiles_into_one_graph():
    import torch._dynamo  # once, not on every rank  # noqa: F401

    def ranks(rank):
        group = dist.group.WORLD

        def f(x):
            h = copy_in(x, group)
            h = all_gather(split(h * (rank + 1), 1, group).sin(), 1, group)
            h = reduce_scatter(h, 0, group, None)
            return all_reduce(h.sum(), group)

        x = randn((2, 4), 0).requires_grad_()
        found = []
        for run in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
            y = run(x)
            found.append((y, *torch.autograd.grad(y, x)))
        for eager, compiled in zip(*found):
            assert torch.allclose(eager, compiled)

    run_ranks(ranks, 2)


def test_an_exchange_is_worked_out_once_and_compiles_into_one_graph():
    """Of each split, also where code compiled for one meets another."""
    import torch._dynamo  # noqa: F401

    splits = [
        Split(0, 4, (Segment(3), Segment(1, 3))),
        Split(0, 4, (Segment(2, 3),)),
        Split(0, 2, (Segment(3, 4),)),
    ]

    def ranks(rank):
        class Given:
            split = None

        def f(x, given):
            return exchange(x.sin(), given.split, dist.group.WORLD).cos()

        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        x, given = randn((12, 3), rank).requires_grad_(), Given()
        for given.split in [*splits, *splits]:
            found = []
            for run in (f, compiled):
                y = run(x, given)
                found.append((y, *torch.autograd.grad(y.square().sum(), x)))
            for eager, by_compiler in zip(*found):
                assert torch.equal(eager, by_compiler)
        assert routes_worked_out.cache_info().misses == len(splits)

    run_ranks(ranks, 2)


def test_compiled_before_torch_2_13_they_raise_or_break_the_graph(monkeypatch):
    """There a compiled collective loses what it writes."""
    import torch._dynamo  # noqa: F401

    monkeypatch.setattr(groups, "SINCE_2_13", False)

    def ranks(rank):
        def f(x):
            return all_gather(x.sin(), 0, dist.group.WORLD).sum()

        x = randn((2, 4), 0)
        assert torch.allclose(torch.compile(f, backend="aot_eager")(x), f(x))
        torch._dynamo.reset()
        with pytest.raises(Exception, match="expected torch 2.13"):
            torch.compile(f, backend="aot_eager", fullgraph=True)(x)

    run_ranks(ranks, 2)
