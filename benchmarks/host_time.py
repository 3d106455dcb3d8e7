"""Host time of a step: what Python and dispatch cost beside kernels and communication.

One process is rank 0 of `--ranks`; the `fake` process group communicates nothing. A
small Llama: whole, split by hand (plain local tensors, one collective each where
Megatron-LM has them), and split by quintnet_dt. CPU time of this process, the best of
`--rounds`, models in turn.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  registers the backend
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quintnet_dt import apply_tensor_parallel

HIDDEN, VOCABULARY, TOKENS = 128, 512, 64


class EchoStore(dist.Store):
    """A store in which every rank has told what this one tells."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.told[key.rpartition("/")[0]] = value

    def get(self, key: str) -> str:
        return self.told[key.rpartition("/")[0]]

    def wait(self, keys: list[str], timeout: object = None) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        return True

    def deleteKey(self, key: str) -> bool:
        return True

    def clone(self) -> dist.Store:
        return self


# ------------------------------------------------------- what one writes by hand


class CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class GatherOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx, grad):
        parts = grad.chunk(dist.get_world_size(), -1)
        return parts[dist.get_rank()].contiguous()


def copy_in_states(module, args, kwargs):
    states = CopyIn.apply(kwargs["hidden_states"])
    return args, {**kwargs, "hidden_states": states}


def cut(linear: nn.Linear, dim: int) -> None:
    parts = linear.weight.detach().chunk(dist.get_world_size(), dim)
    linear.weight = nn.Parameter(parts[dist.get_rank()].clone())


def by_hand(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inner = [attention.q_proj, attention.k_proj, attention.v_proj]
        for linear in (*inner, mlp.gate_proj, mlp.up_proj):
            cut(linear, 0)
        for linear in (attention.o_proj, mlp.down_proj):
            cut(linear, 1)
            linear.register_forward_hook(lambda m, args, out: SumOut.apply(out))
        mlp.register_forward_pre_hook(lambda m, args: (CopyIn.apply(args[0]),))
        attention.register_forward_pre_hook(copy_in_states, with_kwargs=True)
    cut(model.lm_head, 0)
    model.lm_head.register_forward_pre_hook(lambda m, args: (CopyIn.apply(args[0]),))
    model.lm_head.register_forward_hook(lambda m, args, out: GatherOut.apply(out))
    return model


def by_library(model: nn.Module) -> nn.Module:
    return apply_tensor_parallel(model, tp_size=dist.get_world_size())


# ------------------------------------------------------------------ what is timed


def llama(layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def given(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (1, length), generator=generator)


def train(model: nn.Module, steps: int) -> None:
    """Steps of training on one line of text."""
    ids = given(TOKENS)
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def infer(model: nn.Module, steps: int) -> None:
    """Forwards without gradients."""
    ids = given(TOKENS)
    with torch.no_grad():
        for _ in range(steps):
            model(input_ids=ids, use_cache=False)


def decode(model: nn.Module, steps: int) -> None:
    """Tokens one by one, with a key-value cache."""
    ids = given(1)
    cache = None
    with torch.no_grad():
        for _ in range(steps):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values


def timed(work: Callable, model: nn.Module, steps: int) -> float:
    """CPU milliseconds a step."""
    start = time.process_time()
    work(model, steps)
    return (time.process_time() - start) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--work", nargs="+", default=["train", "infer", "decode"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    # that all ranks' shards are the same: there is one rank
    warnings.filterwarnings("ignore", ".*every rank's shard begins")
    store = EchoStore()
    dist.init_process_group("fake", rank=0, world_size=asked.ranks, store=store)
    print("| layers | step | whole, ms | by hand, ms | ours, ms | ours / by hand |")
    print("|---|---|---|---|---|---|")
    for layers in asked.layers:
        models = {
            "whole": llama(layers),
            "by hand": by_hand(llama(layers)),
            "ours": by_library(llama(layers)),
        }
        for name in asked.work:
            work = globals()[name]
            times = {kind: [] for kind in models}
            for _ in range(asked.rounds + 1):
                for kind, model in models.items():
                    steps = TOKENS if work is decode else max(1, 24 // layers)
                    times[kind].append(timed(work, model, steps))
            best = {kind: min(values[1:]) for kind, values in times.items()}
            ratio = best["ours"] / best["by hand"]
            cells = [f"{ms:.2f}" for ms in best.values()]
            print(f"| {layers} | {name} | {' | '.join(cells)} | {ratio:.2f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
