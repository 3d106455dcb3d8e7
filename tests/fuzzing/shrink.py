"""Makes a program that fails as short as it goes: what fails in the same way with less
is taken instead."""

import ast
import re
import sys
import time
from dataclasses import replace

import torch

from .judge import RAISED
from .pool import TASKS, Ranks, Worker, make_programs
from .programs import Call, Input, build, inputs_of
from .scope import dim_of


def shrink(program, verdict, tp, timeout=20, seconds=150):
    """(the shortest program found, its Verdict). Where the program alone does not fail,
    it says so.

    Args:
        verdict: that of the program.
        tp: number of ranks.
        timeout: seconds a program.
        seconds: after which it takes what it has."""
    maker, ranks, deadline = (
        Worker(make_programs),
        Ranks(tp, timeout),
        time.monotonic() + seconds,
    )

    def ask(*request):
        maker.ask(*request)
        return maker.answer()

    def fails(candidate):
        if not ask("works", candidate):
            return None
        found = ranks.judge(candidate)
        return found if alike(found, verdict) else None

    try:
        verdict = fails(program) or replace(
            verdict, text=f"(not when it is run alone) {verdict.text}"
        )
        if verdict.text.startswith("(not"):
            return program, verdict
        if verdict.word == "WRONG" and not ask("stable", program):
            return program, replace(
                verdict, text=f"(as the whole model, by rounding) {verdict.text}"
            )
        progress = True
        while progress and time.monotonic() < deadline:
            progress = False
            for candidate in candidates(program, ask("shapes", program)):
                if time.monotonic() > deadline:
                    break
                if found := fails(candidate):
                    program, verdict, progress = candidate, found, True
                    break
        return program, verdict
    finally:
        maker.stop()
        ranks.stop()


def alike(a, b):
    return a.word == b.word and (a.word != RAISED or grouped(a.text) == grouped(b.text))


def grouped(text):
    """An error's first line without what differs from program to program."""
    line = re.sub(r"^(apply_tensor_parallel|call \d+): ", "", text.split("\n")[0])
    line = re.sub(r"\b(s\.)?[a-zA-Z_]*\d+(\.\w+)*", "#", line)
    return re.sub(r"[\[(][^\])]*[\])]|\d+", "#", line)[:160]


# ---- smaller programs: the most that can be saved first


def candidates(program, shapes):
    yield from fewer_calls(program)
    tree = ast.parse(program.source)
    nodes = list(ast.walk(tree))
    edits = [
        *_returns(nodes),
        *_cuts(nodes, program, shapes),
        *_statements(nodes),
        *_expressions(nodes),
    ]
    seen = {tidy(tree)}
    for i, edit, inputs in edits:
        tree = ast.parse(program.source)
        edit(list(ast.walk(tree))[i])
        text = tidy(tree)
        if text not in seen and _parses(text):
            seen.add(text)
            yield _with_arguments(
                replace(program, source=text, inputs=[*program.inputs, *inputs])
            )
    read = {
        n.id
        for n in _body(_forwards(nodes)[-1])
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    for name in [i.name for i in program.inputs]:
        if len(program.inputs) > 1 and name not in read:
            yield _with_arguments(
                replace(program, inputs=[i for i in program.inputs if i.name != name])
            )


def _parses(text):
    """Python 3.11 writes a starred expression in a loop's `in` that it cannot read."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def fewer_calls(program):
    for i in range(len(program.calls)):
        if len(program.calls) > 1:
            yield replace(program, calls=program.calls[:i] + program.calls[i + 1 :])
    for field, empty in (
        ("contiguous", False),
        ("plan", {}),
        ("first", ""),
        ("optimizer", ""),
    ):
        steps = field == "optimizer" and any(c.how == "step" for c in program.calls)
        if getattr(program, field) != empty and not steps:
            yield replace(program, **{field: empty})
    for i, call in enumerate(program.calls):
        for simpler in (
            replace(call, before=""),
            replace(call, size=0),
            Call(size=call.size, seed=call.seed),
        ):
            if simpler != call:
                yield replace(
                    program,
                    calls=[*program.calls[:i], simpler, *program.calls[i + 1 :]],
                )


def _with_arguments(program):
    """The program, whose outermost forward takes its inputs, and whose plan names its
    parameters."""
    tree = ast.parse(program.source)
    forward = [f for f in _forwards(ast.walk(tree))][-1]
    forward.args.args = [ast.arg("s"), *(ast.arg(i.name) for i in program.inputs)]
    plan = {
        name: dim
        for name, dim in program.plan.items()
        if f"s.{name.split('.')[0]} =" in program.source
    }
    return replace(
        program, source=ast.unparse(ast.fix_missing_locations(tree)) + "\n", plan=plan
    )


def _forwards(nodes):
    return [
        n
        for c in nodes
        if isinstance(c, ast.ClassDef)
        for n in c.body
        if getattr(n, "name", "") == "forward"
    ]


def _body(function):
    return [n for statement in function.body for n in ast.walk(statement)]


def _returns(nodes):
    """One variable is returned instead of all."""
    for forward in _forwards(nodes)[::-1]:
        names = [
            n.id
            for n in _body(forward)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        ]
        for n in _body(forward):
            if isinstance(n, ast.Return):
                values = getattr(n.value, "elts", getattr(n.value, "values", []))
                for value in [
                    *values,
                    *(ast.Name(name, ast.Load()) for name in dict.fromkeys(names)),
                ]:
                    yield nodes.index(n), lambda node, value=value: setattr(
                        node, "value", value
                    ), []


def _cuts(nodes, program, shapes):
    """A variable of the outermost forward is an input instead."""
    forward = _forwards(nodes)[-1]
    for i, statement in list(enumerate(forward.body))[::-1]:
        if isinstance(statement, ast.Assign):
            made = [
                n.id
                for t in statement.targets
                for n in ast.walk(t)
                if isinstance(n, ast.Name)
            ]
            fit = [
                Input(name, shapes[name])
                for name in made
                if name in shapes and "?" not in shapes[name]
            ]
            fit = [x for x in fit if x.name not in [i.name for i in program.inputs]]
            if len(fit) == len(made) and made:
                yield nodes.index(forward), lambda node, i=i: node.body.pop(i), fit


def _statements(nodes):
    """A statement is left out; what it made is then what it was made of. A block's
    lines are its outer's."""
    for forward in _forwards(nodes)[::-1]:
        for holder in [forward, *_body(forward)]:
            for field in "body", "orelse":
                for i, statement in list(enumerate(getattr(holder, field, None) or []))[
                    ::-1
                ]:
                    if isinstance(holder, (ast.IfExp, ast.Lambda)) or isinstance(
                        statement, ast.Return
                    ):
                        continue
                    at = nodes.index(holder)
                    yield at, lambda node, f=field, i=i: _remove(node, f, i, []), []
                    for inner in [
                        getattr(statement, "body", []),
                        getattr(statement, "orelse", []),
                    ]:
                        if inner:
                            yield at, lambda node, f=field, i=i, inner=inner: _remove(
                                node, f, i, inner
                            ), []
                    yield from _renamings(statement, at, forward, nodes, field, i)


def _renamings(statement, at, forward, nodes, field, i):
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    if not isinstance(target, ast.Name):
        return
    names = {n.id for n in ast.walk(statement.value) if isinstance(n, ast.Name)} - {
        "s",
        "F",
        "torch",
        "nn",
        "B",
        "T",
    }
    for name in sorted(names - {target.id}):

        def edit(node, old=target.id, new=name):
            body = getattr(node, field)
            body.pop(i)
            for n in (n for later in body for n in ast.walk(later)):
                if isinstance(n, ast.Name) and n.id == old:
                    n.id = new

        if forward is nodes[at]:
            yield at, edit, []


def _remove(node, field, i, instead):
    body = getattr(node, field)
    body[i : i + 1] = instead
    if not body and field == "body":
        body.append(ast.Pass())


def _expressions(nodes):
    """An expression is one of its parts instead."""
    for forward in _forwards(nodes)[::-1]:
        for n in _body(forward):
            for field, value in ast.iter_fields(n):
                for k, old in enumerate(value if isinstance(value, list) else [value]):
                    if isinstance(old, ast.expr) and isinstance(
                        getattr(old, "ctx", ast.Load()), ast.Load
                    ):
                        for part in _parts(old):
                            at = k if isinstance(value, list) else None
                            yield nodes.index(
                                n
                            ), lambda x, f=field, at=at, part=part: _put(
                                x, f, at, part
                            ), []


def _parts(e):
    if isinstance(e, ast.Call):
        method = isinstance(e.func, ast.Attribute) and not (
            isinstance(e.func.value, ast.Name) and e.func.value.id in "sF"
        )
        return [*([e.func.value] if method else []), *e.args]
    if isinstance(e, ast.BinOp):
        return [e.left, e.right]
    if isinstance(e, ast.UnaryOp):
        return [e.operand]
    if isinstance(e, ast.Subscript):
        return [e.value]
    if isinstance(e, (ast.List, ast.Tuple)):
        return [
            *e.elts,
            *([ast.List(e.elts[:-1], ast.Load())] if len(e.elts) > 1 else []),
        ]
    if isinstance(e, (ast.ListComp, ast.GeneratorExp)):
        return [g.iter for g in e.generators]
    return []


def _put(node, field, at, part):
    if at is None:
        setattr(node, field, part)
    else:
        getattr(node, field)[at] = part


def tidy(tree):
    """The source of a tree, without variables, attributes and classes that nothing
    reads."""
    while True:
        text = ast.unparse(ast.fix_missing_locations(tree))
        if not any(_drop_unread(c, text, tree) for c in tree.body):
            return text + "\n"


def _drop_unread(cls, text, tree):
    if cls.name != "Net" and len(re.findall(rf"\b{cls.name}\b", text)) == 1:
        return not tree.body.remove(cls)
    init, forward = cls.body[0], cls.body[-1]
    for body in init.body, forward.body:
        for statement in body:
            names = _written(statement)
            if names and not any(
                _is_read(name, text, body is init.body, forward) for name in names
            ):
                body.remove(statement)
                body += [] if body else [ast.Pass()]
                return True
    return False


def _written(statement):
    """Names, or attributes of s, that a statement makes."""
    if isinstance(statement, ast.Expr) and "register_buffer" in ast.unparse(statement):
        return [statement.value.args[0].value]
    if not isinstance(statement, ast.Assign):
        return []
    targets = [
        x
        for t in statement.targets
        for x in (t.elts if isinstance(t, ast.Tuple) else [t])
    ]
    if all(isinstance(t, ast.Name) for t in targets):
        return [t.id for t in targets]
    if all(
        isinstance(t, ast.Attribute) and ast.unparse(t.value) == "s" for t in targets
    ):
        return [t.attr for t in targets if t.attr != "kept"]
    return []


def _is_read(name, text, attribute, forward):
    if attribute:
        return len(re.findall(rf"\.{name}\b", text)) > 1 or bool(
            re.search(r"\bs\.(named_parameters|parameters|modules)\(\)", text)
        )
    return any(
        isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)
        for n in ast.walk(forward)
    )


def shapes_of(program):
    """{variable of the outermost forward: its shape, as of an Input}, for float
    tensors."""
    found = []
    for size in range(len(program.sizes)):
        model, held = build(program), {}

        def watch(frame, event, _):
            if (
                event == "return"
                and frame.f_code.co_name == "forward"
                and frame.f_code.co_filename == program.file
            ):
                held.clear()
                held.update(frame.f_locals)

        given = inputs_of(program, Call(size=size))
        sys.setprofile(watch)
        try:
            model(*given)
        except Exception:
            continue
        finally:
            sys.setprofile(None)
        found.append(
            (
                program.sizes[size],
                {
                    k: x.shape
                    for k, x in held.items()
                    if torch.is_tensor(x) and x.dtype == torch.float64
                },
            )
        )
    sizes = [size for size, _ in found]
    names = set.intersection(*(set(shapes) for _, shapes in found)) if found else ()
    same = [n for n in names if len({len(shapes[n]) for _, shapes in found}) == 1]
    return {
        n: tuple(
            dim_of(dims, sizes) for dims in zip(*(shapes[n] for _, shapes in found))
        )
        for n in same
    }


TASKS["shapes"] = shapes_of
