"""Checkpoints: from every layout into every other, bit for bit; and what must not load,
with everything kept as it was."""

import json
import os
import pickle
import random
import re
import resource
import signal
import sys
import zlib

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import alone, run_ranks
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from quintnet_dt import apply_tensor_parallel, load_checkpoint, save_checkpoint
from quintnet_dt.private import _StridedShard
from quintnet_dt.state.dcp import Blocks

LAYOUTS = {"one": 1, "tp2": 2, "tp3": 3, "tp4": 4, "dp2 x tp2": 4, "hsdp 2 x 1 x 2": 4}


class Fused(nn.Module):
    """Fused q, k, v; a tied head; a vocabulary that nothing divides; a buffer."""

    def __init__(self, vocab=67, hidden=24, heads=12):
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocab, hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.norm, self.up, self.down = (
            nn.BatchNorm1d(hidden),
            nn.Linear(hidden, 48),
            nn.Linear(48, hidden),
        )
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(hidden, vocab)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        q, k, v = (
            t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )
        x = self.drop(self.norm(x.transpose(1, 2)).transpose(1, 2))
        return self.head(x + self.down(F.gelu(self.up(x))))


def batch(step=0):
    return torch.randint(0, 67, (2, 6), generator=torch.Generator().manual_seed(step))


def make(layout, seed=0, build=Fused):
    """(model, optimizer) in a layout."""
    torch.manual_seed(seed)
    model, example = build().double(), (batch(),)
    if layout.startswith("tp"):
        apply_tensor_parallel(model, LAYOUTS[layout], example_inputs=example)
    elif layout != "one":
        shape, names = (
            ((2, 2), ("dp", "tp"))
            if layout[0] == "d"
            else ((2, 1, 2), ("rep", "dp", "tp"))
        )
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        apply_tensor_parallel(model, mesh=mesh["tp"], example_inputs=example)
        fully_shard(model, mesh=mesh[names[:-1]] if len(names) > 2 else mesh["dp"])
    decay = [p for p in model.parameters() if p.dim() > 1]
    groups = [
        {"params": decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return model, torch.optim.AdamW(groups, 1e-2)


def train(model, optimizer, step=0):
    F.cross_entropy(
        model(batch(step)).flatten(0, 1), batch(step + 1).flatten()
    ).backward()
    optimizer.step(), optimizer.zero_grad()


def whole(model, optimizer):
    """Everything of a run as whole tensors, by name."""
    state = {k: v for k, v in model.state_dict().items()}
    names = {id(p): n for n, p in model.named_parameters()}
    state |= {
        f"{names[id(p)]}/{k}": v
        for p, values in optimizer.state.items()
        for k, v in values.items()
    }
    return {
        k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone()
        for k, v in state.items()
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for k, x in expected.items():
        assert torch.equal(found[k], x) and found[k].dtype == x.dtype, k


def on(layout, fn):
    """fn() on the ranks of a layout; rank 0's result."""
    return (
        alone(fn)
        if LAYOUTS[layout] == 1
        else run_ranks(lambda rank: fn(), LAYOUTS[layout])[0]
    )


def test_every_layout_into_every_other(tmp_path):
    def save(layout, async_):
        model, optimizer = make(layout)
        train(model, optimizer)
        optimizer.param_groups[1]["lr"] = 0.5
        expected = whole(model, optimizer)
        done = save_checkpoint(
            tmp_path / layout,
            model,
            optimizer,
            extra={"step": 1, "from": layout},
            async_=async_,
        )
        if async_:
            train(model, optimizer)  # what is written is of before
            done.result()
        return expected

    def load(layouts, expected):
        for layout in layouts:
            # a fresh one, then one that goes on with what it was given
            model, optimizer = make(layout, seed=1)
            for saved, values in expected.items():
                optimizer.param_groups[1]["lr"] = 1e-2
                assert load_checkpoint(tmp_path / saved, model, optimizer) == {
                    "step": 1,
                    "from": saved,
                }
                same(whole(model, optimizer), values)
                assert (
                    optimizer.param_groups[1]["lr"] == 0.5
                    and optimizer.param_groups[0]["lr"] == 1e-2
                )
                assert model.head.weight is model.tokens.weight
                train(model, optimizer)

    expected = {
        layout: on(layout, lambda: save(layout, async_=layout in ("tp2", "dp2 x tp2")))
        for layout in LAYOUTS
    }
    # nothing half-written is left
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(LAYOUTS)
    alone(lambda: load(["one"], expected))
    run_ranks(lambda rank: load(["tp2"], expected), 2)
    run_ranks(lambda rank: load(["tp3"], expected), 3)
    run_ranks(lambda rank: load(["tp4", "dp2 x tp2", "hsdp 2 x 1 x 2"], expected), 4)
    for layout in "tp4", "dp2 x tp2":  # by torch's own functions
        model = {"model": make("one", 1)[0].state_dict()}
        dcp.load(model, checkpoint_id=tmp_path / layout, no_dist=True)
        dcp_to_torch_save(tmp_path / layout, tmp_path / "whole.pt")
        found = torch.load(tmp_path / "whole.pt")
        for k, x in model["model"].items():
            assert torch.equal(x, expected[layout][k]) and torch.equal(
                found["model"][k], x
            )
        assert torch.equal(
            found["optimizer"]["state"]["qkv.weight"]["exp_avg"],
            expected[layout]["qkv.weight/exp_avg"],
        )


def test_resuming_is_going_on(tmp_path):
    """Dropout included: the random state is restored, in another layout too."""

    def first():
        model, optimizer = make("tp2")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for step in range(2):
            train(model, optimizer, step), scheduler.step()
        save_checkpoint(
            tmp_path / "c",
            model,
            optimizer,
            extra={"scheduler": scheduler.state_dict()},
        )
        for step in range(2, 5):
            train(model, optimizer, step), scheduler.step()
        return whole(model, optimizer)

    def rest(layout):
        model, optimizer = make(layout, seed=5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        scheduler.load_state_dict(
            load_checkpoint(tmp_path / "c", model, optimizer)["scheduler"]
        )
        for step in range(2, 5):
            train(model, optimizer, step), scheduler.step()
        return whole(model, optimizer)

    expected = on("tp2", first)
    same(on("tp2", lambda: rest("tp2")), expected)
    for layout in "one", "tp4":
        found = on(layout, lambda: rest(layout))
        assert max((found[k] - x).abs().max() for k, x in expected.items()) < 1e-9


def test_an_optimizer_that_has_not_stepped_and_one_model_alone(tmp_path):
    def ranks(rank):
        model, optimizer = make("tp2")
        save_checkpoint(tmp_path / "c", model, optimizer)
        other, trained = make("tp2", 1)
        train(other, trained)
        assert (
            load_checkpoint(tmp_path / "c", other, trained) is None
            and not trained.state
        )
        same(whole(other, trained), whole(model, optimizer))
        other, _ = make("tp2", 1)
        load_checkpoint(tmp_path / "c", other)
        save_checkpoint(tmp_path / "c", other)  # in its place
        with pytest.raises(
            (ValueError, RuntimeError), match="expected a checkpoint with an optimizer"
        ):
            load_checkpoint(tmp_path / "c", model, optimizer)

    run_ranks(ranks, 2)


# ---- refused


def damage(folder, how):
    data = folder / "__1_0.distcp"
    if how == "missing file":
        data.unlink()
    elif how == "flipped bit":
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 4
        data.write_bytes(raw)
    elif how == "cut short":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "half-written":
        folder.rename(folder.with_name(folder.name + ".saving"))
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "another manifest":
        (folder / "manifest.json").write_text('{"files": [1, 2]}')
    else:  # code in a pickle, its checksum right
        name = ".metadata" if how == "code in the index" else "state.pt"
        payload = pickle.dumps(_Evil())
        (folder / name).write_bytes(payload)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = [len(payload), zlib.crc32(payload)]
        (folder / "manifest.json").write_text(json.dumps(manifest))


class _Evil:
    def __reduce__(self):
        return os.system, ("touch RAN",)


DAMAGES = {
    "missing file": "__1_0.distcp: expected a file",
    "flipped bit": "__1_0.distcp: expected .* with checksum .* the file is damaged",
    "cut short": "__1_0.distcp: expected .* bytes",
    "half-written": "found nothing; .*saving is a half-written one",
    "no manifest": "expected a checkpoint with a manifest.json, .* found none",
    "another manifest": "cannot be read",
    "code in the index": (
        "UnpicklingError: expected the index of a checkpoint, found"
        " posix.system|nt.system"
    ),
    "code in the state": "Weights only load failed",
}


def everywhere(fn, match):
    """fn() fails on every rank, and tells why."""
    try:
        fn()
        text = "nothing was raised"
    except Exception as e:
        text = f"{type(e).__name__}: {e}"
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, text)

    assert all(
        re.search(match, t, re.S) for t in found
    ), f"expected {match}, found {found}"


def test_damaged_checkpoints_are_refused_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def ranks(rank):
        model, optimizer = make("tp2")
        train(model, optimizer)
        before = whole(model, optimizer)
        for how, match in DAMAGES.items():
            save_checkpoint(tmp_path / how, model, optimizer)
            if rank == 0:
                damage(tmp_path / how, how)
            dist.barrier()
            everywhere(lambda: load_checkpoint(tmp_path / how, model, optimizer), match)
        everywhere(
            lambda: load_checkpoint(tmp_path / "nowhere", model),
            "expected a checkpoint .* found nothing",
        )
        everywhere(
            lambda: load_checkpoint(tmp_path, model),
            "expected a checkpoint with a manifest",
        )
        same(whole(model, optimizer), before)
        assert not (tmp_path / "RAN").exists()

    run_ranks(ranks, 2)


def test_what_does_not_fit_is_refused(tmp_path):
    def ranks(rank):
        model, optimizer = make("tp2")
        train(model, optimizer)
        save_checkpoint(tmp_path / "c", model, optimizer)
        wide, wide_optimizer = make("tp2", build=lambda: Fused(hidden=48))
        before = whole(wide, wide_optimizer)
        everywhere(
            lambda: load_checkpoint(tmp_path / "c", wide),
            r"qkv.weight: expected \(144, 48\) .* found \(72, 24\)",
        )
        same(whole(wide, wide_optimizer), before)
        everywhere(
            lambda: load_checkpoint(tmp_path / "c", model.float()),
            "tokens.weight: expected .*float32, found .*float64",
        )
        model.double()
        extended, _ = make("tp2")
        extended.register_buffer("more", torch.ones(3))
        everywhere(
            lambda: load_checkpoint(tmp_path / "c", extended),
            "more: not in the checkpoint",
        )
        save_checkpoint(tmp_path / "d", extended)
        everywhere(
            lambda: load_checkpoint(tmp_path / "d", model), "more: not in the model"
        )
        some = torch.optim.AdamW(list(model.parameters())[:2])
        everywhere(
            lambda: load_checkpoint(tmp_path / "c", model, some),
            "expected an optimizer of the same parameters",
        )
        others = torch.optim.AdamW(make("tp2")[0].parameters())
        everywhere(
            lambda: save_checkpoint(tmp_path / "c", model, others),
            "expected an optimizer of the model's parameters",
        )
        everywhere(
            lambda: save_checkpoint(tmp_path / "c", model, extra={"f": damage}),
            "extra, .* expected numbers",
        )
        everywhere(
            lambda: save_checkpoint(tmp_path / "c", model, extra=[model.qkv.weight]),
            "extra: .* DTensor",
        )
        load_checkpoint(tmp_path / "c", model, optimizer)  # is still there

    run_ranks(ranks, 2)


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    def ranks(rank):
        model, optimizer = make("tp2")
        save_checkpoint(tmp_path / "c", model, optimizer)
        before = whole(model, optimizer)
        train(model, optimizer)
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "thesis.txt").write_text("do not lose me")
        everywhere(
            lambda: save_checkpoint(tmp_path / "mine", model),
            "expected a checkpoint or nothing, found something else",
        )
        everywhere(
            lambda: save_checkpoint(tmp_path / "mine" / "thesis.txt", model),
            "expected a checkpoint or nothing",
        )
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose me"
        if rank == 1:  # its disk is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        everywhere(
            lambda: save_checkpoint(tmp_path / "c", model, optimizer),
            "rank 1: OSError|File too large",
        )
        everywhere(
            lambda: save_checkpoint(
                tmp_path / "c", model, optimizer, async_=True
            ).result(),
            "rank 1: OSError",
        )
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "mine"]
        load_checkpoint(tmp_path / "c", model, optimizer)
        same(whole(model, optimizer), before)

    run_ranks(ranks, 2)


def test_killed_at_any_moment(tmp_path):
    """Ten times a rank is killed after so many Python calls, within saves too; the run
    that resumes ends as one that was left alone."""
    steps, rng = 6, random.Random(0)

    def run(rank, folder, kill=None, async_=False):
        folder.mkdir(exist_ok=True)
        model, optimizer = make("tp2")
        try:
            start = load_checkpoint(folder / "c", model, optimizer)["step"]
        except FileNotFoundError:
            start = 0
        calls = 0

        def count(*_):
            nonlocal calls
            calls += 1
            if kill is not None and (rank, calls) == kill:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        for step in range(start, steps):
            train(model, optimizer, step)
            (folder / f"saves {rank}").touch()
            done = save_checkpoint(
                folder / "c", model, optimizer, extra={"step": step + 1}, async_=async_
            )
            if async_:
                done.result()
            (folder / f"saves {rank}").unlink()
        sys.setprofile(None)
        return calls, whole(model, optimizer)

    calls, expected = run_ranks(run, 2, tmp_path / "alone")[0]
    killed, folder, within_saves = 0, tmp_path / "killed", 0
    while killed < 10:
        kill = rng.randrange(2), rng.randrange(calls // 2)
        try:
            run_ranks(lambda rank: run(rank, folder, kill, killed % 2 == 1), 2)
        except AssertionError as e:
            assert "was stopped, or died" in str(e), e
            killed += 1
            within_saves += (folder / f"saves {kill[0]}").exists()
        else:  # it came to its end before that
            for left in list(folder.glob("c*")):
                left.rename(folder / f"a{left.name} {killed}")
    assert within_saves > 1
    same(run_ranks(lambda rank: run(rank, folder)[1], 2)[0], expected)


def test_torchs_own_readers_and_planners_take_pieces(tmp_path):
    """A weight that is held as k pieces is filled from safetensors by
    HuggingFaceStorageReader and the default planner, neither of which knows pieces."""
    torch.manual_seed(3)
    saved = {k: torch.rand(p.shape).double() for k, p in Fused().named_parameters()}
    save_file(saved, tmp_path / "model.safetensors")

    def ranks(rank):
        model, _ = make("tp2")
        params = {k: p for k, p in model.named_parameters() if isinstance(p, DTensor)}
        assert any(isinstance(p.placements[0], _StridedShard) for p in params.values())
        blocks = {name: Blocks.of(p) for name, p in params.items()}
        dcp.load(blocks, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
        for name, p in params.items():
            torch.testing.assert_close(p.full_tensor(), saved[name], rtol=0, atol=0)

    run_ranks(ranks, 2)
