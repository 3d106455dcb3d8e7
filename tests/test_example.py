"""The main job, short: the losses of the split model and of the whole one agree, and it says what it should."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_trains_and_agrees_with_the_whole_model():
    small = "--layers 1 --hidden 32 --heads 2 --context 32 --batch 2 --steps 3 --check".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "train_lm.py"), *small], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Shard(0)" in done.stdout and "difference" in done.stdout
