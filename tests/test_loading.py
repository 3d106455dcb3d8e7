"""`load_state_dict` of a split model as of the whole one: whole tensors, parts, assign;
and what is refused."""

import pytest
import torch
import torch.distributed as dist
from helpers import close
from ranks import run_ranks
from test_checkpoint import Fused, batch, everywhere, make
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quintnet_dt import (
    ColumnParallelLinear,
    ProcessGroupManager,
    RowParallelLinear,
    apply_tensor_parallel,
)


def given(seed=7):
    torch.manual_seed(seed)
    return Fused().double()


def same(model, state, but=()):
    """Every entry of a split model is the whole one's."""
    found = model.state_dict()
    assert found.keys() == state.keys()
    for k, x in state.items():
        value = found[k].full_tensor() if isinstance(found[k], DTensor) else found[k]
        assert torch.equal(value, x) != (k in but) and value.dtype == x.dtype, k


def answers(model, whole):
    model.eval(), whole.eval()
    with torch.no_grad():
        close(model(batch(3)), whole(batch(3)), "output")


@pytest.mark.parametrize("layout", ["tp2", "dp2 x tp2"])
def test_whole_tensors(layout):
    def ranks(rank):
        model, optimizer = make(layout)
        whole = given()
        params = list(model.parameters())
        model.eval()
        with torch.no_grad():
            model(batch())  # after which FSDP2 leaves some gathered
        assert (
            str(model.load_state_dict(whole.state_dict()))
            == "<All keys matched successfully>"
        )
        same(model, whole.state_dict())
        assert all(p is q for p, q in zip(model.parameters(), params))
        if layout == "tp2":
            assert model.tensor_parallel_plan["qkv.weight"].pieces == 3
        with torch.no_grad():
            model(batch())
        # of a part of the model
        model.qkv.load_state_dict({k: v + 1 for k, v in whole.qkv.state_dict().items()})
        same(model, whole.state_dict(), but={"qkv.weight", "qkv.bias"})
        keys = model.load_state_dict(
            {"qkv.weight": whole.qkv.weight, "more": torch.ones(2)}, strict=False
        )
        assert "qkv.bias" in keys.missing_keys and keys.unexpected_keys == ["more"]
        model.load_state_dict(
            {"qkv.bias": whole.qkv.bias.float().double()}, strict=False
        )
        same(model, {**whole.state_dict(), "qkv.bias": whole.qkv.bias.float().double()})
        # cast, as torch does
        model.load_state_dict({k: v.float() for k, v in whole.state_dict().items()})
        same(model, {k: v.float().to(v.dtype) for k, v in whole.state_dict().items()})
        model.load_state_dict(whole.state_dict())
        answers(model, whole)

    run_ranks(ranks, 2 if layout == "tp2" else 4)


def test_assign():
    def ranks(rank):
        whole = given()
        for meta in False, True:
            with torch.device("meta" if meta else "cpu"):
                model = Fused() if meta else Fused().double()
            model.qkv.bias.requires_grad_(False)
            apply_tensor_parallel(model, 2, example_inputs=(batch(),))
            placements = [p.placements for p in model.parameters()]
            state = {k: v.clone() for k, v in whole.state_dict().items()}
            model.load_state_dict(state, assign=True)
            same(model, state)
            assert [
                p.placements for p in model.parameters()
            ] == placements and not model.qkv.bias.requires_grad
            assert model.head.weight is model.tokens.weight and isinstance(
                model.head.weight, nn.Parameter
            )
            answers(model, whole)
            state["tokens.weight"].zero_()  # each rank has a part of its own
            assert model.tokens.weight.full_tensor().any()
            model.load_state_dict(
                {"tokens.weight": state["tokens.weight"]}, assign=True, strict=False
            )
            assert (
                model.head.weight is model.tokens.weight
                and not model.head.weight.full_tensor().any()
            )

    run_ranks(ranks, 2)


def test_dtensors_as_before(tmp_path):
    def ranks(rank):
        (model, _), (other, _) = make("tp2"), make("tp2", seed=1)
        whole = given()
        model.load_state_dict(whole.state_dict())
        for assign in False, True:
            torch.save(model.state_dict(), tmp_path / f"{rank}.pt")
            for state in model.state_dict(), torch.load(tmp_path / f"{rank}.pt"):
                other.load_state_dict(
                    {k: torch.zeros_like(v) for k, v in state.items()}
                )
                other.load_state_dict(state, assign=assign)
                same(other, whole.state_dict())
        mesh, weight = model.tensor_parallel_mesh, whole.qkv.weight.detach()
        rows = distribute_tensor(weight, mesh, [Shard(0)])  # laid out in another way
        with pytest.raises(
            RuntimeError,
            match="qkv.weight: assign=True: expected a whole tensor, or .*found",
        ):
            other.load_state_dict({"qkv.weight": rows}, assign=True, strict=False)
        other.load_state_dict({"qkv.weight": rows}, strict=False)
        same(other, whole.state_dict())
        dist.barrier()
        if rank == 1:  # a habit: rank 0's file on every rank
            with pytest.raises(
                RuntimeError,
                match="down.weight: expected this rank's part, .*save_checkpoint",
            ):
                other.load_state_dict(torch.load(tmp_path / "0.pt"))
        dist.barrier()
        same(other, whole.state_dict())

    run_ranks(ranks, 2)


def test_refused():
    def ranks(rank):
        model, _ = make("tp2")
        before = {k: v.clone() for k, v in given(0).state_dict().items()}
        short = {
            "qkv.weight": torch.ones(71, 24),
            "qkv.bias": torch.ones(36),
            "norm.weight": torch.ones(12),
        }
        for assign in False, True:
            with pytest.raises(
                RuntimeError,
                match="(?s)norm.weight.*qkv.weight|qkv.weight.*qkv.bias.*norm.weight",
            ):
                model.load_state_dict(short, strict=False, assign=assign)
        empty = {"qkv.weight": torch.empty(72, 24, device="meta")}
        everywhere(
            lambda: model.load_state_dict(empty, strict=False),
            "qkv.weight: its share cannot be taken: ",
        )
        everywhere(lambda: model.load_state_dict({}), "Missing key.*qkv.weight")
        everywhere(
            lambda: model.load_state_dict({"qkv.weight": 3}, strict=False),
            "qkv.weight.*expected torch.Tensor",
        )
        same(model, before)

    run_ranks(ranks, 2)


def test_a_broadcast_over_pieces_is_refused_and_nothing_else():
    def ranks(rank):
        whole = given()

        def fresh(meta):
            with torch.device("meta" if meta else "cpu"):
                return apply_tensor_parallel(
                    Fused() if meta else Fused().double(), 2, example_inputs=(batch(),)
                )

        for meta in False, True:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            state = whole.state_dict() if rank == 0 else {}
            everywhere(
                lambda: set_model_state_dict(fresh(meta), state, options=options),
                "filled qkv.weight, .* wrongly",
            )
            model = fresh(meta)
            set_model_state_dict(
                model,
                whole.state_dict(),
                options=StateDictOptions(full_state_dict=True),
            )
            same(model, whole.state_dict())
            part = {"up.bias": whole.up.bias.detach() + 1}
            set_model_state_dict(
                model,
                dict(part),
                options=StateDictOptions(full_state_dict=True, strict=False),
            )
            same(model, {**whole.state_dict(), **part})

        # a name of torch's is free to others
        def _load_model_state_dict(info, options):
            model.load_state_dict(whole.state_dict())

        _load_model_state_dict(
            info := StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
            info,
        )
        same(model, whole.state_dict())

    run_ranks(ranks, 2)


def test_layers_written_for_it():
    def ranks(rank):
        with ProcessGroupManager(tp_size=2) as mesh:
            for layer in ColumnParallelLinear, RowParallelLinear:
                whole, split = nn.Linear(6, 4), layer(
                    6, 4, mesh=mesh, src_data_rank=None
                )
                dist.broadcast(whole.weight.data, 0), dist.broadcast(whole.bias.data, 0)
                for assign in False, True:
                    split.load_state_dict(whole.state_dict(), assign=assign)
                    same(split, whole.state_dict())
                    close(
                        split(torch.ones(2, 6)), whole(torch.ones(2, 6)), "output", 1e-6
                    )

    run_ranks(ranks, 2)
