"""Files of weights that do not fit a model, in part or at all, and exports that fail:
an error on every rank."""

import json
import os
import resource
import struct
import sys

import pytest
import torch
import torch.distributed as dist
from models.saved import Odd, make, on_meta, same, split, written
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from quintnet_dt import export_safetensors, load_safetensors
from quintnet_dt.state import safetensors
from quintnet_dt.state.files import read


def broken_files(folder):
    """(what is wrong, a source that has it, a piece of the error)."""
    good = make(Odd)
    export_safetensors(folder / "good", good, progress=False)
    data = (folder / "good" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])

    def file(name, content):
        (folder / f"{name}.safetensors").write_bytes(content)
        return folder / f"{name}.safetensors"

    def changed(name, **entry):
        text = json.dumps(
            {**header, "out.weight": {**header["out.weight"], **entry}}
        ).encode()
        return file(name, struct.pack("<Q", len(text)) + text + data[8 + length :])

    def written(name, text, bytes_=data[8 + length :]):
        return file(name, struct.pack("<Q", len(text)) + text + bytes_)

    def moved(name, by):
        """A header in which the last tensor of the file begins elsewhere."""
        last = max(header, key=lambda n: header[n].get("data_offsets", [-1])[0])
        start, end = header[last]["data_offsets"]
        entry = {**header[last], "data_offsets": [start + by, end + by]}
        return written(
            name,
            json.dumps({**header, last: entry}).encode(),
            data[8 + length :] + b"\0" * max(by, 0),
        )

    def index(name, content):
        (folder / f"{name}.safetensors.index.json").write_text(content)
        return folder / f"{name}.safetensors.index.json"

    (folder / "empty").mkdir()
    (folder / "two").mkdir()
    for name in "ab":
        (folder / "two" / f"{name}.safetensors").write_bytes(data)
    at = json.dumps({"weight_map": {"nothere": "good/model.safetensors"}})
    yield folder / "absent", "no .*absent"
    yield folder / "empty", "found none"
    yield folder / "two", r"\['a.safetensors', 'b.safetensors'\]"
    yield file("nothing", b""), "whole safetensors file"
    yield file("pickle", b"\x80\x02}q\x00" * 99), "whole safetensors file"
    yield file("header", data[: length // 2]), "whole safetensors file"
    whole = "{}.safetensors: expected a whole safetensors file"
    text, twice = data[8 : 8 + length], json.dumps(header)[:-1] + ', "f.bias": {}}'
    no_texts = json.dumps({**header, "__metadata__": {"a": 1}})
    for source in (
        file("cut", data[:-1]),
        file("json", data[:8] + b"x" + data[9:]),
        changed("outside", data_offsets=[10**6, 10**6 + 576]),
        changed("negative", data_offsets=[-576, 0]),
        changed("short", data_offsets=[0, 572]),
        changed("dtype", dtype="F5"),
        changed("true", shape=[True, 144]),
        file("trailing", data + b"\0" * 3),
        file("shorter header", struct.pack("<Q", length - 1) + data[8:]),
        written("longer header", text + b" " * 8, data[16 + length :]),
        written("longer", text + b"{"),
        moved("overlap", -1),
        moved("hole", 1),
        written("twice", twice.encode()),
        written("metadata", no_texts.encode()),
        written("utf-16", json.dumps(header).encode("utf-16")),
    ):
        yield source, whole.format(source.stem)
    yield index("text", "{"), "expected an index"
    yield index("map", '{"weight_map": 3}'), "expected an index"
    yield index("gone", '{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"
    yield index("lists", at), "found none of nothere"
    weights = load_file(folder / "good" / "model.safetensors")
    weights["prefix.f.bias"] = weights.pop("f.bias")
    weights["out.weight"], weights["qkv.weight"] = torch.zeros(12, 11), torch.zeros(
        12, 36
    )
    save_file(weights, folder / "names.safetensors")
    listed = (
        "4 of its tensors differ:\n  f.bias: missing from the file\n  prefix.f.bias:"
        " not in the"
        " model\n"
        r"  qkv.weight: expected shape \(36, 12\), found \(12, 36\)\n  out.weight:"
        r" expected shape"
        r" \(12, 12\), found \(12, 11\)"
    )
    yield folder / "names.safetensors", listed


def test_files_that_do_not_fit(tmp_path):
    cases = list(broken_files(tmp_path))

    def ranks(rank):
        model, kept = split(make(Odd, 1), Odd, "tp"), split(make(Odd, 1), Odd, "tp")
        for source, match in cases:
            with pytest.raises((ValueError, FileNotFoundError), match=match):
                load_safetensors(source, model, progress=False)
        bad = tmp_path / ("names.safetensors" if rank else "good")  # on one rank only
        with pytest.raises(
            ValueError if rank else RuntimeError, match="4 of its tensors differ"
        ):
            load_safetensors(bad, model, progress=False)
        same(model, kept)
        meta = split(on_meta(Odd), Odd, "tp")
        with pytest.raises(ValueError, match="4 of its tensors differ"):
            load_safetensors(
                bad if rank else tmp_path / "names.safetensors", meta, progress=False
            )
        assert all(p.is_meta for p in meta.parameters())
        load_safetensors(tmp_path / "good", model, progress=False)
        same(model, split(make(Odd), Odd, "tp"))

    run_ranks(ranks, 2)


@pytest.mark.parametrize("kept", [0, 0.02, 0.5, 0.99])
def test_a_file_cut_short_meanwhile(kept, tmp_path):
    """After its names were read and before its values are: it is opened anew, and what
    a header tells that is not there is refused. To read it would end the process."""
    export_safetensors(tmp_path, make(Odd), progress=False)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size

    def cut_and_read(*args):
        os.truncate(path, min(size - 1, int(kept * size)))
        return read(*args)

    def ranks(rank):
        model = split(make(Odd, 1), Odd, "tp")
        safetensors.read = cut_and_read
        with pytest.raises(ValueError, match=f"{path}: expected a whole safetensors"):
            load_safetensors(tmp_path, model, progress=False)

    run_ranks(ranks, 2)


def test_without_the_package(tmp_path, monkeypatch):
    """Files are written without it; to read them is refused on every rank, with what to
    install."""
    monkeypatch.setitem(sys.modules, "safetensors", None)

    def ranks(rank):
        model, kept = split(make(Odd, 1), Odd, "tp"), split(make(Odd, 1), Odd, "tp")
        export_safetensors(tmp_path, split(make(Odd), Odd, "tp"), progress=False)
        with pytest.raises(ImportError, match="pip install safetensors"):
            load_safetensors(tmp_path, model, progress=False)
        same(model, kept)

    run_ranks(ranks, 2)


def test_not_strict(tmp_path):
    """Names that do not fit are returned; of other dtypes, values are cast; what is
    missing stays, or gets first values."""

    def ranks(rank):
        given = {
            n: t
            for n, t in make(Odd).double().state_dict().items()
            if not n.startswith("f.")
        }
        given["more"] = torch.ones(3)
        if rank == 0:
            save_file(given, tmp_path / "model.safetensors")
        dist.barrier()
        model = split(make(Odd, 1), Odd, "tp")
        assert load_safetensors(tmp_path, model, strict=False, progress=False) == (
            ["f.weight", "f.bias"],
            ["more"],
        )
        expected = make(Odd, 1)
        expected.load_state_dict(given, strict=False)
        same(model, expected)
        torch.manual_seed(rank)
        meta = split(on_meta(Odd), Odd, "tp")
        load_safetensors(tmp_path, meta, strict=False, progress=False)
        torch.manual_seed(0)
        expected.f.reset_parameters()
        same(meta, expected)
        assert torch.equal(meta.passing, torch.arange(3.0))

    run_ranks(ranks, 2)


def test_exports_that_fail(tmp_path):
    """A folder that cannot be written, a full disk on one rank, weights without values:
    an error on every rank, and the folder is as it was."""
    (tmp_path / "file").write_text("")
    big = tmp_path / "full"
    export_safetensors(big, make(Odd), progress=False)
    (big / "model.safetensors.partial").write_text("a download of the user's")
    before = written(big)
    (big / "model.safetensors.partial-0123456789abcdef").write_text(
        "of an export that was killed"
    )

    def ranks(rank):
        model = split(make(Odd, 1), Odd, "tp")
        for folder in tmp_path / "file", tmp_path / "file" / "below":
            with pytest.raises(RuntimeError if rank else OSError, match="file"):
                export_safetensors(folder, model, progress=False)
        with pytest.raises(ValueError, match="max_shard_size.*found '5 apples'"):
            export_safetensors(big, model, max_shard_size="5 apples", progress=False)
        with pytest.raises(ValueError, match="others: .*qkv.weight"):
            export_safetensors(big, split(on_meta(Odd), Odd, "tp"), progress=False)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        for full in 1, 0:
            if rank == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
            with pytest.raises(
                OSError if rank == full else RuntimeError, match="File too large"
            ):
                export_safetensors(big, model, progress=False)
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            dist.barrier()
            assert written(big) == before
            dist.barrier()
        export_safetensors(big, model, progress=False)
        load_safetensors(big, other := split(make(Odd), Odd, "tp"), progress=False)
        same(other, model)

    run_ranks(ranks, 2)
