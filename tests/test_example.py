"""The examples, short: the losses of the split model and of the whole one agree, and a
run that goes on in another layout ends where it would have."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import sklearn.datasets
import torch
import transformers
from ranks import run_ranks
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_trains_and_agrees_with_the_whole_model():
    small = "--layers 1 --hidden 32 --heads 2 --context 32 --batch 2 --steps 3 --check".split()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "train_lm.py"), *small],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Shard(0)" in done.stdout and "difference" in done.stdout


@pytest.mark.parametrize("model", ["cnn", "vit"])
def test_digits_are_learned(model, capfd):
    path = str(ROOT / "examples" / "train_digits.py")
    sklearn.datasets.load_digits()  # imported once, not on each rank
    small = f"--model {model} --steps 40 --batch 32 --width 32 --lr 5e-3".split()

    def ranks(rank):
        assert runpy.run_path(path)["main"](small) == 0

    run_ranks(ranks, 2, init=False)
    told = capfd.readouterr().out
    before, after = map(float, re.findall(r"accuracy ([\d.]+)%", told))
    assert after > before + 10, told
    assert "Shard(0)" in told


def train_2d(n, *args):
    """Run examples/train_2d.py, small, on n ranks."""
    small = (
        "--layers 1 --hidden 64 --context 16 --batch 8 --steps 4 --save-every 1 --dtype"
        " float64".split()
    )
    path = str(ROOT / "examples" / "train_2d.py")

    def ranks(rank):
        assert runpy.run_path(path)["main"]([*small, *map(str, args)]) == 0

    runpy.run_path(
        path
    ), transformers.LlamaForCausalLM  # imported once, not on each rank

    run_ranks(ranks, n, init=False)


def test_2d_goes_on_in_another_layout_as_if_nothing_had_been(tmp_path, capfd):
    straight, moved, more = (tmp_path / name for name in ("straight", "moved", "more"))
    train_2d(4, "--tp", 2, "--checkpoint", tmp_path / "a", "--export", straight)
    train_2d(4, "--tp", 2, "--checkpoint", tmp_path / "b", "--stop", 2)
    train_2d(2, "--tp", 2, "--checkpoint", tmp_path / "b", "--export", moved)
    assert "goes on from step 2" in capfd.readouterr().out
    found, expected = (
        load_file(folder / "model.safetensors") for folder in (moved, straight)
    )
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        # the loss is computed in float32
        torch.testing.assert_close(found[name], t, rtol=0, atol=1e-7, msg=name)

    model = transformers.AutoModelForCausalLM.from_pretrained(moved)
    assert all(torch.equal(t, found[name]) for name, t in model.state_dict().items())
    train_2d(
        4,
        "--model",
        moved,
        "--checkpoint",
        tmp_path / "c",
        "--stop",
        1,
        "--lr",
        0,
        "--export",
        more,
    )
    assert all(
        torch.equal(t, found[name])
        for name, t in load_file(more / "model.safetensors").items()
    )
