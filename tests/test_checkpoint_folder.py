"""Folders of checkpoints: what is not this library's is neither read nor touched, a
reader sees one checkpoint or raises, and an index leads to every element."""

import json
import pickle
import random
import re
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_checkpoint import everywhere, make, same, train, whole
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from quintnet_dt import apply_tensor_parallel, load_checkpoint, save_checkpoint
from quintnet_dt.state import checkpoint
from quintnet_dt.state import folder as folders
from quintnet_dt.state import opened
from quintnet_dt.state.dcp import Reader
from quintnet_dt.state.index import not_exact


def on_rank_0(rank, fn):
    dist.barrier()
    if rank == 0:
        fn()
    dist.barrier()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def run_of(value):
    """A small split model, of which every parameter has one value."""
    model = apply_tensor_parallel(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), 2
    )
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def values(model):
    return {
        t.item()
        for p in model.parameters()
        for t in (p.to_local().min(), p.to_local().max())
    }


USERS = "c.saving", "c.old-1234", "c.saving-0123456789abcdef", "c.old-0123456789abcdef"


def test_what_is_the_users_stays(tmp_path):
    c = tmp_path / "c"

    def ranks(rank):
        one, two = run_of(1.0), run_of(2.0)
        save_checkpoint(c, one)
        on_rank_0(rank, lambda: c.rename(tmp_path / "c.old"))
        everywhere(
            lambda: load_checkpoint(c, two),
            "FileNotFoundError: .* found nothing; c.old is there, load it",
        )
        if rank == 0:
            for name in USERS:
                (tmp_path / name).mkdir()
                (tmp_path / name / "state.pt").write_text("mine")
            (tmp_path / "web").mkdir()
            (tmp_path / "web" / "manifest.json").write_text('{"name": "an app"}')
            (tmp_path / "link").symlink_to("linked")
        for _ in range(2):  # there, and in the place of one
            save_checkpoint(c, two)
            on_rank_0(rank, lambda: (c / "notes.txt").write_text("mine"))
            save_checkpoint(tmp_path / "link", two)
        everywhere(
            lambda: save_checkpoint(tmp_path / "web", two),
            "expected a checkpoint or nothing",
        )
        assert names(tmp_path) == sorted(
            [*USERS, "c", "c.old", "link", "linked", "web"]
        )
        assert all(
            (tmp_path / name / "state.pt").read_text() == "mine" for name in USERS
        )
        assert (tmp_path / "link").is_symlink() and (
            c / "notes.txt"
        ).read_text() == "mine"
        for path, value in (
            (c, 2.0),
            (tmp_path / "link", 2.0),
            (tmp_path / "c.old", 1.0),
        ):
            model = run_of(3.0)
            load_checkpoint(path, model)
            assert values(model) == {value}

    run_ranks(ranks, 2)


def test_killed_between_the_two_renames(tmp_path, monkeypatch):
    """The new one is complete, and is read; the next save puts it in its place before
    it begins."""
    c = tmp_path / "c"

    def ranks(rank):
        one, two, found = (run_of(x) for x in (1.0, 2.0, 3.0))
        save_checkpoint(c, one)
        rename = Path.rename

        def killed(path, to):
            if to == c:
                raise SystemExit
            return rename(path, to)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            patch.setattr(checkpoint, "remove", lambda folder: None)
            patch.setattr(checkpoint, "finish", finish if rank == 0 else None)
            save_checkpoint(c, two)
        assert [re.sub("-.*", "", name) for name in names(tmp_path)] == [
            "c.old",
            "c.saving",
        ]
        load_checkpoint(c, found)
        assert values(found) == {2.0}
        everywhere(
            lambda: save_checkpoint(c, one, extra=print), "extra, .* expected numbers"
        )
        assert names(tmp_path) == ["c"]
        load_checkpoint(c, one)
        assert values(one) == {2.0}

    def finish(*args):
        with pytest.raises(SystemExit):
            folders.finish(*args)

    run_ranks(ranks, 2)


def test_a_reader_beside_a_save(tmp_path, monkeypatch):
    c = tmp_path / "c"

    def ranks(rank):
        one, two = run_of(1.0), run_of(2.0)

        def saved_within(holder, name):
            """load_checkpoint, in which another checkpoint is saved at a call."""
            save_checkpoint(c, one, extra=1)
            do, model = getattr(holder, name), run_of(3.0)

            def instead(*args):
                patch.setattr(holder, name, do)
                save_checkpoint(c, two, extra=2)
                return do(*args)

            with monkeypatch.context() as patch:
                patch.setattr(holder, name, instead)
                return load_checkpoint(c, model), values(model)

        assert saved_within(Reader, "read_data") == (1, {1.0})
        everywhere(
            lambda: saved_within(opened.Opened, "verify"),
            "replaced by a save while it was read",
        )
        # rank 1 opens what was put there after rank 0 had opened another
        save_checkpoint(c, one, extra=1), save_checkpoint(tmp_path / "d", two, extra=2)
        open_it, tries = opened._open, []

        def late(path):
            tries.append(path)
            found = open_it(path) if rank == 0 or len(tries) > 1 else None
            if len(tries) == 1:
                dist.barrier()
                if rank == 1:
                    c.rename(tmp_path / "e"), (tmp_path / "d").rename(c)
            return found or open_it(path)

        monkeypatch.setattr(opened, "_open", late)
        model = run_of(3.0)
        assert (load_checkpoint(c, model), values(model), len(tries)) == (2, {2.0}, 2)

    run_ranks(ranks, 2)


def test_ranks_on_different_file_systems(tmp_path):
    def ranks(rank):
        model, _ = make("tp2")
        everywhere(
            lambda: save_checkpoint(tmp_path / f"disk{rank}" / "c", model),
            "disk1.*: expected the folder that rank 0 made, found none",
        )
        assert not (tmp_path / "disk1").exists() and not list(
            (tmp_path / "disk0").iterdir()
        )

    run_ranks(ranks, 2)


def test_a_folder_that_cannot_be_marked(tmp_path, monkeypatch):
    def full(path, data):
        path.write_bytes(data[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(folders, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "c", nn.Linear(2, 2))
    assert names(tmp_path) == []


# ---- damaged


def change(folder, name, data):
    """Another file, its checksum right."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = [len(data), zlib.crc32(data)]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def lost_chunk(index):
    index.state_dict_metadata["model.qkv.weight"].chunks.pop()


def chunk_twice(index):
    chunks = index.state_dict_metadata["model.up.weight"].chunks
    chunks[1] = ChunkStorageMetadata(torch.Size((12, 0)), chunks[1].sizes)


def lost_place(index):
    del index.storage_data[MetadataIndex("model.norm.bias", torch.Size([0]))]


def outside(index):
    place = next(p for i, p in index.storage_data.items() if i.fqn == "model.norm.bias")
    place.relative_path = "../other/__0_0.distcp"


def beyond(index):
    next(
        p for i, p in index.storage_data.items() if i.fqn == "model.norm.bias"
    ).length = (10**9)


def no_tensor(index):
    index.state_dict_metadata["model.norm.bias"] = None


INDICES = {
    lost_chunk: (
        r"model.qkv.weight: expected blocks that are \(72, 24\) together, found 1440"
        r" elements of"
        r" 1728"
    ),
    chunk_twice: (
        r"model.up.weight: expected blocks .* overlapping ones at \(0, 0\) and"
        r" \(12, 0\)"
    ),
    lost_place: (
        r"model.norm.bias: expected its block at \(0,\) in a file of the checkpoint"
    ),
    outside: (
        r"model.norm.bias: expected its block at \(0,\) in a file of the checkpoint"
    ),
    beyond: r"model.norm.bias: .* beyond its end",
    no_tensor: r"model.norm.bias: expected \(24,\) .*float64, found \(\) NoneType",
}


def test_what_does_not_lead_to_every_element_is_refused(tmp_path):
    c = tmp_path / "c"

    def ranks(rank):
        model, optimizer = make("tp2")
        train(model, optimizer)
        before = whole(model, optimizer)
        save_checkpoint(c, model, optimizer)
        index, state = (c / ".metadata").read_bytes(), (c / "state.pt").read_bytes()
        for damage, match in INDICES.items():
            changed = pickle.loads(index)
            damage(changed)
            on_rank_0(rank, lambda: change(c, ".metadata", pickle.dumps(changed)))
            everywhere(lambda: load_checkpoint(c, model, optimizer), match)
        on_rank_0(rank, lambda: change(c, ".metadata", index))
        for data in b"", state[:10], state[:-30], pickle.dumps([1]):
            on_rank_0(rank, lambda: (c / "state.pt").write_bytes(data))
            everywhere(
                lambda: load_checkpoint(c, model),
                "state.pt: expected .* bytes .* the file is damaged",
            )
            on_rank_0(rank, lambda: change(c, "state.pt", data))
            everywhere(
                lambda: load_checkpoint(c, model),
                "ValueError: .*state.pt: expected|rank .: ValueError: .*state.pt",
            )
        same(whole(model, optimizer), before)

    run_ranks(ranks, 2)


def test_exact_covers():
    """Against counting: boxes of random grids, of which some are moved, dropped or
    doubled."""
    rng, found = random.Random(0), set()
    for _ in range(500):
        shape = tuple(rng.randrange(1, 6) for _ in range(rng.randrange(4)))
        blocks = [((), ())]
        for n in shape:
            cuts = sorted({0, n, rng.randrange(n + 1), rng.randrange(n + 1)})
            blocks = [
                ((*o, a), (*s, b - a))
                for o, s in blocks
                for a, b in zip(cuts, cuts[1:])
            ]
        for _ in range(rng.randrange(3)):
            i = rng.randrange(len(blocks))
            offsets, sizes = blocks[i]
            moved = tuple(o + rng.choice((0, 0, 1, -1)) for o in offsets), sizes
            blocks = rng.choice(
                (
                    blocks[:i] + blocks[i + 1 :] or blocks,
                    blocks + [blocks[i]],
                    [*blocks[:i], moved, *blocks[i + 1 :]],
                )
            )
        inside = all(
            o >= 0 and o + s <= n for os, ss in blocks for o, s, n in zip(os, ss, shape)
        )
        count = torch.zeros(shape)
        for offsets, sizes in blocks if inside else ():
            count[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))] += 1
        exact = inside and bool((count == 1).all())
        assert (not_exact(shape, blocks) is None) == exact, (shape, blocks)
        found.add(exact)
    assert found == {True, False}
    assert (
        not_exact((0, 3), []) is None
        and not_exact((3,), [((0, 0), (3, 1))])
        and not_exact((2,), [])
    )
