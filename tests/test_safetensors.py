"""Weights in safetensors files: round trips bit for bit in every layout, to and from
transformers; what does not fit raises on every rank."""

import json
import resource
import struct
import sys

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_ranks
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from quintnet_dt import apply_tensor_parallel, export_safetensors, load_safetensors
from quintnet_dt.state import files
from quintnet_dt.state.files import DTYPES, open_file

SIZES = dict(vocab_size=97, num_hidden_layers=1, hidden_size=32, num_attention_heads=4)


def llama(tied=False):
    config = transformers.LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        intermediate_size=44,
        tie_word_embeddings=tied,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tied_llama():
    return llama(tied=True)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=98,
        n_positions=32,
        n_embd=32,
        n_layer=1,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


class Odd(nn.Module):
    """Every dtype, a number, nothing, a persistent and a passing buffer, sizes that
    ranks do not divide; a fused weight; a convolution."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.f = (
            nn.Linear(12, 36),
            nn.Linear(12, 12, bias=False),
            nn.Linear(12, 13),
        )
        self.conv = nn.Conv1d(13, 8, 3)
        self.scale, self.none = nn.Parameter(torch.tensor([2.5])), nn.Parameter(
            torch.empty(0, 3)
        )
        self.register_buffer("mask", torch.rand(3) > 0.5)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("halves", torch.rand(5, 3).bfloat16())
        self.register_buffer("small", torch.randint(-9, 9, (4, 2), dtype=torch.int8))
        self.register_buffer("passing", torch.arange(3.0), persistent=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, 3)).transpose(1, 2) for t in (q, k, v))
        y = self.f(
            self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
            * self.scale
        )
        return self.conv(y.mT) * self.passing.sum()

    def reset_parameters(self):
        for name, t in [
            *self.named_parameters(recurse=False),
            *self.named_buffers(recurse=False),
        ]:
            t.copy_(torch.arange(3.0) if name == "passing" else torch.zeros(()))


BUILDS = llama, tied_llama, gpt2, Odd


def inputs(build):
    gen = torch.Generator().manual_seed(5)
    if build is Odd:
        return (torch.randn(2, 5, 12, generator=gen),)
    return {"input_ids": torch.randint(0, 90, (2, 8), generator=gen)}


def call(model, build):
    given = inputs(build)
    with torch.no_grad():
        return model(*given) if build is Odd else model(**given).logits


def make(build, seed=0):
    torch.manual_seed(seed)
    return build()


def on_meta(build):
    with torch.device("meta"):
        return build()


def split(model, build, layout):
    """A model on ("tp",) of all ranks, or on ("dp", "tp")."""
    if layout == "tp":
        return apply_tensor_parallel(
            model, dist.get_world_size(), example_inputs=inputs(build)
        )
    if layout == "hsdp":
        mesh = init_device_mesh(
            "cpu", (2, 1, 2), mesh_dim_names=("replicate", "shard", "tp")
        )
        apply_tensor_parallel(model, mesh=mesh["tp"], example_inputs=inputs(build))
        return fully_shard(model, mesh=mesh["replicate", "shard"])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    apply_tensor_parallel(model, mesh=mesh["tp"], example_inputs=inputs(build))
    if layout == "fsdp":
        fully_shard(model, mesh=mesh["dp"])
    return model


def whole(t):
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def same(model, other, what=""):
    """Bit for bit the same state dict, ties included."""
    mine, its = model.state_dict(), other.state_dict()
    assert list(mine) == list(its)
    for name, t in its.items():
        a, b = whole(mine[name]), whole(t)
        assert a.dtype == b.dtype and a.shape == b.shape, (what, name)
        assert (
            a.flatten().view(torch.uint8).tolist()
            == b.flatten().view(torch.uint8).tolist()
        ), (
            what,
            name,
        )


def written(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def save_alone(folder, model):
    folder.mkdir()
    save_file(
        {n: t.contiguous().clone() for n, t in model.state_dict().items()},
        folder / "any.safetensors",
    )


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


# ---- what does not fit


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
