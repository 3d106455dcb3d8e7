"""Runs a function on n real processes: the helper of every multi-process test.

    from ranks import run_ranks

    def test_sum():
        def ranks(rank):
            x = torch.tensor(float(rank))
            dist.all_reduce(x)
            return x.item()

        assert run_ranks(ranks, 2) == [1.0, 1.0]

The processes are forked, so the function may be a closure, and nothing is imported
again. Each call has processes of its own, so no test sees what another left behind. The
calling process must not have initialised a default process group itself, nor run a
backward: torch that sees a GPU then refuses one in a fork of it. Tests that need one
take `own_process`; conftest.py refuses a backward outside.

Forks share one hash seed, which processes that torchrun starts do not: ``fresh=True``
starts new ones, each with a seed of its own (2 s a call).
"""

import contextlib
import faulthandler
import functools
import gc
import os
import pickle
import selectors
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

# A first plan imports these. Imported before the fork they cost nothing; after it,
# every rank of every test would spend a second on them.
import torch._dynamo
import torch.distributed as dist
import torch.distributed.tensor.experimental

_GRACE = 1.0  # seconds the other ranks have to report after one has failed
_RETURNED, _RAISED, _LOST = "returned", "raised", "lost"


@dataclass(frozen=True)
class _Rank:
    """What a new process is told."""

    fn: Callable
    args: tuple
    rank: int
    n: int
    timeout: float
    folder: str  # of this run: the file over which the ranks meet, and where they hang
    port: int | None  # of torchrun's store; None: the process group is made over a file
    report_to: int = -1  # end of a pipe
    release: int = -1  # end of a pipe that is closed once this process may leave


@dataclass(frozen=True)
class _Report:
    """What came of a rank."""

    word: str
    value: Any  # what it returned; or the error, as "Type: message"; or where it hung
    trace: str = ""


_NO_REPORT = _Report(_LOST, "")


def run_ranks(fn, n, *args, timeout=60, init=True, expect_failure=False, fresh=False):
    """``[fn(0, *args), ..., fn(n - 1, *args)]``, each on a process of its own.

    Each process has one thread, RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE in
    its environment, and a default process group (gloo, over a file). No process leaves
    before all are done, and none survives this call.

    Args:
        fn: called with the rank, then ``args``; what it returns must be picklable.
        n: the number of ranks.
        timeout: seconds for the whole.
        init: False makes no process group, but sets MASTER_ADDR and MASTER_PORT as
            torchrun does, so that ``fn`` can initialise one itself.
        expect_failure: every rank must raise; returns each one's "Type: message".
        fresh: each process is a new one, with another PYTHONHASHSEED; ``fn`` must then
            be a function of a module, and ``args`` be picklable.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or ran out of time
        (with the place
            where it hung); or did not raise where it should.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "run_ranks forks, and this process has a default process group; call"
            " dist.destroy_process_group() first"
        )
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        listener = None if init else stack.enter_context(_listener())
        port = listener and listener.getsockname()[1]
        lives = [_Rank(fn, args, rank, n, timeout, folder, port) for rank in range(n)]
        with _processes(lives, _start if fresh else _fork) as processes:
            # The store lives as long as the ranks do.
            store = listener and _torchrun_store(listener)
            processes.collect(timeout, patient=expect_failure)
        del store
        reports = [
            (
                _Report(_LOST, _where_it_hung(folder, rank))
                if report is _NO_REPORT
                else report
            )
            for rank, report in enumerate(processes.reports)
        ]
    return _verdict(reports, timeout, expect_failure)


def alone(fn, timeout=60):
    """``fn()``, on a process of its own that no launcher started."""

    def ranks(rank):
        for name in (
            "RANK",
            "LOCAL_RANK",
            "WORLD_SIZE",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            del os.environ[name]
        return fn()

    return run_ranks(ranks, 1, timeout=timeout, init=False)[0]


def own_process(test):
    """A test that runs a backward itself, and no ranks, on a process of its own."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        alone(functools.partial(test, *args, **kwargs))

    return wrapped


# -------------------------------------------------------- in the calling process


def _listener():
    """A socket on a free port."""
    listener = socket.socket()
    listener.bind(("localhost", 0))
    listener.listen()
    return listener


def _torchrun_store(listener):
    """The store's server, as torchrun's agent holds it."""
    return dist.TCPStore(
        "localhost",
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=os.dup(listener.fileno()),
    )


class _Processes:
    """The processes of one run, and what they reported so far."""

    def __init__(self, n):
        self.pids, self.pipes = [], []
        self.reports = [_NO_REPORT] * n

    def collect(self, timeout, patient):
        """Fills in the reports as they come, till all have reported or one failed."""
        # A rank that runs out of time writes where it hangs and exits by itself.
        deadline = time.monotonic() + timeout + 5
        received = [b""] * len(self.pipes)
        with selectors.DefaultSelector() as selector:
            for rank, pipe in enumerate(self.pipes):
                selector.register(pipe, selectors.EVENT_READ, rank)
            while selector.get_map():
                events = selector.select(max(0, deadline - time.monotonic()))
                if not events:
                    return
                for key, _ in events:
                    rank = key.data
                    block = os.read(key.fd, 1 << 20)
                    received[rank] += block
                    if block:
                        continue
                    # The rank closed its end.
                    selector.unregister(key.fd)
                    if received[rank]:
                        self.reports[rank] = pickle.loads(received[rank])
                    if self.reports[rank].word != _RETURNED and not patient:
                        deadline = min(deadline, time.monotonic() + _GRACE)

    def end(self):
        """Waits till all have left; stops them where one failed, as the others may then
        hang."""
        if any(report.word != _RETURNED for report in self.reports):
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)
        for pipe in self.pipes:
            os.close(pipe)


@contextlib.contextmanager
def _processes(lives, start):
    """One process for each of `lives`, which all end with the context."""
    processes = _Processes(len(lives))
    release, hold = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        for life in lives:
            pipe, report_to = os.pipe()
            processes.pipes.append(pipe)
            life = replace(life, report_to=report_to, release=release)
            processes.pids.append(start(life, hold))
            os.close(report_to)
        yield processes
    finally:
        os.close(hold)
        processes.end()
        os.close(release)


def _fork(life, hold):
    with warnings.catch_warnings():  # fork with threads around
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        # What was there before the fork is no garbage of this process: not to be
        # searched each time. (Nor is it found by gc.get_referrers: a test that needs
        # that calls gc.unfreeze.)
        gc.freeze()
        os.close(hold)
        _live(life)
    return pid


def _start(life, hold):
    path = os.path.join(life.folder, f"life{life.rank}")
    with open(path, "wb") as file:
        pickle.dump(life, file)
    env = {
        **os.environ,
        "PYTHONHASHSEED": str(life.rank + 1),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    code = f"import pickle, ranks; ranks._live(pickle.load(open({path!r}, 'rb')))"
    inherited = life.report_to, life.release
    for fd in inherited:
        os.set_inheritable(fd, True)
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], env)
    for fd in inherited:
        os.set_inheritable(fd, False)
    return pid


def _where_it_hung(folder, rank):
    try:
        with open(_stack_file(folder, rank)) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _verdict(reports, timeout, expect_failure):
    wanted = _RAISED if expect_failure else _RETURNED
    if all(report.word == wanted for report in reports):
        return [report.value for report in reports]
    lines = []
    for rank, report in enumerate(reports):
        if report.word == _RAISED:
            lines.append(f"rank {rank} raised\n{report.trace}")
        elif report.word == _RETURNED:
            lines.append(f"rank {rank} returned {report.value!r}")
        else:
            what = f"ran past {timeout} s" if report.value else "was stopped, or died"
            lines.append(f"rank {rank} {what}\n{report.value}")
    raise AssertionError("\n".join(lines))


# ------------------------------------------------------------- in a new process


def _live(life):
    """The life of one rank; never returns."""
    try:
        # Kept open: it is written to when the time is over.
        stacks = open(_stack_file(life.folder, life.rank), "w")
        faulthandler.dump_traceback_later(life.timeout, exit=True, file=stacks)
        _join(life)
        report = pickle.dumps(_Report(_RETURNED, life.fn(life.rank, *life.args)))
    except BaseException as error:  # SystemExit and pytest's outcomes too
        text = "\n".join(
            [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
        )
        report = pickle.dumps(_Report(_RAISED, text, traceback.format_exc()))
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(life.report_to, "wb") as pipe:
            pipe.write(report)
        # left early, this rank would break the others' connections
        os.read(life.release, 1)
    finally:
        os._exit(0)


def _stack_file(folder, rank):
    return os.path.join(folder, f"stack{rank}")


def _join(life):
    """Makes this process a rank among n."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(life.rank),
        LOCAL_RANK=str(life.rank),
        WORLD_SIZE=str(life.n),
        LOCAL_WORLD_SIZE=str(life.n),
    )
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if life.port is None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{life.folder}/store",
            rank=life.rank,
            world_size=life.n,
            timeout=timedelta(seconds=life.timeout),
        )
    else:
        os.environ.update(
            MASTER_ADDR="localhost",
            MASTER_PORT=str(life.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )
