"""A function on gloo processes of its own, where no launcher started any."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

_CALL, _RESULT = "call", "result"
_LOOPBACK = "/sys/class/net/lo"


def on_processes(function: Callable, n: int, arguments: dict[str, Any]) -> Any:
    """What `function(**arguments)` returns on the first of n new processes, which are
    the ranks of a default process group (gloo, over a file in a temporary folder).

    Raises: TypeError for arguments that cannot be pickled. RuntimeError where a process
    raised, with what each that did wrote, or died; the others are ended.
    """
    call = pickle.dumps((function, {k: _pickled(k, x) for k, x in arguments.items()}))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / _CALL).write_bytes(call)
        try:
            torch.multiprocessing.spawn(_live, (n, name), nprocs=n)
        except Exception as e:
            raise RuntimeError(_what_failed(folder, n)) from e
        return pickle.loads((folder / _RESULT).read_bytes())


def _pickled(name: str, x: Any) -> bytes:
    try:
        return pickle.dumps(x)
    except Exception as e:  # what __reduce__ raises may be anything
        raise TypeError(
            f"{name}: expected what can be sent to another process, found"
            f" {type(x).__name__}, which cannot be pickled ({e}): give a function of a"
            " module that makes it (a factory, for a model), or start the processes"
            " yourself, with torchrun"
        ) from e


def _what_failed(folder: Path, n: int) -> str:
    """What the ranks that failed wrote, that which failed first before the others."""
    written = sorted(folder.glob("error*"), key=lambda file: file.stat().st_mtime_ns)
    texts = [f"rank {file.name[5:]} raised\n{file.read_text()}" for file in written]
    nothing = (
        f"one of {n} processes died before it could tell why; see what it wrote above."
        " A script that starts processes needs `if __name__ == '__main__':` around"
        " what it does"
    )
    return "\n".join(texts) or nothing


def _live(rank: int, n: int, folder: str) -> None:
    """The life of one process."""
    try:
        _join(rank, n, folder)
        function, arguments = pickle.loads(Path(folder, _CALL).read_bytes())
        result = function(**{k: pickle.loads(x) for k, x in arguments.items()})
        if rank == 0:
            Path(folder, _RESULT).write_bytes(pickle.dumps(result))
        dist.barrier()
    except BaseException:
        # the error of the first to fail is told before others lose their connections
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()


def _join(rank: int, n: int, folder: str) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    if os.path.exists(_LOOPBACK):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n
    )
