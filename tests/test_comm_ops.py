"""The differentiable collectives: their equations, over real processes.

They speak of all ranks together. So one test writes the whole as a plain function of
every rank's input and compares values, gradients and second gradients with what the
ranks find; then `gradcheck` has to agree, without such a reference, on compositions
that take replicated inputs to replicated outputs.
"""

import copy
import itertools
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import alone, run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from quintnet_dt import groups
from quintnet_dt.axes.split import Segment, Split
from quintnet_dt.comm_ops import all_gather, all_reduce, copy_in, reduce_scatter, split
from quintnet_dt.exchange import _route_of as routes_worked_out
from quintnet_dt.exchange import exchange
from quintnet_dt.groups import SimulatedGroup, chunk_sizes, group_rank, group_size

VARIES_IN = "all_reduce", "all_gather", "gather_partial", "reduce_scatter", "exchange"
VARIES_OUT = "copy_in", "split", "gather_partial", "reduce_scatter", "exchange"
# each rank's input is a part of the whole
OF_PARTS = (
    "all_gather",
    "gather_partial",
    "exchange",
)

# The ranks' lengths along the dim: even, chunks, chunks with an empty one, odd ones.
SIZES = {
    2: [(2, 2), (2, 1), (1, 0), (0, 3)],
    4: [(1, 1, 1, 1), (3, 3, 3, 1), (1, 1, 1, 0), (0, 2, 0, 1)],
}


class Case(NamedTuple):
    """One call of one operator, on all n ranks."""

    op: str
    dim: int
    sizes: tuple[int, ...]
    given: bool  # whether sizes are given, or found
    contiguous: bool

    def call(self, x, group):
        sizes = self.sizes if self.given else None
        if self.op == "all_reduce":
            return all_reduce(x, group)
        if self.op == "copy_in":
            return copy_in(x, group)
        if self.op == "split":
            return split(x, self.dim, group, sizes)
        if self.op == "reduce_scatter":
            return reduce_scatter(x, self.dim, group, sizes)
        if self.op == "exchange":
            blocks = (Segment(3),)
            return exchange(x, Split(self.dim, sum(self.sizes) // 3, blocks), group)
        partial = self.op == "gather_partial"
        return all_gather(x, self.dim, group, sizes, partial_grad=partial)

    def positions(self):
        """For an exchange: each rank's part of each of three pieces of the dim."""
        n = len(self.sizes)
        return (
            torch.arange(sum(self.sizes)).view(3, n, -1).transpose(0, 1).reshape(n, -1)
        )

    def whole(self, xs):
        """Every rank's result, of every rank's input: plain torch, no ranks."""
        if self.op == "all_reduce":
            return [sum(xs)] * len(xs)
        if self.op == "copy_in":
            return xs
        if self.op == "exchange":
            return [
                torch.cat(xs, self.dim).index_select(self.dim, at)
                for at in self.positions()
            ]
        if self.op in OF_PARTS:
            return [torch.cat(xs, self.dim)] * len(xs)
        x = xs[0] if self.op == "split" else sum(xs)
        return x.split(self.sizes, self.dim)

    def input(self, rank):
        shape = [3, 4, 2]
        shape[self.dim] = self.sizes[rank] if self.op in OF_PARTS else sum(self.sizes)
        x = randn(shape, rank if self.op in VARIES_IN else 0)
        return x if self.contiguous else x.mT.contiguous().mT

    def weights(self, rank, x, y):
        """(w, v): what the loss and its gradient are multiplied with."""
        w = randn(y.shape, 10 + (rank if self.op in VARIES_OUT else 0))
        v = randn(x.shape, 20 + (rank if self.op in VARIES_IN else 0))
        return w.requires_grad_(), v


def randn(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def cases(n):
    for op in dict.fromkeys(VARIES_IN + VARIES_OUT):
        dims = (0,) if op in ("all_reduce", "copy_in") else (0, 1, -1)
        for dim, sizes in itertools.product(
            dims, [(6,) * n] if op == "exchange" else SIZES[n]
        ):
            even = len(set(sizes)) == 1
            found = (
                even if op in OF_PARTS else list(sizes) == chunk_sizes(sum(sizes), n)
            )
            for given in (True, False) if found else (True,):
                for contiguous in (True, False):
                    yield Case(op, dim, sizes, given, contiguous)


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


# ------------------------------------------------------------- groups of one, simulated


def test_a_group_of_one_gives_its_input_back():
    def ranks(rank):
        for group in (dist.group.WORLD, SimulatedGroup(0, 1)):
            x = torch.randn(3, 2, requires_grad=True)
            assert all_reduce(x, group) is x
            assert copy_in(x, group) is x
            for f in (all_gather, split, reduce_scatter):
                assert f(x, -1, group) is x
                assert f(x, -1, group, [2]) is x
                with pytest.raises(ValueError, match="out of range"):
                    f(x, 2, group)
                with pytest.raises(ValueError, match="not 2"):
                    f(x, 1, group, [3])

    run_ranks(ranks, 1)


def results_of(case, rank, group, fake=False):
    """What is known of y and of dx before their values."""
    x = case.input(rank)
    if fake:
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    x.requires_grad_()
    y = case.call(x, group)
    (g,) = torch.autograd.grad(y.sin().sum(), x)
    return [(t.shape, t.dtype, t.is_contiguous(), strides(t)) for t in (y, g)]


def strides(t):
    """Those that say something."""
    return [s for n, s in zip(t.shape, t.stride()) if n > 1] if t.numel() else []


@pytest.mark.parametrize("n", [2, 4])
def test_simulated_groups_give_the_shapes_of_real_ones(n):
    def ranks(rank):
        return [results_of(case, rank, dist.group.WORLD) for case in cases(n)]

    results = run_ranks(ranks, n)

    def simulated():
        for rank, real in enumerate(results):
            group = copy.deepcopy(SimulatedGroup(rank, n))
            assert group == SimulatedGroup(rank, n)
            assert (group_rank(group), group_size(group)) == (rank, n)
            fake_mode = FakeTensorMode()
            for case, right in zip(cases(n), real):
                assert results_of(case, rank, group) == right, case
                with fake_mode:
                    assert results_of(case, rank, group, fake=True) == right, case

    alone(simulated)


def test_simulated_groups_imagine_the_others_to_hold_the_same():
    group = SimulatedGroup(1, 2)
    x = torch.tensor([1, 2, 3])
    assert all_reduce(x, group).tolist() == [2, 4, 6]
    assert all_gather(x, 0, group).tolist() == [1, 2, 3, 1, 2, 3]
    assert all_gather(x, 0, group, [4, 3]).tolist() == [1, 2, 3, 0, 1, 2, 3]
    assert all_gather(x, 0, group, [1, 3]).tolist() == [1, 1, 2, 3]
    assert split(x, 0, group).tolist() == [3]
    assert reduce_scatter(x, 0, group).tolist() == [6]
    assert copy_in(x, group) is x
    for rank, size in ((-1, 2), (2, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank={rank}, size={size}"):
            SimulatedGroup(rank, size)


# ------------------------------------------------------------- sizes and errors


@pytest.mark.parametrize("n", [1, 2, 4])
def test_chunk_sizes_are_those_of_dtensor(n):
    lengths = (1, 2, 3, 4, 5, 7, 8, 10, 13)
    assert chunk_sizes(0, n) == [0] * n

    def ranks(rank):
        mesh = init_device_mesh("cpu", (n,))
        return [
            len(distribute_tensor(torch.zeros(length), mesh, [Shard(0)]).to_local())
            for length in lengths
        ]

    assert list(zip(*run_ranks(ranks, n))) == [
        tuple(chunk_sizes(k, n)) for k in lengths
    ]


def test_bad_input_is_an_error_on_every_rank_before_anything_is_sent():
    def ranks(rank):
        group = dist.group.WORLD
        x = torch.zeros(3, 4)
        for f in (all_gather, split, reduce_scatter):
            for dim in (2, -3):
                with pytest.raises(ValueError, match=rf"dim {dim} .*shape \(3, 4\)"):
                    f(x, dim, group)
            with pytest.raises(ValueError, match="dim 0 is out of range for shape"):
                f(torch.zeros(()), 0, group)
            for sizes in ([4], [2, 1, 1], [5, -1], []):
                with pytest.raises(ValueError, match="expected sizes of 2 ranks"):
                    f(x, 1, group, sizes)
        for f in (split, reduce_scatter):
            with pytest.raises(ValueError, match=r"\(2, 3\) .* sum is 5, not 4"):
                f(x, 1, group, [2, 3])
        with pytest.raises(ValueError, match=rf"rank {rank}'s is {2 + rank}, not 4"):
            all_gather(x, 1, group, [2, 3])
        for bad in (None, init_device_mesh("cpu", (2,)), -100):
            with pytest.raises(ValueError, match="a ProcessGroup that this rank is in"):
                all_reduce(x, bad)
        return all_reduce(torch.ones(()), group).item()  # and nothing was sent

    assert run_ranks(ranks, 2) == [2.0, 2.0]
    for length, n in ((-1, 2), (3, 0)):
        with pytest.raises(ValueError, match=f"found {length} and {n}"):
            chunk_sizes(length, n)
