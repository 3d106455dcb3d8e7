"""Functions that a model keeps, and that reach its modules by other ways than `self`:
of a copy of the model they must reach the copy's.

`copy.deepcopy` takes a function as it is, with the live modules in its closure (minGPT
keeps a lambda over its MLP's layers), in its defaults (`lambda x, m=m: ...`) or among
its globals (a script's own `model`).
"""

import copy
import functools
from types import CellType, CodeType, FunctionType, MethodType

from torch import nn

from ..parts import modules
from ..utils import has_state, leaves


def rebind(model, copied, memo):
    """Give the copy of a model functions of its own wherever its modules, or what they
    keep, have one that reaches the model. `memo`: of the deepcopy that made it."""
    copies = _Copies(model, memo)
    for module in modules(copied):
        copies.within(vars(module))


class _Copies:
    def __init__(self, model, memo):
        self.memo, self.modules = memo, {id(m) for m in modules(model)}
        self.made = {}  # id of a function -> the copy's own
        self.cells = {}  # id of a cell -> the copy's own
        self.seen = set()  # ids of the containers that were looked through

    def within(self, container):
        """Replace functions in a dict or list, in what it holds, and in the objects
        there."""
        if id(container) in self.seen:
            return
        self.seen.add(id(container))
        items = (
            container.items() if isinstance(container, dict) else enumerate(container)
        )
        for key, x in list(items):
            if isinstance(x, (dict, list)):
                self.within(x)
            elif isinstance(x, (FunctionType, MethodType, functools.partial)):
                if self.reaches(x, set()):
                    container[key] = self.of(x)
            elif has_state(x) and not isinstance(x, nn.Module) and not _torch(x):
                self.within(vars(x))

    def reaches(self, x, seen):
        """Whether a value is a module of the model, or holds one, or is a function that
        does. `seen`: ids of the functions that were asked, which may hold each
        other."""
        if isinstance(x, nn.Module):
            return id(x) in self.modules
        if isinstance(x, MethodType):
            held = x.__self__, x.__func__
        elif isinstance(x, functools.partial):
            held = x.func, *x.args, *x.keywords.values()
        elif isinstance(x, FunctionType):
            held = () if id(x) in seen else _read(x)
            seen.add(id(x))
        else:
            held = (
                [leaf for _, leaf in leaves(x) if leaf is not x]
                if isinstance(x, (tuple, list, dict))
                else ()
            )
        return any(self.reaches(part, seen) for part in held)

    def of(self, x):
        """The copy's own of a value that reaches the model."""
        if isinstance(x, MethodType):
            return MethodType(self.of(x.__func__), self.of(x.__self__))
        if isinstance(x, functools.partial):
            parts = [self.of(part) for part in (x.func, *x.args)]
            return functools.partial(
                *parts, **{key: self.of(value) for key, value in x.keywords.items()}
            )
        if not self.reaches(x, set()):
            return x
        if isinstance(x, FunctionType):
            return self.made.get(id(x)) or self.function(x)
        return copy.deepcopy(x, self.memo)

    def function(self, f):
        read = {
            name: f.__globals__[name]
            for name in _names(f.__code__)
            if name in f.__globals__
        }
        read = {name: x for name, x in read.items() if self.reaches(x, set())}
        scope = {**f.__globals__} if read else f.__globals__
        new = FunctionType(
            f.__code__,
            scope,
            f.__name__,
            None,
            f.__closure__ and tuple(map(self.cell, f.__closure__)),
        )
        self.made[id(f)] = new
        new.__defaults__ = f.__defaults__ and tuple(map(self.of, f.__defaults__))
        new.__kwdefaults__ = f.__kwdefaults__ and {
            name: self.of(x) for name, x in f.__kwdefaults__.items()
        }
        new.__qualname__, new.__module__ = f.__qualname__, f.__module__
        vars(new).update(vars(f))
        scope.update({name: self.of(x) for name, x in read.items()})
        for cell in f.__closure__ or ():
            if (mine := self.cells.get(id(cell))) is not None and mine == CellType():
                mine.cell_contents = self.of(cell.cell_contents)
        return new

    def cell(self, cell):
        """A cell that does not reach the model stays shared."""
        if cell == CellType() or not self.reaches(cell.cell_contents, set()):
            return cell
        return self.cells.setdefault(id(cell), CellType())


def _read(f):
    """What a function reads beside its arguments: its cells, defaults, and globals that
    are modules."""
    cells = [cell.cell_contents for cell in f.__closure__ or () if cell != CellType()]
    defaults = [*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()]
    found = (f.__globals__.get(name) for name in _names(f.__code__))
    return [*cells, *defaults, *(x for x in found if isinstance(x, nn.Module))]


def _names(code):
    """The names of globals (and attributes) in a function's code and in that of
    functions within it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _torch(x):
    return type(x).__module__.partition(".")[0] in (
        "torch",
        __package__.partition(".")[0],
    )
