"""Runs a function on n real processes: the helper of every multi-process test.

    from ranks import run_ranks

    def test_sum():
        def ranks(rank):
            x = torch.tensor(float(rank))
            dist.all_reduce(x)
            return x.item()

        assert run_ranks(ranks, 2) == [1.0, 1.0]

The processes are forked, so the function may be a closure and torch is not imported
again (0.3 s a call). The calling process must not have initialised a default process
group itself, nor run a backward: torch for CUDA then refuses one in a fork of it.
Tests that need one take `own_process`.

Forks share one hash seed, which processes that torchrun starts do not: ``fresh=True``
starts new ones, each with a seed of its own (2 s a call).
"""

import faulthandler
import functools
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
from datetime import timedelta

import torch
import torch.distributed as dist

_GRACE = 1.0  # seconds the other ranks have to report after one has failed


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
        fresh: each process is a new one, with another PYTHONHASHSEED; ``fn`` must then be
            a function of a module, and ``args`` be picklable.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or ran out of time
            (with the place where it hung); or did not raise where it should.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "run_ranks forks, and this process has a default process group; call"
            " dist.destroy_process_group() first"
        )
    start = _start if fresh else _fork
    reports, pids = [None] * n, []
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        store = None
        if not init:
            listener.bind(("localhost", 0))
            listener.listen()
        release_r, release_w = os.pipe()  # closed by the parent: children may leave
        pipes = []
        try:
            sys.stdout.flush(), sys.stderr.flush()
            for rank in range(n):
                r, w = os.pipe()
                port = None if init else listener.getsockname()[1]
                pids.append(
                    start((fn, rank, n, args, timeout, folder, port, w, release_r), release_w)
                )
                os.close(w)
                pipes.append(r)
            if not init:  # the store's server, as torchrun's agent holds it
                store = dist.TCPStore(
                    "localhost",
                    listener.getsockname()[1],
                    is_master=True,
                    wait_for_workers=False,
                    master_listen_fd=os.dup(listener.fileno()),
                )
            _collect(pipes, reports, timeout, patient=expect_failure)
        finally:
            os.close(release_w)
            if any(report is None or report[0] == "raised" for report in reports):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            for pid in pids:
                os.waitpid(pid, 0)
            for fd in (*pipes, release_r):
                os.close(fd)
            del store
        for rank, report in enumerate(reports):
            if report is None:
                reports[rank] = ("lost", _where(folder, rank))
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
    """A test that runs a backward itself, on a process of its own."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        alone(functools.partial(test, *args, **kwargs))

    return wrapped


def _fork(life, release_w):
    with warnings.catch_warnings():  # fork with threads around
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        os.close(release_w)
        _child(*life)
    return pid


def _start(life, release_w):
    rank, *_, folder, _, out, release_r = life[1:]
    path = os.path.join(folder, f"life{rank}")
    with open(path, "wb") as file:
        pickle.dump(life, file)
    env = {
        **os.environ,
        "PYTHONHASHSEED": str(rank + 1),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    code = f"import pickle, ranks; ranks._child(*pickle.load(open({path!r}, 'rb')))"
    for fd in out, release_r:
        os.set_inheritable(fd, True)
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], env)
    for fd in out, release_r:
        os.set_inheritable(fd, False)
    return pid


def _child(fn, rank, n, args, timeout, folder, port, out, release):
    """The life of one rank; never returns."""
    try:
        stacks = open(os.path.join(folder, f"stack{rank}"), "w")
        faulthandler.dump_traceback_later(timeout, exit=True, file=stacks)
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(n),
            LOCAL_WORLD_SIZE=str(n),
        )
        if os.path.exists("/sys/class/net/lo"):
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        if port is None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=n,
                timeout=timedelta(seconds=timeout),
            )
        else:
            os.environ.update(
                MASTER_ADDR="localhost",
                MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RESTART_COUNT="0",
            )
        message = pickle.dumps(("returned", fn(rank, *args)))
    except BaseException as error:  # SystemExit and pytest's outcomes too
        text = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
        message = pickle.dumps(("raised", text, traceback.format_exc()))
    try:
        sys.stdout.flush(), sys.stderr.flush()
        with os.fdopen(out, "wb") as pipe:
            pipe.write(message)
        os.read(release, 1)  # left early, this rank would break the others' connections
    finally:
        os._exit(0)


def _collect(pipes, reports, timeout, patient):
    """Fills in the reports as they come, till all have or one failed."""
    # A rank that runs out of time writes where it hangs and exits by itself.
    deadline = time.monotonic() + timeout + 5
    with selectors.DefaultSelector() as selector:
        for rank, fd in enumerate(pipes):
            selector.register(fd, selectors.EVENT_READ, (rank, bytearray()))
        while selector.get_map():
            events = selector.select(max(0, deadline - time.monotonic()))
            if not events:
                return
            for key, _ in events:
                rank, received = key.data
                block = os.read(key.fd, 1 << 20)
                received += block
                if block:
                    continue
                selector.unregister(key.fd)
                if received:
                    reports[rank] = pickle.loads(received)
                failed = reports[rank] is None or reports[rank][0] == "raised"
                if failed and not patient:
                    deadline = min(deadline, time.monotonic() + _GRACE)


def _where(folder, rank):
    try:
        with open(os.path.join(folder, f"stack{rank}")) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _verdict(reports, timeout, expect_failure):
    wanted = "raised" if expect_failure else "returned"
    if all(report[0] == wanted for report in reports):
        return [report[1] for report in reports]
    lines = []
    for rank, report in enumerate(reports):
        if report[0] == "raised":
            lines.append(f"rank {rank} raised\n{report[2]}")
        elif report[0] == "returned":
            lines.append(f"rank {rank} returned {report[1]!r}")
        else:
            what = f"ran past {timeout} s" if report[1] else "was stopped, or died"
            lines.append(f"rank {rank} {what}\n{report[1]}")
    raise AssertionError("\n".join(lines))
