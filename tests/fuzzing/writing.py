"""Whole programs from a seed: their inputs, statements and calls; those on which the
whole model runs."""

import random

import torch

from .programs import Call, Input, Program, Runner, build
from .scope import KINDS, SIZES, Scope, fill


def _sizes(rng):
    b, t = rng.choice([2, 3, 4]), rng.choice([4, 5, 6, 7])
    longer = rng.choice([n for n in (3, 5, 6, 8, 9) if n != t])
    return [
        {"B": b, "T": t},
        {"B": rng.choice([n for n in (1, 2, 3, 5) if n != b]), "T": t},
        {"B": b, "T": longer},
    ]


def _inputs(rng):
    d = rng.choice(SIZES)
    x = Input(
        "x", ("B", "T", d) if rng.random() < 0.85 else ("B", d), grad=rng.random() < 0.8
    )
    if rng.random() < 0.2:
        x = Input("ids", ("B", "T"), below=rng.choice([16, 18, 20, 24, 30]))
    more = []
    if rng.random() < 0.2:
        more.append(Input("y", ("B", "T", rng.choice([d, *SIZES]))))
    if rng.random() < 0.15 and x.name == "x":
        more.append(Input("target", ("B", "T"), below=rng.choice([5, 6, 9, 12])))
    return [x, *more]


WAYS = {
    "backward": 3,
    "no_grad": 1,
    "inference": 1,
    "checkpoint": 1.5,
    "second": 1,
    "refill": 1,
    "eval": 1,
    "later": 3,
    "step": 1,
}


def _calls(rng, scope, ways):
    """The traced call again, then others."""
    calls = [Call(seed=1), Call(seed=2)] if rng.random() < 0.4 else [Call(seed=1)]
    ways = {
        way: weight for way, weight in ways.items() if way != "later" or scope.later
    }
    for i in range(3, 3 + rng.choice([0, 1, 1, 1, 2])):
        if not ways:
            break
        how, size = rng.choices(list(ways), list(ways.values()))[0], rng.choice(
            [0, 0, 1, 2]
        )
        if how == "refill":
            detail = rng.choice(["inference", "data", "numpy", "copy_"])
            calls += [Call(how, size, seed=10 * i + j, detail=detail) for j in range(3)]
        elif how == "eval":
            calls.append(
                Call(
                    rng.choice(["backward", "no_grad"]), size, seed=i, before="m.eval()"
                )
            )
            drops = [line for line in scope.later if line.endswith(".train()")]
            if drops and rng.random() < 0.5:
                calls.append(Call("no_grad", size, seed=i, before=rng.choice(drops)))
            else:
                calls.append(Call("backward", size, seed=i + 100, before="m.train()"))
        elif how == "later":
            calls.append(Call("backward", size, seed=i, before=rng.choice(scope.later)))
        else:
            calls.append(Call(how, size, seed=i))
    return calls


FIRST = [
    "list(m.parameters())[{i}].register_hook(lambda g: g * 0.5)",
    (
        "list(m.parameters())[{i}].register_post_accumulate_grad_hook(lambda p:"
        " p.grad.mul_(0.5))"
    ),
    "list(m.parameters())[{i}].requires_grad_(False)",
    (
        "list(m.modules())[{j}].register_forward_hook(lambda s, i, o: (o * 2) if"
        " torch.is_tensor(o) else None)"
    ),
    (
        "m.apply(lambda s: [p.requires_grad_(p.dim() > 1) for p in"
        " s.parameters(recurse=False)])"
    ),
]


def chosen(only, without):
    """({kind of statement: weight}, {way of a call: weight}) but those that a user does
    not want."""
    kinds = {k: w for k, w in KINDS.items() if k.__name__ not in without}
    ways = {k: w for k, w in WAYS.items() if k not in without}
    some_kinds = {k: w for k, w in kinds.items() if k.__name__ in only}
    some_ways = {k: w for k, w in ways.items() if k in only}
    return some_kinds or kinds, some_ways if only else ways


def write(seed, attempt=0, only=(), without=()):
    """A program of a seed, unchecked; None where nothing could be written."""
    kinds, ways = chosen(only, without)
    rng = random.Random(f"{seed}/{attempt}")
    torch.manual_seed(rng.randrange(1 << 30))
    sizes, inputs = _sizes(rng), _inputs(rng)
    given = {
        i.name: [i.make(size, torch.Generator().manual_seed(1)) for size in sizes]
        for i in inputs
    }
    for i in inputs:
        if i.grad and not i.below:
            given[i.name] = [x.requires_grad_() for x in given[i.name]]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        scope = Scope(
            rng, "Net", "", sizes, ["[p.data.mul_(0.9) for p in m.parameters()]"], given
        )
        fill(scope, rng.choice([1, 1, 2, 2, 2, 3, 3, 4, 6]), kinds)
        if not list(scope.holder.parameters()):
            return None
        scope.close(_returned(scope))
    finally:
        torch.set_default_dtype(default)
    program = Program(
        seed,
        scope.source(),
        inputs,
        sizes,
        [],
        contiguous=rng.random() < 0.2,
        kinds=_kinds(scope),
    )
    if rng.random() < 0.12 and "backward" in ways:
        counts = {
            "i": len(list(scope.holder.parameters())),
            "j": len(list(scope.holder.modules())),
        }
        program.first = rng.choice(FIRST).format(
            **{k: rng.randrange(n) for k, n in counts.items()}
        )
    program.calls = _calls(rng, scope, ways)
    if any(c.how == "step" for c in program.calls):
        program.optimizer = rng.choice(["before", "after"])
    if rng.random() < (0.5 if any(c.how == "refill" for c in program.calls) else 0.15):
        fit = [
            (n, d)
            for n, p in build(program).named_parameters()
            for d, k in enumerate(p.shape)
            if k > 4
        ]
        program.plan = dict([rng.choice(fit)]) if fit else {}
    return program


def _kinds(scope):
    return [k for c in scope.classes for k in _kinds(c)] + scope.kinds


def _returned(scope):
    """What a forward returns: the last variable, and most of those that nothing
    reads."""
    text, made = "\n".join(scope.body), [v for v in scope.vars if v not in scope.given]
    if not made:
        return scope.vars[-1]
    unread = [v for v in made[:-1] if text.count(v) == 1 and scope.coin(0.7)]
    returned = [*unread[-3:], made[-1]]
    if len(returned) == 1 and scope.coin(0.8):
        return returned[0]
    if scope.coin(0.3):
        return "{" + ", ".join(f'"{v}": {v}' for v in returned) + "}"
    return ", ".join(returned) + ("," if len(returned) == 1 else "")


def fitting(program):
    """The calls of a program, in their order, that the whole model makes with finite
    results; none where it cannot be built. Not on a process that forks later: it runs
    backwards."""
    try:
        runner, calls = Runner(program, build(program)), []
        runner.make_optimizer()
    except Exception:  # whatever is wrong with it
        return []
    for call in program.calls:
        try:
            if all(_sound(x) for x in runner.call(call).values()):
                calls.append(call)
        except Exception:
            continue
    return calls


def works(program):
    return len(fitting(program)) == len(program.calls)


def _sound(x):
    return (
        not torch.is_tensor(x)
        or not x.is_floating_point()
        or bool(x.isfinite().all() and (x.abs() < 1e6).all())
    )


def program_of(seed, only=(), without=()):
    """The program of a seed, on which the whole model runs."""
    for attempt in range(50):
        program = write(seed, attempt, only, without)
        for _ in range(3 if program else 0):
            fit = fitting(program)
            if fit and fit == program.calls:
                return program
            if fit[:1] != program.calls[:1]:
                break
            program.calls = fit
    raise RuntimeError(f"seed {seed}: none of 50 programs runs on the whole model")
