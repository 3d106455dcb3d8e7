"""The processes of the fuzzer: one that makes programs, and a set of ranks that
outlives the programs it judges."""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .judge import GOOD, HUNG, RAISED, WRONG, Verdict, judge, stable
from .programs import Program
from .writing import program_of, works

FORK = multiprocessing.get_context("fork")
TASKS = {"make": program_of, "works": works, "stable": stable}
GRACE = 5  # seconds that the other ranks have after one that was not GOOD
LIFE = 400  # programs that one set of ranks judges: what they leave in memory goes with them


class Worker:
    """A forked process that answers one request at a time."""

    def __init__(self, serve, *args):
        self.pipe, inner = FORK.Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process = FORK.Process(
                target=_serve, args=(serve, inner, *args), daemon=True
            )
            self.process.start()
        inner.close()

    def ask(self, *request):
        self.pipe.send(request)

    def answer(self):
        found = self.pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found

    def stop(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(serve, pipe, *args):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve(pipe, *args)
    except (EOFError, BrokenPipeError):
        pass
    os._exit(0)


def make_programs(pipe):
    while True:
        task, *args = pipe.recv()
        try:
            pipe.send(TASKS[task](*args))
        except Exception as error:
            pipe.send(error)


def _rank(pipe, rank, n, folder):
    faulthandler.register(
        signal.SIGUSR1, file=open(f"{folder}/stack{rank}", "w"), all_threads=True
    )
    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store, patience = f"file://{folder}/store", timedelta(seconds=300)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=n, timeout=patience
    )
    mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("tp",))
    while True:
        (program,) = pipe.recv()
        pipe.send(judge(program, mesh))


class Ranks:
    """n ranks that judge programs; started anew after one that left them apart, and now
    and then.

    Args:
        n: number of ranks.
        timeout: seconds that a program may take in which its ranks hardly compute.
    """

    def __init__(self, n, timeout=20):
        self.n, self.timeout, self.workers, self.judged, self.sent = (
            n,
            timeout,
            [],
            0,
            None,
        )

    def ask(self, program):
        if self.judged >= LIFE:
            self.stop()
        if not self.workers:
            self.folder, self.judged = tempfile.TemporaryDirectory(), 0
            self.workers = [
                Worker(_rank, rank, self.n, self.folder.name) for rank in range(self.n)
            ]
        self.judged += 1
        for worker in self.workers:
            worker.ask(program)

    def answer(self):
        """The Verdict of all ranks on what they were asked."""
        verdicts = self._collect()
        verdict = self._together(verdicts)
        if verdict.word in (HUNG, RAISED):
            self.stop()
        return verdict

    def judge(self, program):
        self.ask(program)
        return self.answer()

    def stop(self):
        for worker in self.workers:
            worker.stop()
        if self.workers:
            self.folder.cleanup()
        self.workers = []

    def _collect(self):
        """[Verdict of each rank], None where it gave none in time, "died" where its
        process ended."""
        found, at = [None] * self.n, {
            worker.pipe: rank for rank, worker in enumerate(self.workers)
        }
        patience, extended = self.timeout, 0
        while at:
            used, ready = self._seconds_computed(), wait(list(at), patience)
            for pipe in ready:
                rank = at.pop(pipe)
                try:
                    found[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    found[rank] = "died"
                if found[rank] == "died" or found[rank].word != GOOD:
                    patience = min(patience, GRACE)
            extended += not ready
            # on a slow machine, not in a collective
            busy = self._seconds_computed() - used > 0.1 * patience
            if not ready and (not busy or extended > 10):
                break
        return found

    def _seconds_computed(self):
        """Of all ranks, by the system's clock of processes."""
        ticks = 0
        for worker in self.workers:
            try:
                with open(f"/proc/{worker.process.pid}/stat") as file:
                    ticks += sum(
                        int(n) for n in file.read().rsplit(")", 1)[1].split()[11:13]
                    )
            except OSError:  # it ended, or this is no Linux
                continue
        return ticks / os.sysconf("SC_CLK_TCK")

    def _together(self, verdicts):
        if any(v is None or v == "died" for v in verdicts):
            lines = [
                f"rank {rank}: {self._last_seen(rank, v)}"
                for rank, v in enumerate(verdicts)
            ]
            return Verdict(HUNG, "\n".join(lines), placed=False)
        for word in WRONG, RAISED:
            if bad := [v for v in verdicts if v.word == word]:
                if word == RAISED and len(bad) < len(verdicts):
                    return Verdict(HUNG, f"only some ranks raised: {bad[0].text}")
                return bad[0]
        if len({tuple(v.digests) for v in verdicts}) > 1:
            return Verdict(
                WRONG, "gradients of replicated parameters differ between ranks"
            )
        return verdicts[0]

    def _last_seen(self, rank, verdict):
        if isinstance(verdict, Verdict):
            return f"{verdict.word} {verdict.text}"
        if verdict == "died":
            return "its process ended"
        os.kill(self.workers[rank].process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        with open(f"{self.folder.name}/stack{rank}") as file:
            return "waits in\n" + "\n".join(file.read().splitlines()[-45:])


@dataclass
class Outcome:
    program: Program
    verdict: Verdict


def run(seeds, n, timeout=20, only=(), without=()):
    """Yields the Outcome of each seed's program over n ranks. Programs are made while
    ranks judge the one before."""
    maker, ranks = Worker(make_programs), Ranks(n, timeout)
    try:
        waiting = iter(seeds)
        seed = next(waiting, None)
        if seed is not None:
            maker.ask("make", seed, only, without)
        while seed is not None:
            program = maker.answer()
            ranks.ask(program)
            seed = next(waiting, None)
            if seed is not None:
                maker.ask("make", seed, only, without)
            yield Outcome(program, ranks.answer())
    finally:
        maker.stop()
        ranks.stop()
