"""A plan as plain PyTorch: `parallelize_module` and a dict of styles, as far as torch's
styles go, and comments where they do not.

Column and row parallel layers of an axis are one region, in which activations are
shards (Megatron-LM, arXiv 1909.08053, section 3), where nothing else of the plan acts on
the axis. Else each layer is complete by itself, which is right anywhere.
"""

import re
from collections.abc import Iterator, Mapping
from os.path import commonprefix
from typing import Any

from .axes.action import ADD_ONCE, GATHER, SUM, SUM_GRADIENT
from .costs import Communication
from .keys import ModulePath, ParamName

Styles = dict[ModulePath, str]

COLUMN, ROW = "ColwiseParallel()", "RowwiseParallel()"
COLUMN_ALONE = "ColwiseParallel(output_layouts=Replicate())"
ROW_ALONE = "RowwiseParallel(input_layouts=Replicate())"

_HEAD = '''"""Tensor parallelism over {n} ranks in plain PyTorch, written by quintnet_dt.

Run it with torchrun --nproc-per-node {n}. What the dict does not name stays whole, a
plain tensor on every rank; clip_grad_norm_ and fused optimizers want all parameters of
one kind.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
'''
_APPLY = """

def parallelize(model, mesh=None):
    mesh = mesh or init_device_mesh("{device}", ({n},))
    parallelize_module(model, mesh, plan)"""
_SUM = """
    def over_ranks(grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=mesh.get_group())
        return grad

    # They are used with shards: each rank has a part of their gradient.
    for name in summed:
        model.get_parameter(name).register_hook(over_ranks)"""
_TIE = """    # parallelize_module makes two parameters of one that has two names.
    for name, first in tied.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(first))"""


def torch_code(plan: Any) -> str:
    """The source of a module with `parallelize(model)`; see
    `TensorParallelPlan.to_code`."""
    entries = list(plan.entries.values())
    regions = _regions(plan)
    styles, comments = _modules(plan, regions)
    summed, tied = _summed(plan, regions), _tied(entries, styles)
    on_cpu = plan.cost is None or plan.cost.device == "CPU"
    sections = [
        _HEAD,
        *(f"# {line}" for line in dict.fromkeys(map(_star, comments))),
        _literal("plan", dict(_starred(styles, entries))),
        _literal("summed", summed),
        _literal("tied", tied),
        _APPLY,
        _SUM if summed else "",
        _TIE if tied else "",
        "    return model",
    ]
    text = "\n".join(filter(None, sections)) + "\n"
    device = "cpu" if on_cpu else "cuda"
    return text.replace("{n}", str(plan.tp_size)).replace("{device}", device)


def _modules(plan: Any, regions: set[int]) -> tuple[Styles, list[str]]:
    """The styles of modules, and what is to be said of weights that have none."""
    n = plan.tp_size
    styles: Styles = {}
    comments: list[str] = []
    for entry in plan.entries.values():
        given = _styles_of(entry, n, entry.axis in regions)
        styles.update(given)
        if entry.dim is not None and not given and not _goes_along(entry, styles):
            comments.append(f"{entry.name}: {_why_not(entry, n)}")
        elif given and entry.units and entry.axis not in regions:
            comments.append(f"{entry.name}: completed at once, {_REGION}")
    return styles, comments


def _summed(plan: Any, regions: set[int]) -> dict[ParamName, None]:
    """Parameters that are used with shards of a region."""
    found = {
        c.what
        for c in plan.communications
        if c.axis in regions and c.change == SUM_GRADIENT
    }
    return dict.fromkeys(sorted(found & plan.entries.keys()))


def _tied(entries: list, styles: Styles) -> dict[ParamName, str]:
    """Other names of a parameter, and its first."""
    return {
        other: _quoted(entry.name)
        for entry in entries
        for other in entry.modules
        if other != entry.name and _module(other) in styles
    }


_REGION = "as its axis has more in it than column and row parallel layers"


def _module(name: ParamName) -> ModulePath:
    return name.rpartition(".")[0]


def _even(entry: Any, n: int) -> bool:
    """Whether all ranks have equal parts."""
    return entry.shape[entry.dim] % n == 0 and entry.units % n == 0


def _styles_of(entry: Any, n: int, in_region: bool) -> Styles:
    """The styles of the modules that a weight is of; none where torch has none."""
    kinds = set(entry.modules.values())
    if entry.dim is None or entry.pieces > 1 or not kinds <= {"Linear", "Embedding"}:
        return {}
    if entry.how not in ("local", "gathered") or not _even(entry, n):
        return {}
    return {
        _module(name): _style(entry, kind, in_region and entry.how == "local")
        for name, kind in entry.modules.items()
        if name.endswith(".weight") or name == "weight"
    }


def _style(entry: Any, kind: str, in_region: bool) -> str:
    # a Linear has (out, in) features, an Embedding (rows, features)
    if entry.dim == (0 if kind == "Linear" else 1):
        return COLUMN if in_region else COLUMN_ALONE
    return ROW if in_region else ROW_ALONE


def _goes_along(entry: Any, styles: Styles) -> bool:
    """Whether it is the bias of a layer that has a style."""
    return entry.name.endswith("bias") and _module(entry.name) in styles


def _why_not(entry: Any, n: int) -> str:
    """Why a weight that the plan splits is left whole."""
    if not entry.modules:
        return "no forward was traced, so what uses it is not known"
    if entry.how == "weight gathered":
        return (
            "stored in parts and gathered before its use, for which torch has no style"
        )
    if entry.how == "exchanged" or entry.pieces > 1:
        return "fused pieces, each of which is split, for which torch has no style"
    if not _even(entry, n):
        return "ranks have unequal parts, which torch's styles do not carry on"
    return "not used by an nn.Linear or nn.Embedding alone"


def _regions(plan: Any) -> set[int]:
    """The axes of which all that a plan does, torch's styles do."""
    axes = {e.axis for e in plan.entries.values()} - {None}
    return {axis for axis in axes if _is_region(plan, axis)}


def _is_region(plan: Any, axis: int) -> bool:
    mine = [e for e in plan.entries.values() if e.axis == axis]
    paths = {_module(e.name) for e in mine}
    biases = {f"{path}.bias".lstrip(".") for path in paths}
    for entry in mine:
        styled = entry.name in biases or _styles_of(entry, plan.tp_size, True)
        if not styled or len(entry.modules) > 1:
            return False
    around = commonprefix([path.split(".") for path in paths])
    inside = (path.split(".")[: len(around)] == around for path in plan.adapted)
    if any(inside):
        return False
    sent = [c for c in plan.communications if c.axis == axis]
    return all(_is_layers(c, paths, biases, plan) for c in sent)


def _is_layers(
    c: Communication, paths: set[ModulePath], biases: set[ParamName], plan: Any
) -> bool:
    """Whether a column or row parallel layer communicates so by itself."""
    if c.what in plan.entries:
        return c.change == SUM_GRADIENT or c.change == ADD_ONCE and c.what in biases
    changes = {"input": (SUM_GRADIENT,), "output": (SUM, GATHER)}
    return c.module in paths and c.change in changes[c.what]


def _starred(styles: Styles, entries: list) -> Iterator[tuple[str, str]]:
    """The styles, those of repeated blocks once: "layers.*.mlp.up"."""
    alike: dict[str, set[str | None]] = {}
    for path in {_module(name) for entry in entries for name in entry.modules}:
        alike.setdefault(_star(path), set()).add(styles.get(path))
    seen = set()
    for path, style in styles.items():
        key = _star(path) if len(alike[_star(path)]) == 1 else path
        if key not in seen:
            seen.add(key)
            yield key, style


def _star(path: ModulePath) -> str:
    """A path with any number for those within it."""
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", path)


def _quoted(name: str) -> str:
    return f'"{name}"'


def _literal(name: str, items: Mapping[str, str | None]) -> str:
    """A dict, or a list where there are no values, as black writes it; none of
    nothing, but for the plan."""
    if not items:
        return "plan = {}" if name == "plan" else ""
    values = [v for v in items.values() if v is not None]
    opened, closed = "{}" if values else "[]"
    lines = [
        f"    {_quoted(key)}," if value is None else f"    {_quoted(key)}: {value},"
        for key, value in items.items()
    ]
    return "\n".join([f"{name} = {opened}", *lines, closed])
