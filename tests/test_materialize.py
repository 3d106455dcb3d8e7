"""Models that start on the meta device: the values of the whole model, bit for bit, in
the memory of a shard."""

import math
import resource

import pytest
import torch
from models.saved import call, gpt2, llama, on_meta, same, split, tied_llama
from ranks import run_ranks
from torch import nn

from quintnet_dt import (
    apply_tensor_parallel,
    export_safetensors,
    load_safetensors,
    materialize,
)


class Started(nn.Module):
    """Modules that start themselves in torch's ways, and others in the ways of the
    wild."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(13, 12, padding_idx=3), nn.BatchNorm1d(5)
        self.attention, self.rnn = nn.MultiheadAttention(
            12, 4, batch_first=True
        ), nn.LSTM(12, 6, batch_first=True)
        self.up, self.down = nn.Linear(12, 30), nn.Linear(30, 12)
        self.head = nn.Linear(12, 13, bias=False)
        self.head.weight = self.embed.weight
        self.token, self.none = nn.Parameter(torch.empty(3, 12)), nn.Parameter(
            torch.empty(0, 3)
        )
        self.frozen = nn.Parameter(torch.empty(12), requires_grad=False)
        self.frozen.tag = "kept"
        self.register_buffer(
            "table", torch.empty(5, 12, dtype=torch.complex64), persistent=False
        )
        self.register_buffer("mask", torch.empty(5, 5, dtype=torch.bool))

    def forward(self, ids):
        x = self.norm(self.embed(ids)) + self.frozen + self.table.real
        x = x + self.attention(x, x, x, attn_mask=self.mask)[0] + self.token.sum(0)
        y = self.rnn(x)[0].sum(-1, keepdim=True)
        return self.head(x + y + self.down(torch.relu(self.up(x))))


def wild(module):
    """An init that knows all of Started: in place, through .data, through views, by
    putting other tensors there, with values of other modules."""
    if isinstance(module, nn.MultiheadAttention):
        module._reset_parameters()  # writes to its child's bias
    elif isinstance(module, Started):
        module.token.data.normal_(std=0.5)
        module.frozen[:6].uniform_(), module.frozen.narrow(0, 6, 6).fill_(2)
        module.table = torch.polar(
            torch.ones(5, 12), torch.outer(torch.arange(5.0), torch.rand(12))
        )
        module.mask.copy_(torch.ones(5, 5, device=module.mask.device).triu(1).bool())
        # children's, which come first
        module.down.weight.mul_(1 / math.sqrt(2)), module.up.weight.copy_(
            module.down.weight.T
        )
    elif isinstance(module, nn.Linear) and module.bias is not None:
        module.weight = nn.Parameter(torch.randn(module.weight.shape))
        nn.init.zeros_(module.bias)
    elif hasattr(module, "reset_parameters"):
        module.reset_parameters()


def started(build, init, seed=0):
    """The whole model, as the docstring of materialize has it."""
    model = on_meta(build).to_empty(device="cpu")
    if build in (tied_llama, gpt2):
        model.tie_weights()
    if build is Started:
        model.head.weight = model.embed.weight
    torch.manual_seed(seed)
    with torch.no_grad():
        return model.apply(init)


@pytest.mark.parametrize("build", [llama, tied_llama, gpt2])
def test_models_of_transformers_start_as_they_do_by_themselves(build):
    model, other = on_meta(build), on_meta(build).to_empty(device="cpu")
    other.tie_weights()
    torch.manual_seed(3)
    assert materialize(model) is model
    state = torch.get_rng_state()
    torch.manual_seed(3)
    for module in other.modules():
        module._is_hf_initialized = False
    other.init_weights()
    same(model, other)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), b in zip(model.named_buffers(), other.buffers()):
        assert torch.equal(a, b), name
    # the smaller weights of the residual path, which the parent of their module gives
    # them
    if build is gpt2:
        assert (
            model.transformer.h[0].mlp.c_proj.weight.std()
            < 0.8 * model.transformer.h[0].mlp.c_fc.weight.std()
        )


@pytest.mark.parametrize("n, layout", [(2, "tp"), (4, "tp"), (4, "fsdp")])
def test_shards_have_the_values_of_the_whole(n, layout):
    ids = torch.randint(0, 13, (2, 5), generator=torch.Generator().manual_seed(5))

    def ranks(rank):
        for build in (gpt2, tied_llama) if layout == "fsdp" else (gpt2,):
            model = on_meta(build)
            split(model, build, layout)
            torch.manual_seed(rank)  # rank 0's is used
            materialize(model)
            expected = started(build, on_meta(build)._init_weights)
            same(model, expected)
            torch.testing.assert_close(call(model, build), call(expected, build))
            assert model.lm_head.weight is model.get_input_embeddings().weight
            assert materialize(model) is model
        if layout == "fsdp":  # which computes no LSTM on DTensors, and no integers
            return
        model = on_meta(Started).eval()
        placements = [
            p.placements
            for p in apply_tensor_parallel(model, n, example_inputs=(ids,)).parameters()
        ]
        torch.manual_seed(rank)
        materialize(model, wild)
        state = torch.get_rng_state()
        expected = started(Started, wild).eval()
        same(model, expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert [
            p.placements for p in model.parameters()
        ] == placements and model.head.weight is model.embed.weight
        assert torch.equal(model.table, expected.table)
        assert not model.frozen.requires_grad and model.token.requires_grad
        torch.testing.assert_close(model(ids), expected(ids))

    run_ranks(ranks, n, timeout=120)


def test_on_one_process_with_each_modules_own():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    )
    torch.manual_seed(1)
    for m in (model[0], model[1][0], model[1][1]):
        m.reset_parameters()
    other = on_meta(
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
        )
    )
    torch.manual_seed(1)
    same(materialize(other), model)
    other[1][1] = on_meta(lambda: nn.Linear(4, 3))  # what has values keeps them
    kept = other[0].weight
    torch.manual_seed(2)
    materialize(other, lambda m: [p.normal_() for p in m.parameters()])
    assert (
        other[0].weight is kept
        and torch.equal(kept, model[0].weight)
        and not other[1][1].weight.is_meta
    )


def test_what_init_does_not_write_is_an_error():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = nn.Linear(8, 16), nn.Linear(16, 8)
            self.scale, self.part = nn.Parameter(torch.empty(8)), nn.Parameter(
                torch.empty(8)
            )
            self.register_buffer("steps", torch.empty((), dtype=torch.int64))

        def forward(self, x):
            return self.g(self.f(x)) * self.scale * self.part

    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
        else:
            module.part[:4] = 1

    def ranks(rank):
        model = apply_tensor_parallel(
            on_meta(Part), 2, example_inputs=(torch.ones(2, 8),)
        )
        kept = list(model.parameters())

        def untouched():
            return (
                all(
                    p is q and p.is_meta
                    for p, q in zip(kept, model.parameters(), strict=True)
                )
                and model.steps.is_meta
            )

        with pytest.raises(
            RuntimeError,
            match="found 5 .*: scale, part, f.bias, g.bias, steps; give an init",
        ):
            materialize(model, init)
        assert untouched()
        with pytest.raises(RuntimeError, match="found 3 .*: scale, part, steps;"):
            materialize(model)

        def zero(m):
            for t in (*m.parameters(), *m.buffers()):
                t.zero_()
            if m is model:
                m.scale = nn.Parameter(
                    torch.zeros(2 if rank and broken == "shape" else 8)
                )
            if rank and broken == "raises":
                raise KeyError("one")

        for broken, error, match in (
            ("shape", ValueError, "Part.scale: expected the shape .8,., found .2,."),
            ("raises", KeyError, "one"),
        ):
            with pytest.raises(error if rank else RuntimeError, match=match):
                materialize(model, zero)
            assert untouched()
        broken = None
        materialize(model, zero)
        assert not model(torch.ones(2, 8)).any() and model.steps == 0

    run_ranks(ranks, 2)


def peak(step):
    """By how many bytes the memory of this process rises, at most, during a step."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak so far is forgotten
    with open("/proc/self/statm") as f:
        before = int(f.read().split()[1]) * resource.getpagesize()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def test_a_rank_never_holds_more_than_its_shards_and_one_module(tmp_path):
    """Of 160 MiB, 4 ranks have 40 each: what a rank may have beside that is far from a
    whole model."""

    def chain(d):
        up, down = (lambda: nn.Linear(d, 4 * d, bias=False)), (
            lambda: nn.Linear(4 * d, d, bias=False)
        )
        return nn.Sequential(*(f() for _ in range(20) for f in (up, nn.ReLU, down)))

    def ranks(rank):
        # the small ones first, for what a first call brings into memory
        for d in (
            8,
            512,
        ):
            models = [on_meta(lambda: chain(d)) for _ in range(2)]
            for model in models:
                apply_tensor_parallel(model, 4, example_inputs=(torch.ones(1, d),))
            folder = tmp_path / str(d)
            started = peak(lambda: materialize(models[0]))
            written = peak(
                lambda: export_safetensors(
                    folder, models[0], max_shard_size="60MB", progress=False
                )
            )
            read = peak(lambda: load_safetensors(folder, models[1], progress=False))
            shard = sum(p.to_local().numel() * 4 for p in model.parameters())
        assert shard == 40 * 2**20
        return started / shard, written / shard, read / shard

    for started, written, read in run_ranks(ranks, 4, timeout=120):
        # malloc keeps a few freed modules of 4 MiB each, and uses them again; the whole
        # would be 4
        assert 0.6 < started < 2 and written < 0.15 and 0.2 < read < 1.15, (
            started,
            written,
            read,
        )
