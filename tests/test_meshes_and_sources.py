"""Over which ranks a model is split, whose weights it gets, whose plan."""

import pytest
import torch
from helpers import check, compare, pair, share_of
from models.gpt import GPT, ids, mlp
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from quintnet_dt import ProcessGroupManager, apply_tensor_parallel


def test_submesh_and_process_group_manager():
    def ranks(rank):
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(rank // 2))
        for tp in (
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"],
            ProcessGroupManager(tp_size=2),
        ):
            sharded, whole = pair(mlp, tp, example_inputs=(x.double(),))
            assert sharded.tensor_parallel_mesh.size() == 2 and share_of(sharded) < 0.6
            compare(sharded, whole, (x,))
        sharded, whole = pair(mlp, 2)
        compare(sharded, whole, (x,))
        # ranks 0 and 2, 1 and 3
        dp = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))["tp"]
        sharded, whole = pair(lambda: GPT(), dp)
        compare(sharded, whole, (torch.arange(6).view(2, 3),))

    run_ranks(ranks, 4)


@pytest.mark.parametrize("source", [0, 1])
def test_weights_come_from_the_source_rank(source):
    def ranks(rank):
        def build():
            torch.manual_seed(100 + rank % 2)  # seeds differ within a tp group
            model = nn.Sequential(
                nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)
            )
            model[1].running_mean.normal_()
            return model.double().eval()

        torch.manual_seed(0)
        model = apply_tensor_parallel(build(), 2, src_data_rank=source)
        rank = source  # what the other rank built
        whole = build()
        there = model.state_dict()
        for name, t in whole.state_dict().items():
            found = (
                there[name].full_tensor()
                if hasattr(there[name], "full_tensor")
                else there[name]
            )
            assert torch.equal(found, t), name
        compare(model, whole, (torch.ones(2, 6),))

    run_ranks(ranks, 4)


def test_no_source_takes_local_slices():
    def ranks(rank):
        torch.manual_seed(rank)
        whole = mlp()
        state = {k: v.clone() for k, v in whole.state_dict().items()}
        model = apply_tensor_parallel(
            whole, 2, src_data_rank=None, example_inputs=(torch.ones(2, 16),)
        )
        for name, p in model.named_parameters():
            placement = p.placements[0]
            mine = (
                state[name].chunk(2, placement.dim)[rank]
                if placement.is_shard()
                else state[name]
            )
            assert torch.equal(p.to_local(), mine), name

    run_ranks(ranks, 2)


def test_users_plan_wins(n=2):
    plan = {
        "blocks.0.attn.q.weight": Replicate(),
        "blocks.0.attn.o.weight": Shard(0),
        "blocks.0.mlp.0.weight": Shard(1),
        "wte.weight": Shard(1),
        "norm.weight": Shard(0),
        "blocks.0.mlp.3.bias": Shard(0),
        "head.weight": Replicate(),
    }

    def then(sharded, whole):
        found = {
            name: p.placements[0]
            for name, p in sharded.named_parameters()
            if name in plan
        }
        assert found == plan

    check(GPT, ids(64, 2, 6), n, plan=plan, then=then, calls=[ids(64, 1, 4)])
