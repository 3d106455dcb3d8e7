"""Weights in safetensors files: round trips bit for bit in every layout, to and from
transformers."""

import json
import sys

import pytest
import torch
import torch.distributed as dist
from models.saved import (
    BUILDS,
    Odd,
    call,
    gpt2,
    make,
    on_meta,
    same,
    save_alone,
    split,
    tied_llama,
    whole,
    written,
)
from ranks import run_ranks
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quintnet_dt import export_safetensors, load_safetensors
from quintnet_dt.state import files
from quintnet_dt.state.files import DTYPES, open_file

# ---- one process


@pytest.mark.parametrize("build", BUILDS)
def test_one_process(build, tmp_path):
    model = make(build)
    export_safetensors(tmp_path / "one", model, progress=False)
    export_safetensors(tmp_path / "many", model, max_shard_size="2KiB", progress=False)
    names = {f.name for f in (tmp_path / "many").iterdir()}
    n = len(names) - 1 - (build is not Odd)
    assert {
        f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)
    } < names and n > 2
    for folder in "one", "many":
        other = make(build, 1)
        assert load_safetensors(tmp_path / folder, other, progress=False) == ([], [])
        same(other, model)
        load_safetensors(tmp_path / folder, other := on_meta(build), progress=False)
        same(other, model)
        assert torch.equal(call(other, build), call(model, build))
        if build is not Odd:
            other = type(model).from_pretrained(tmp_path / folder)
            same(other, model)
            other.save_pretrained(
                tmp_path / "theirs",
                max_shard_size="30KB" if folder == "many" else "5GB",
            )
            load_safetensors(
                tmp_path / "theirs", mine := make(build, 2), progress=False
            )
            same(mine, model)
    file = tmp_path / "one" / "model.safetensors"
    missing = make(build, 1).load_state_dict(load_file(file), strict=False).missing_keys
    assert missing == (["lm_head.weight"] if build in (tied_llama, gpt2) else [])
    load_model(other := make(build, 1), file)
    same(other, model)
    header = file.read_bytes()[8:]
    assert json.JSONDecoder().raw_decode(header.decode("latin1"))[0][
        "__metadata__"
    ] == {"format": "pt"}


def test_an_export_replaces_an_earlier_one(tmp_path):
    model = make(Odd)
    for size in "1KB", "5GB", 2000:
        export_safetensors(tmp_path, model, max_shard_size=size, progress=False)
        names = sorted(written(tmp_path))
        assert len(names) == (1 if size == "5GB" else int(names[-2][-17:-12]) + 1)
        load_safetensors(tmp_path, other := make(Odd, 1), progress=False)
        same(other, model)


def test_every_dtype_and_no_tqdm(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    model, other = nn.Module(), nn.Module()
    for i, dtype in enumerate(DTYPES.values()):
        for m, values in (model, torch.randint(0, 255, (3, 5 * dtype.itemsize))), (
            other,
            torch.zeros(3, 5 * dtype.itemsize),
        ):
            raw = values.to(torch.uint8) % (2 if dtype == torch.bool else 255)
            m.register_buffer(f"t{i}", raw.view(dtype))
    export_safetensors(tmp_path, model)
    theirs = load_file(tmp_path / "model.safetensors")
    assert load_safetensors(tmp_path / "model.safetensors", other) == ([], [])
    for name, t in model.named_buffers():
        for found in theirs[name], getattr(other, name):
            assert found.dtype == t.dtype and torch.equal(
                found.view(torch.uint8), t.view(torch.uint8)
            ), t.dtype


# ---- every layout


@pytest.mark.parametrize(
    "n, layout", [(2, "tp"), (4, "tp"), (4, "fsdp"), (4, "hsdp"), (4, "replicas")]
)
def test_layouts(n, layout, tmp_path):
    """A sharded model's files are those of the whole one, byte for byte, and fill
    sharded models, live and on meta."""
    builds = {
        "2-tp": (gpt2, Odd),
        "4-tp": (tied_llama, Odd),
        "4-fsdp": (tied_llama, gpt2, Odd),
    }.get(f"{n}-{layout}", [Odd])
    for build in builds:
        export_safetensors(
            tmp_path / f"{build.__name__}-whole",
            make(build),
            max_shard_size="9KB",
            progress=False,
        )

    def ranks(rank):
        # so that blocks are read and written in many pieces, of rows and of parts of
        # rows
        if n == 4:
            files._BUFFER = 100
        for build in builds:
            folder, model, expected = (
                tmp_path / build.__name__,
                make(build),
                make(build),
            )
            split(model, build, layout)
            export_safetensors(folder, model, max_shard_size="9KB", progress=False)
            dist.barrier()
            a, b = written(folder), written(tmp_path / f"{build.__name__}-whole")
            assert a.keys() == b.keys()
            assert all(a[name] == b[name] for name in b), (
                build,
                [name for name in b if a[name] != b[name]],
            )
            for t in model.state_dict().values():
                (t.to_local() if isinstance(t, DTensor) else t).zero_()
            load_safetensors(folder, model, progress=False)
            same(model, expected, build)
            meta = split(on_meta(build), build, layout)
            load_safetensors(folder, meta, progress=False)
            same(meta, expected, build)
            for (name, p), q in zip(meta.named_parameters(), model.parameters()):
                assert (
                    p.placements == q.placements
                    and p.device_mesh == q.device_mesh
                    and p.requires_grad
                ), name
            if build is not Odd:
                assert meta.lm_head.weight is meta.get_input_embeddings().weight
            torch.testing.assert_close(call(meta, build), call(expected, build))
            # A forward leaves FSDP2's outermost parameters gathered.
            export_safetensors(folder, meta, max_shard_size="9KB", progress=False)
            dist.barrier()
            assert written(folder) == a
            for p in expected.parameters():
                p.data.mul_(2)
            if rank == 0:
                save_alone(tmp_path / f"{build.__name__}-twice", expected)
            dist.barrier()
            load_safetensors(tmp_path / f"{build.__name__}-twice", meta, progress=False)
            torch.testing.assert_close(call(meta, build), call(expected, build))

    run_ranks(ranks, n, timeout=120)


def test_a_bar_on_rank_0(tmp_path, capfd):
    def ranks(rank):
        export_safetensors(tmp_path, split(make(Odd), Odd, "tp"))

    run_ranks(ranks, 2)
    shown = capfd.readouterr().err
    assert shown.count("writing:") >= 1 and "100%" in shown and shown.count("100%") == 1


def test_columns_of_a_large_file(tmp_path):
    """A file is opened anew many times, also within a tensor of which a rank has some
    columns."""
    shape = torch.arange(3 * 700 * 1001).view(3, 700, 1001)
    save_file(
        {"columns": shape, "rows": shape.mT.contiguous()}, tmp_path / "a.safetensors"
    )
    opened = []

    def counted(path):
        opened.append(path)
        return open_file(path)

    def ranks(rank):
        files.open_file = counted
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Module()
        for name, t, dim in ("columns", shape, 2), ("rows", shape.mT, 1):
            empty = distribute_tensor(torch.zeros_like(t), mesh, [Shard(dim)])
            model.register_buffer(name, empty)
        assert load_safetensors(tmp_path, model, progress=False) == ([], [])
        assert torch.equal(whole(model.columns), shape) and torch.equal(
            whole(model.rows), shape.mT
        )
        assert 10 < len(opened) < 60

    run_ranks(ranks, 2)
