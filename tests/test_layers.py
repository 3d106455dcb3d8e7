"""The drop-in layers: the whole layer's values, gradients, keys and initial weights."""

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from quintnet_dt import (
    ColumnParallelLinear,
    ProcessGroupManager,
    RowParallelLinear,
    VocabParallelEmbedding,
)


def whole(vocab, width, hidden, bias):
    return nn.Sequential(
        nn.Embedding(vocab, width, padding_idx=3),
        nn.Linear(width, hidden, bias=bias),
        nn.GELU(),
        nn.Linear(hidden, width, bias=bias),
    )


def parallel(vocab, width, hidden, bias, mesh, joined):
    return nn.Sequential(
        VocabParallelEmbedding(vocab, width, padding_idx=3, mesh=mesh),
        ColumnParallelLinear(width, hidden, bias=bias, mesh=mesh, gather_output=joined),
        nn.GELU(),
        RowParallelLinear(
            hidden, width, bias=bias, mesh=mesh, input_is_parallel=not joined
        ),
    )


@pytest.mark.parametrize(
    "n, vocab, hidden, bias, joined",
    [
        (2, 12, 10, True, False),
        (2, 13, 7, False, True),
        (4, 13, 10, True, True),
        (4, 3, 8, True, False),
    ],
)
def test_layers_are_the_whole_ones(n, vocab, hidden, bias, joined):
    """Uneven sizes, more ranks than rows, gathered and parallel between the layers."""
    width, rows = 6, max(vocab, 4)

    def ranks(rank):
        torch.set_default_dtype(torch.float64)
        mesh = ProcessGroupManager(n)
        torch.manual_seed(0)
        a = whole(rows, width, hidden, bias)
        torch.manual_seed(0)
        b = parallel(rows, width, hidden, bias, mesh, joined)
        assert list(a.state_dict()) == list(b.state_dict())
        ids = torch.randint(0, rows, (3, 5), generator=torch.Generator().manual_seed(1))
        ya, yb = a(ids), b(ids)
        ya.square().sum().backward()
        yb.square().sum().backward()
        torch.testing.assert_close(ya, yb, rtol=1e-12, atol=1e-12)
        for (name, p), q in zip(a.named_parameters(), b.parameters()):
            assert isinstance(q, DTensor), name
            assert torch.equal(p, q.full_tensor()), name
            torch.testing.assert_close(
                p.grad, q.grad.full_tensor(), rtol=1e-12, atol=1e-12, msg=name
            )
        placements = [q.placements[0] for q in b.parameters()]
        assert placements == (
            [Shard(0), Shard(0), Shard(0), Shard(1), Replicate()]
            if bias
            else [Shard(0), Shard(0), Shard(1)]
        )

    run_ranks(ranks, n)


def test_an_input_by_keyword_a_copy_and_other_weights():
    def ranks(rank):
        mesh = ProcessGroupManager(2)
        torch.manual_seed(rank)  # rank 0's weights are used
        layer = ColumnParallelLinear(4, 6, mesh=mesh)
        x = torch.ones(2, 4)
        assert torch.equal(layer(input=x), layer(x))
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.weight.zero_(), twin.bias.fill_(1.0)
        assert torch.equal(twin(x), torch.ones(2, 6)) and not torch.equal(
            layer(x), torch.ones(2, 6)
        )
        return layer.weight.full_tensor().sum().item()

    first, second = run_ranks(ranks, 2)
    torch.manual_seed(0)
    assert first == second == pytest.approx(nn.Linear(4, 6).weight.sum().item())


def test_max_norm_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        VocabParallelEmbedding(8, 4, max_norm=1.0, mesh=None)
