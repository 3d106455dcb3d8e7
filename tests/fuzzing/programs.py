"""What the fuzzer runs: a module as source code, its inputs, and a list of calls; one
call of it, whole or split.

A Program is text and numbers only, so that one that fails can be printed, pasted,
shrunk and sent between processes.
"""

import linecache
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from quintnet_dt.utils import leaves

NAMES = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "functional_call": torch.func.functional_call,
}


@dataclass
class Input:
    """A tensor that is given to a forward: dims are numbers, or "B" and "T", which
    calls change."""

    name: str
    shape: tuple
    below: int = 0  # integers from 0 to below; else float64 from a normal distribution
    grad: bool = True

    def make(self, size, generator):
        shape = [size.get(d, d) for d in self.shape]
        if self.below:
            return torch.randint(0, self.below, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass
class Call:
    """One call of the model, and what is done around it.

    how: "backward"; "no_grad"; "inference"; "checkpoint" (not reentrant); "second" (the
    backward of a penalty on the gradients' norm); "step" (backward, then the
    optimizer); "refill" (without gradients, inputs are the tensors of the refill
    before, written anew in the way that `detail` says).
    """

    how: str = "backward"
    size: int = 0  # of Program.sizes
    seed: int = 1
    before: str = ""  # a statement that changes the module `m`
    detail: str = ""


@dataclass
class Program:
    """Source code of modules, of which `Net` is the outermost, and what is done with
    it."""

    seed: int
    source: str
    inputs: list
    sizes: list  # of {"B": number, "T": number}: the traced one, then others
    calls: list
    contiguous: bool = False
    plan: dict = field(default_factory=dict)  # {parameter: the dim it must be split on}
    first: str = ""  # a statement that changes the module `m` before it is split
    optimizer: str = ""  # "before" or "after": when it is made
    kinds: list = field(default_factory=list)  # of statements: for statistics

    @property
    def file(self):
        return f"program{self.seed}.py"

    def __str__(self):
        options = {
            "contiguous": self.contiguous,
            "plan": self.plan,
            "optimizer made": self.optimizer,
        }
        options["before the split"] = self.first
        used = ", ".join(f"{k}: {v}" for k, v in options.items() if v)
        about = [
            f"# inputs: {', '.join(f'{i.name} {i.shape}' for i in self.inputs)}; sizes:"
            f" {self.sizes}"
        ]
        about += [f"# {used}"] if used else []
        about += [f"# call {i}: {c}" for i, c in enumerate(self.calls)]
        return "\n".join([self.source.rstrip(), *about])


def build(program):
    """The module, in train mode, from a fixed seed. Tensors are float64."""
    linecache.cache[program.file] = (
        len(program.source),
        None,
        program.source.splitlines(True),
        program.file,
    )
    names = {**NAMES, "SEEN": [], "__name__": f"program{program.seed}"}
    kept = torch.get_default_dtype()
    torch.manual_seed(program.seed)
    torch.set_default_dtype(torch.float64)
    try:
        exec(compile(program.source, program.file, "exec"), names)
        model = names["Net"]()
        exec(program.first, {**NAMES, "m": model})
        return model
    finally:
        torch.set_default_dtype(kept)


def inputs_of(program, call):
    generator = torch.Generator().manual_seed(1000 * program.seed + call.seed)
    return [i.make(program.sizes[call.size], generator) for i in program.inputs]


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def loss_of(output):
    """A scalar in which each element of each floating output has a weight of its
    own."""
    generator, total = torch.Generator().manual_seed(2), 0.0
    for _, x in leaves(output):
        if torch.is_tensor(x) and x.is_floating_point():
            total = (
                total
                + (
                    x * torch.randn(x.shape, generator=generator, dtype=torch.float64)
                ).sum()
            )
    return total


class Runner:
    """Makes the calls of a program on one model, whole or split; keeps what lives from
    call to call."""

    def __init__(self, program, model):
        self.program, self.model, self.optimizer, self.static = (
            program,
            model,
            None,
            None,
        )

    def make_optimizer(self):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def call(self, call):
        """{what: tensor or other value} that a call made: all of it is to be alike for
        whole and split."""
        if call.before:
            exec(call.before, {**NAMES, "m": self.model})
        self.model.zero_grad()
        kept = type(self.model).forward.__globals__["SEEN"]
        kept.clear()
        given, seen = inputs_of(self.program, call), {}
        if call.how in ("no_grad", "inference", "refill"):
            output = self._without_gradients(call, given)
        else:
            given = [
                x.requires_grad_() if i.grad and not i.below else x
                for i, x in zip(self.program.inputs, given)
            ]
            output = self._forward(call, given)
            self._backward(call, output, given, seen)
        seen.update({f"output {path}": x for path, x in leaves(output)})
        seen.update({f"buffer {name}": x for name, x in self.model.named_buffers()})
        # what came before may be of a trace
        seen.update({"kept in the file": x for x in kept[-1:]})
        for name, m in self.model.named_modules():
            seen.update(
                {
                    f"kept {name}{path}": x
                    for path, x in leaves(getattr(m, "kept", None))
                }
            )
        return {
            what: x.detach().clone() if torch.is_tensor(x) else x
            for what, x in seen.items()
        }

    def _forward(self, call, given):
        torch.manual_seed(call.seed)
        if call.how == "checkpoint":
            return checkpoint(self.model, *given, use_reentrant=False)
        return self.model(*given)

    def _without_gradients(self, call, given):
        if call.how == "no_grad":
            with torch.no_grad():
                return self._forward(call, given)
        inference = call.how == "inference" or call.detail == "inference"
        with torch.inference_mode() if inference else torch.no_grad():
            if call.how == "inference":
                return self._forward(call, given)
            if self.static is None or [x.shape for x in self.static] != [
                x.shape for x in given
            ]:
                self.static = [x.clone() for x in given]
            for old, new in zip(self.static, given):
                refill(old, new, call.detail)
            return self._forward(call, self.static)

    def _backward(self, call, output, given, seen):
        loss, params = loss_of(output), dict(self.model.named_parameters())
        if call.how == "second":
            wanted = {name: p for name, p in params.items() if p.requires_grad}
            wanted.update(
                {f"input {i}": x for i, x in enumerate(given) if x.requires_grad}
            )
            grads = torch.autograd.grad(
                loss, list(wanted.values()), create_graph=True, allow_unused=True
            )
            seen.update(
                {
                    f"first gradient {n}": zeros_as_none(full(g))
                    for n, g in zip(wanted, grads)
                }
            )
            loss = (
                sum(
                    full(g.pow(2).sum())
                    for g in grads
                    if g is not None and g.requires_grad
                )
                + 0.1 * loss
            )
        loss.backward()
        for name, p in params.items():
            seen[f"gradient {name}"] = zeros_as_none(full(p.grad))
        seen.update(
            {
                f"gradient of input {i}": zeros_as_none(x.grad)
                for i, x in enumerate(given)
            }
        )
        if call.how == "step":
            self.optimizer.step()
            seen.update(
                {f"parameter {name}": full(p.detach()) for name, p in params.items()}
            )


def zeros_as_none(grad):
    """A weight that a call did not reach may get zeros."""
    return None if grad is None or not grad.any() else grad


def refill(old, new, how):
    """Writes new values into a tensor that the model saw before, in a way that may
    leave its version as it was."""
    if how == "numpy":
        old.numpy()[...] = new.numpy()
    else:
        (old.data if how == "data" else old).copy_(new)
