"""The command line, as a user runs it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import hf
from safetensors.torch import load_file
from torch import nn

from quintnet_dt import TensorParallelPlan, plan_tensor_parallel, save_checkpoint
from quintnet_dt.command_line import main

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

def number():
    return 3

def broken():
    raise KeyError("no such size")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a model in it."""
    (tmp_path / "small_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("small_model", None)


def command(*arguments):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "quintnet_dt", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_plan_and_what_its_step_takes(folder):
    inputs = "--input", "2,16,48:float32"
    done = command(
        "plan", "small_model.py:make", "--tp", 2, "--compare", "1,2", *inputs
    )
    assert (done.returncode, done.stderr) == (0, "")
    plan, estimate, comparison = done.stdout.strip().split("\n\n")
    assert plan.startswith("tensor parallel over 2 ranks: each holds 50.3% of")
    assert "an axis of 96 units, 48 a rank" in plan
    assert "parameters               18.8 kB" in estimate and "on H100" in estimate
    assert len(comparison.splitlines()) == 4
    assert "\x1b" not in done.stdout


def test_a_config_as_json(folder):
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    options = "--dtype", "bfloat16", "--device", "A100", "--optimizer", "sgd"
    inputs = "--input", "input_ids=2,8:int64"
    done = command("plan", "config.json", "--tp", 2, "--json", *options, *inputs)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    plan = TensorParallelPlan.from_json(json.dumps(found["plan"]))
    assert plan.cost.device == found["estimate"]["device"] == "A100"
    elements = sum(e.share(2) for e in plan.entries.values())
    assert found["estimate"]["parameters"] == 2 * elements
    assert found["estimate"]["optimizer_state"] == 0


def test_verify(folder):
    done = command("verify", "small_model:make", "--tp", 2, "--input", "2,48")
    assert done.returncode == 0, done.stderr
    assert "computes what the whole model does" in done.stdout


WRONG = {
    "small_model.py:number": "found that it returns a int",
    "small_model.py:broken": "small_model.py:broken: KeyError: 'no such size'",
    "small_model.py:nothing": "expected nothing in small_model.py, found none",
    "no_model.py:make": "no_model.py: expected a file, found none",
    "no_such_package:make": "ModuleNotFoundError: No module named 'no_such_package'",
    "somewhere": "expected package.module:factory, file.py:factory",
    "small_model.py:make --input 3,4": "RuntimeError: ",
    "small_model.py:make --input 3,x": "--input 3,x: expected a shape and a dtype",
    "small_model.py:make --input 3:float9": "expected a dtype of torch, found 'float9'",
    "small_model.py:make --input 3,48 --input x=3,48": "found both",
}


@pytest.mark.parametrize("given", WRONG)
def test_what_is_wrong_is_told_in_one_line(given, folder, capsys):
    assert main(["plan", *given.split(), "--tp", "2"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("quintnet-dt: ") and WRONG[given] in err


def test_what_is_not_understood_is_code_2(capsys):
    assert main(["plan", "small_model.py:make"]) == 2
    assert "give --tp N, or --compare" in capsys.readouterr().err
    for arguments in ([], ["plan"], ["plan", "x:y", "--tp", "two"], ["verify", "x:y"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2


def test_help_has_examples(capsys):
    for arguments in (["--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
        assert "quintnet-dt plan my_model.py:make --tp 8" in capsys.readouterr().out


def test_a_checkpoint_is_looked_at_and_written_as_safetensors(tmp_path, capsys):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleList([nn.Linear(4, 3), nn.BatchNorm1d(3)])
            self.scale = nn.Parameter(torch.randn(2).bfloat16())

    model, out = Model(), tmp_path / "out"
    save_checkpoint(tmp_path / "run", model, extra={"step": 7})
    assert main(["inspect", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.body.0.weight  3 x 4  float32" in lines
    assert "model.scale  2  bfloat16" in lines
    assert lines[-1] == "8 tensors, 120 B; extra: {'step': 7}"
    assert main(["export", str(tmp_path / "run"), str(out)]) == 0
    found, expected = load_file(out / "model.safetensors"), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 1
    assert "expected a checkpoint with a manifest.json" in capsys.readouterr().err


def test_what_is_planned_is_logged_and_silent_by_default(caplog, capfd):
    class Odd(nn.Linear):
        """Reads a size in a way that no shard can show right."""

        def forward(self, x):
            y = super().forward(x)
            return y * (y.shape[-1] ** 0.5)

    model, x = nn.Sequential(Odd(8, 64), nn.Linear(64, 8)), torch.ones(4, 8)
    plan_tensor_parallel(model, 2, example_inputs=(x,))
    assert capfd.readouterr() == ("", "")
    with caplog.at_level(logging.INFO, "quintnet_dt"):
        plan_tensor_parallel(model, 2, example_inputs=(x,))
    *given_up, planned = [record.getMessage() for record in caplog.records]
    assert planned.startswith("planned Sequential over 2 ranks: each holds")
    assert given_up and "given up" in given_up[0] and "8.0 becomes" in given_up[0]
