"""What ranks must have in common: the batch, which is compared; the random state, which
is shared."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers as hf
from helpers import run
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from quintnet_dt import (
    ProcessGroupManager,
    apply_tensor_parallel,
    check_batch,
    load_checkpoint,
    save_checkpoint,
)


class Dropping(nn.Module):
    """Dropout on what is sharded (heads, hidden units) and on what is not."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in "qkvo")
        self.up, self.down, self.norm = (
            nn.Linear(16, 64),
            nn.Linear(64, 16),
            nn.LayerNorm(16),
        )

    def forward(self, x, again=False):
        def mlp(x):
            return self.down(F.dropout(F.gelu(self.up(x)), 0.3, self.training))

        q, k, v = (
            m(x).unflatten(-1, (4, 4)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        a = F.scaled_dot_product_attention(
            q, k, v, dropout_p=0.2 if self.training else 0.0
        )
        x = x + F.dropout(self.o(a.transpose(1, 2).flatten(2)), 0.1, self.training)
        x = self.norm(x)
        return x + (checkpoint(mlp, x, use_reentrant=False) if again else mlp(x))


def given(step=0):
    return torch.randn(
        2, 5, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64
    )


def same_on_ranks(tensors):
    flat = torch.cat([t.detach().flatten() for t in tensors])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(x, flat) for x in everyone)


@pytest.mark.parametrize("n", [2, 4])
def test_fifty_steps_with_ranks_seeded_differently(n, tmp_path):
    def ranks(rank):
        torch.manual_seed(0)
        model = apply_tensor_parallel(Dropping().double(), n, example_inputs=(given(),))
        whole = Dropping().double()
        whole.load_state_dict(
            {k: p.full_tensor() for k, p in model.state_dict().items()}
        )
        optimizer, reference = (
            torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, whole)
        )
        torch.manual_seed(rank)
        seen = []
        model.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
        for step in range(50):
            if step == 20:
                torch.manual_seed(100 * rank + 7)
            if step == 30:
                torch.rand(rank + 1)
            if step == 40:
                save_checkpoint(tmp_path / "c", model, optimizer)
            state = torch.get_rng_state()
            dist.broadcast(state, 0)
            model(given(step), again=step % 2 == 1).square().sum().backward()
            after, _ = torch.get_rng_state(), torch.set_rng_state(state)
            whole(given(step), again=step % 2 == 1).square().sum().backward()
            torch.set_rng_state(after)
            for o in optimizer, reference:
                o.step(), o.zero_grad()
        assert same_on_ranks(seen)
        replicated = [
            p.to_local() for p in model.parameters() if p.placements[0].is_replicate()
        ]
        assert replicated and same_on_ranks(replicated)
        for p, q in zip(model.parameters(), whole.parameters()):
            assert (p.full_tensor() - q).abs().max() < 1e-9
        final = [p.to_local().clone() for p in model.parameters()]
        torch.manual_seed(rank + 5)  # what was random is restored
        load_checkpoint(tmp_path / "c", model, optimizer)
        for step in range(40, 50):
            model(given(step), again=step % 2 == 1).square().sum().backward()
            optimizer.step(), optimizer.zero_grad()
        assert all(
            torch.equal(p.to_local(), q) for p, q in zip(model.parameters(), final)
        )

    run_ranks(ranks, n)


def test_masks_of_shards_differ():
    def ranks(rank):
        torch.manual_seed(rank)

        class Mask(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Linear(4, 64, bias=False), nn.Linear(
                    64, 64, bias=False
                )
                nn.init.eye_(self.down.weight)

            def forward(self, x):
                return self.down(F.dropout(self.up(x), 0.5))

        model = apply_tensor_parallel(Mask(), 2, example_inputs=(torch.ones(3, 4),))
        assert {e.how for e in model.tensor_parallel_plan.entries.values()} == {"local"}
        y = model(torch.ones(3, 4))
        mine, other = (y == 0).chunk(2, 1)
        assert not torch.equal(mine, other) and same_on_ranks([y])

    run_ranks(ranks, 2)


def test_batches_that_differ_are_refused_on_every_rank():
    def ranks(rank):
        torch.manual_seed(0)
        model = apply_tensor_parallel(Dropping().double(), 2, example_inputs=(given(),))
        with pytest.raises(
            ValueError,
            match=(
                r"\[0\]\[0\] is a tensor of shape \(2, 5, 16\), .* with other values on"
                r" rank 1"
            ),
        ):
            model(given(rank))
        with pytest.raises(
            ValueError,
            match=(
                r"\[0\]\[0\] is a tensor of shape \(2, 5, 16\), .* and a tensor of"
                r" shape \(3"
            ),
        ):
            model(given() if rank == 0 else torch.cat([given()] * 2)[:3])
        with pytest.raises(
            ValueError, match=r"\[1\]\['again'\] is False on rank 0 and True on rank 1"
        ):
            model(given(), again=bool(rank))
        model(given(3))
        mesh = model.tensor_parallel_mesh
        check_batch(
            {
                "x": given(),
                "n": [1, None, "a"],
                "b": torch.ones(2, dtype=torch.bool),
                "e": torch.ones(0),
            },
            mesh,
        )
        for different in (
            given(rank)[::2, :, 1],
            torch.tensor(rank),
            torch.ones(3).bfloat16() + rank,
            f"{rank}",
        ):
            with pytest.raises(ValueError, match="different batches"):
                check_batch([different], ProcessGroupManager(mesh=mesh))
        with pytest.raises(
            ValueError, match=r"\[1\] is nothing on rank 0 and 2 on rank 1"
        ):
            check_batch([1, 2][: rank + 1], mesh)

    run_ranks(ranks, 2)


def test_dp_groups_have_batches_and_random_states_of_their_own():
    def ranks(rank):
        ranks = ProcessGroupManager(tp_size=2)
        torch.manual_seed(0)
        model = apply_tensor_parallel(
            Dropping().double(), mesh=ranks, example_inputs=(given(),)
        )
        torch.manual_seed(ranks.dp_rank)
        expected = run(model, (given(),), seed=ranks.dp_rank).detach()
        torch.manual_seed(rank if ranks.tp_rank else ranks.dp_rank)
        assert torch.equal(model(given()), expected)
        outputs = [None] * 4
        dist.all_gather_object(outputs, expected)
        assert torch.equal(outputs[0], outputs[1]) and not torch.equal(
            outputs[0], outputs[2]
        )
        model(given(ranks.dp_rank))

    run_ranks(ranks, 4)


def test_sampling_with_ranks_seeded_differently():
    def ranks(rank):
        torch.manual_seed(0)
        config = dict(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
        model = apply_tensor_parallel(
            hf.LlamaForCausalLM(hf.LlamaConfig(**config)), 2
        ).eval()
        ids = torch.ones(1, 3, dtype=torch.long)
        for seed in range(3):
            torch.manual_seed(100 * seed + rank)
            found = model.generate(
                ids, max_new_tokens=8, do_sample=True, pad_token_id=0
            )
            assert same_on_ranks([found])

    run_ranks(ranks, 2)
