"""Lets the tests import the checkout they are in, installed or not; and keeps backwards
out of the process that ranks are forked from."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

_run_backward = getattr(torch.autograd, "_engine_run_backward", None)


def _refuse(*args, **kwargs):
    raise RuntimeError(
        "a backward in the process of the tests: ranks that are forked from it later"
        " could run none where torch sees a GPU; mark the test with ranks.own_process"
    )


def _let(run):
    torch.autograd._engine_run_backward = run


if _run_backward is not None:
    _let(_refuse)
    os.register_at_fork(after_in_child=lambda: _let(_run_backward))
