"""One program on one rank: the split model beside the whole one, call by call."""

import hashlib
import re
import traceback
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor, Shard

from quintnet_dt import apply_tensor_parallel

from .programs import Runner, build, inputs_of

TOLERANCE = 1e-7

GOOD, WRONG, RAISED, HUNG = "GOOD", "WRONG", "RAISED", "HUNG"


@dataclass
class Verdict:
    """What came of a program: one of the words above, and what is to be said of it.

    digests: of the gradients of replicated parameters, after each call; they are to be
    the same on all ranks.
    placed: whether an error's message names a module, a parameter or a line of the
    program.
    """

    word: str
    text: str = ""
    digests: list = field(default_factory=list)
    placed: bool = True


def judge(program, mesh):
    """The Verdict of one rank; all ranks are to call it with the same program."""
    whole, split = (Runner(program, build(program)) for _ in range(2))
    if program.optimizer == "before":
        whole.make_optimizer(), split.make_optimizer()
    digests, stage = [], "apply_tensor_parallel"
    try:
        options = {"contiguous": True} if program.contiguous else {}
        if program.plan:
            options["plan"] = {name: Shard(dim) for name, dim in program.plan.items()}
        example = tuple(inputs_of(program, program.calls[0]))
        apply_tensor_parallel(split.model, mesh=mesh, example_inputs=example, **options)
        if program.optimizer == "after":
            whole.make_optimizer(), split.make_optimizer()
        for i, call in enumerate(program.calls):
            stage = f"call {i}"
            expected, found = whole.call(call), split.call(call)
            if faults := list(differences(expected, found)):
                how = {
                    n: e.how
                    for n, e in split.model.tensor_parallel_plan.entries.items()
                    if e.how != "replicated"
                }
                return Verdict(
                    WRONG, f"call {i}: {'; '.join(faults[:6])}; {how}", digests
                )
            digests.append(_digest(split.model))
    except Exception as error:
        text = "\n".join(
            [
                f"{stage}: {type(error).__name__}: {error}",
                *getattr(error, "__notes__", []),
            ]
        )
        inside = "".join(traceback.format_exception(error)[-3:])
        return Verdict(
            RAISED, f"{text}\n{inside}", digests, _names_a_place(program, text)
        )
    return Verdict(GOOD, digests=digests)


def differences(expected, found):
    """What is not the same in two results of Runner.call."""
    if expected.keys() == found.keys() and list(expected) != list(found):
        yield "parameters, outputs or buffers come in another order"
    if expected.keys() != found.keys():
        missing = [*(expected.keys() - found.keys()), *(found.keys() - expected.keys())]
        yield f"only one has {sorted(missing)[:3]}"
        return
    largest = max(
        (_size(x) for what, x in expected.items() if "gradient" in what), default=0.0
    )
    for what, a in expected.items():
        b = found[what]
        if isinstance(b, DTensor):
            yield f"{what} is a DTensor"
        elif torch.is_tensor(a) and torch.is_tensor(b) and a.shape != b.shape:
            yield f"{what} has shape {tuple(b.shape)} and not {tuple(a.shape)}"
        elif torch.is_tensor(a) or torch.is_tensor(b):
            a, b = (
                torch.zeros_like(y) if x is None else x for x, y in ((a, b), (b, a))
            )
            scale = max(_size(a), 1e-4 * largest if "gradient" in what else 1e-3)
            # gradients that cancel out are but rounding
            error = _size(a.double() - b.double()) / max(scale, 1e-9)
            if not error <= TOLERANCE:
                yield f"{what} is off by {error:.0e}"
        elif a != b:
            yield f"{what} is {b} and not {a}"


def _size(x):
    return float(x.double().abs().max()) if torch.is_tensor(x) and x.numel() else 0.0


def stable(program):
    """Whether the whole model gives the same results when its parameters are changed by
    rounding."""
    one, other = (Runner(program, build(program)) for _ in range(2))
    with torch.no_grad():
        for p in other.model.parameters():
            p.mul_(
                1
                + 1e-13
                * torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype
                )
            )
    for runner in one, other:
        runner.make_optimizer()
    for call in program.calls:
        a, b = one.call(call), other.call(call)
        a, b = (
            {k: x for k, x in seen.items() if not k.startswith("parameter ")}
            for seen in (a, b)
        )
        if any("off by" in d or "shape" in d for d in differences(a, b)):
            return False
    return True


def _digest(model):
    held = hashlib.sha256()
    for p in model.parameters():
        g = p.grad
        if isinstance(g, DTensor) and g.placements[0].is_replicate():
            held.update(g.to_local().detach().double().numpy().tobytes())
    return held.hexdigest()


def _names_a_place(program, text):
    """Whether an error says where: a line of the program, a module's path or class, or
    a parameter."""
    if program.file in text:
        return True
    model = build(program)
    names = [n for n, _ in model.named_modules() if n] + [
        n for n, _ in model.named_parameters()
    ]
    names += [type(m).__name__ for m in model.modules()] + ["the model"]
    return any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text) for name in names)
