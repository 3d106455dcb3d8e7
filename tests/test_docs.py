"""The documentation is run: every Python block of the README and of the guide, and what
is told of commands."""

import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from ranks import run_ranks
from torch import nn
from torch.distributed import fsdp, pipelining

from quintnet_dt import command_line

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
RANKS = re.compile(r"# (?:torchrun, (\d) processes|python)\b")
FILE = re.compile(r"# (\w+\.py)\n")


@dataclass(frozen=True)
class Section:
    """Of a page, from one heading to the next: its blocks of Python, and the lines of
    the others."""

    page: Path
    title: str
    python: list[str]
    lines: list[str]


def sections() -> list[Section]:
    found = []
    for page in PAGES:
        for text in re.split(r"^#+ (?=[^\n]*\n\n)", page.read_text(), flags=re.M):
            blocks = BLOCK.findall(text)
            python = [code for kind, code in blocks if kind == "python"]
            others = [code for kind, code in blocks if kind != "python"]
            lines = "".join(others).splitlines()
            found.append(Section(page, text.partition("\n")[0], python, lines))
    return found


SECTIONS = sections()

# Imported once, not on each rank.
USED = (
    fsdp.fully_shard,
    peft.LoraConfig,
    pipelining.ScheduleGPipe,
    transformers.GenerationMixin,
    transformers.LlamaForCausalLM,
    transformers.Trainer,
)


def write_modules(folder: Path) -> None:
    """The files that the pages tell to write."""
    for code in (code for section in SECTIONS for code in section.python):
        if FILE.match(code):
            (folder / FILE.match(code)[1]).write_text(code)


def programs(section: Section) -> list[str]:
    """A block with a first line that says how it is started, and those that go on from
    it."""
    found = []
    for code in section.python:
        if FILE.match(code):
            continue
        if RANKS.match(code):
            found.append(code)
        else:
            found[-1] += code
    return found


def run(code: str, folder: Path) -> None:
    """As its first line says."""
    processes = RANKS.match(code)[1]
    if "verify_tensor_parallel" in code:
        # On ranks that are there: that it starts its own is tested in test_verify.py,
        # and takes seconds.
        processes = 2

    def ranks(rank):
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        if not processes:  # no launcher: as `python` starts it
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
                del os.environ[name]
        # accelerate lets no tensor parallel model, whoever's, be trained on CPUs
        config = accelerate.parallelism_config.ParallelismConfig
        config._validate_accelerator = lambda *_: None
        # what the README says is the reader's
        names = {"MyModel": lambda: nn.Linear(8, 8), "x": torch.ones(2, 8)}
        exec(compile(code, "<block>", "exec"), {"__name__": "__main__", **names})

    run_ranks(ranks, int(processes or 1), init=False)


WITH_PROGRAMS = [section for section in SECTIONS if programs(section)]


@pytest.mark.parametrize(
    "section", WITH_PROGRAMS, ids=lambda s: s.title.lower().replace(" ", "-")
)
def test_programs_run(section, tmp_path):
    write_modules(tmp_path)
    for code in programs(section):
        run(code, tmp_path)


def commands() -> list[list[str]]:
    """The commands of the pages, in words."""
    lines = [line for section in SECTIONS for line in section.lines]
    ours = re.compile(r".*?(quintnet-dt |-m quintnet_dt |examples/\w+\.py)(.*)")
    found = [match for match in map(ours.match, lines) if match]
    return [[match[1].split()[-1], *shlex.split(match[2])] for match in found]


def help_of(command: str, words: list[str]) -> str:
    """What --help prints."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        if not command.endswith(".py"):
            command_line.main([words[0], "--help"])
        elif command.endswith("train_lm.py"):  # which reads sys.argv
            sys.argv = [command, "--help"]
            runpy.run_path(str(ROOT / command))["main"]()
        else:
            runpy.run_path(str(ROOT / command))["main"](["--help"])
    return told.getvalue()


def test_commands_have_the_options_that_are_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    assert len(commands()) > 10
    for command, *words in commands():
        told = help_of(command, words)
        assert [w for w in words if w[:2] == "--" and w not in told] == []


def test_the_first_plan_of_the_guide(tmp_path, capfd):
    write_modules(tmp_path)
    plans = [words for _, *words in commands() if words[1:2] == ["my_model.py:make"]]
    assert plans[0][0] == "plan"

    def ranks(rank):
        os.chdir(tmp_path)
        return command_line.main(plans[0])

    assert run_ranks(ranks, 1, init=False) == [0]
    assert "of communication on H100" in capfd.readouterr().out


def test_links_lead_somewhere():
    """Within the repository, and to headings of the page itself."""
    for page in PAGES:
        text = BLOCK.sub("", page.read_text())
        titles = re.findall(r"^#+ (.*)$", text, re.M)
        marks = [re.sub(r"[^\w\s_-]", "", t).lower().replace(" ", "-") for t in titles]
        for target in re.findall(r"\]\((?!http)([^)]*)\)", text):
            path, _, mark = target.partition("#")
            assert (page.parent / path).exists(), target
            assert path or mark in marks, target
