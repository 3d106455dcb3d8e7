"""What a rank needs to load a sharded model: its peak memory above what it had before,
beside the size of its shards.

    python benchmarks/load_memory.py            # 400 MB of float32 weights over 4 ranks
    python benchmarks/load_memory.py --mb 2000 --ranks 2

A transformer is written by one rank group (each its own shards) and loaded by another,
from the meta device; then one is started there by `materialize`. Every rank is a
process of its own, as is every measurement: the peak is that of the process (ru_maxrss)
during the call, less its memory just before. Linux only.
"""

import argparse
import os
import resource
import socket
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from quintnet_dt import (
    apply_tensor_parallel,
    export_safetensors,
    load_safetensors,
    materialize,
)

MB = 1e6


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))

    def forward(self, x):
        h = self.norms[0](x)
        q, k, v = (
            f(h).unflatten(-1, (8, -1)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        x = x + self.o(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def build(mb, d=1024):
    """About so many MB of float32: blocks of 12 d^2, and an embedding."""
    with torch.device("meta"):
        blocks = max(1, round(mb * MB / 4 / (12 * d * d) - 1))
        return nn.Sequential(
            nn.Embedding(12 * d, d), *(Block(d) for _ in range(blocks))
        )


def now():
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(rank, job, port, args, folder, results):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(args.ranks),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build(args.mb)
    apply_tensor_parallel(
        model, args.ranks, example_inputs=(torch.zeros(1, 8, dtype=torch.long),)
    )
    if job == "export_safetensors":
        materialize(model)
    materialize(nn.Linear(2, 2, device="meta"))  # what a first call imports
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak so far is forgotten
    before = now()
    if job == "load_safetensors":
        load_safetensors(folder, model, progress=False)
    elif job == "export_safetensors":
        export_safetensors(
            folder, model, max_shard_size=args.mb * 10**6 // 3, progress=False
        )
    else:
        materialize(model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    whole = sum(p.numel() * 4 for p in model.parameters())
    shard = sum(p.to_local().numel() * 4 for p in model.parameters())
    largest = max(
        sum(p.numel() * 4 for p in m.parameters(recurse=False)) for m in model.modules()
    )
    results.put((rank, whole, shard, largest, peak))
    dist.barrier()
    dist.destroy_process_group()


def run(job, args, folder):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measure, (job, port, args, folder, results), args.ranks)
    found = sorted(results.get() for _ in range(args.ranks))
    whole, shard, largest, peak = (max(r[i] for r in found) / MB for i in range(1, 5))
    print(
        f"| {job} | {whole:.0f} | {args.ranks} | {shard:.1f} | {largest:.1f} |"
        f" {peak:.1f} | {peak / shard:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", type=int, default=400, help="size of the whole model")
    parser.add_argument("--ranks", type=int, default=4)
    args = parser.parse_args()
    print(
        "| call | whole, MB | ranks | shard, MB | largest module, MB | peak above"
        " before, MB | peak / shard |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for job in "export_safetensors", "load_safetensors", "materialize":
            run(job, args, folder)
