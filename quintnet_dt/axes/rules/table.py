"""What every rule is made with: the table of rules, and the few things that they say of a node.

A rule is a function (node, axes) that sets the dims of the node's outputs (`axes.set`), and says
which factors of its inputs the operator sums over (`axes.contract`) or needs whole (`axes.whole`).
An operator without a rule is assumed to need every dim whole, which is always right, never fast.
"""

import functools

from ..factors import Factor

RULES = {}


def rule(names):
    def add(f):
        for name in names.split():
            RULES[name] = f
        return f

    return add


def unknown(node, axes):
    for v in node.inputs:
        axes.whole(node, v, every(axes.dims(v)))
    for v in node.outputs:
        if v.id in node.mutated or any(v is x for x in node.inputs):
            axes.whole(node, v, every(axes.dims(v)))


def every(dims):
    return [f for d in dims for f in d]


def fresh(n):
    return [Factor(n)] if n != 1 else []


@functools.cache
def signature(op):
    """An operator's arguments as {name: (position, default value, whether it is a tensor)}."""
    places = enumerate(op._schema.arguments)
    return {
        a.name: (i, a.default_value, str(a.type) in ("Tensor", "Optional[Tensor]"))
        for i, a in places
    }


def arg(node, name):
    """An operator's argument by its schema name, None where it has none of that name."""
    at, default, _ = signature(node.op).get(name, (len(node.args), None, False))
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, default)


def dims_of(node, ndim, name="dim"):
    """The dims that an operator was given, all of them where it was given none; a scalar has
    none."""
    dims = arg(node, name)
    if dims is None or ndim == 0 or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(ndim))
    return [d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def pass_but(node, axes, dims):
    """Outputs of the input's rank, or of it less the given dims; those dims are needed whole."""
    value = node.inputs[0]
    for d in dims:
        axes.whole(node, value, axes.dims(value)[d])
    for out in node.outputs:
        kept = [(i, d) for i, d in enumerate(axes.dims(value))]
        if len(out.shape) != len(kept):
            kept = [(i, d) for i, d in kept if i not in dims]
        if len(out.shape) == len(kept):
            axes.set(out, [fresh(s) if i in dims else d for (i, d), s in zip(kept, out.shape)])
