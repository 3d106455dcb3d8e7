"""A plan as a picture: HTML that stands by itself, drawn by the styles of picture.html.

Each weight is a rectangle, (out, in) features down and across, its sides by the
logarithm of its shape, cut where ranks share it. Repeated blocks are drawn once.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from .axes.action import (
    EXCHANGE,
    GATHER,
    MEAN,
    SPLIT,
    SUM,
    SUM_GRADIENT,
    TAKE_HEADS,
)
from .costs import Communication
from .folding import folded
from .keys import ModulePath

COLOURS = 8
# Sides of a rectangle, in pixels: of a dim of 1, and for each doubling.
SHORTEST, PER_DOUBLING = 10, 7

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Tensor parallel plan</title>
<style>
body { margin: 0 }
@media (prefers-color-scheme: dark) { body { background: #14171b } }
</style>
</head>
<body>
$body</body>
</html>
"""
_COLLECTIVES = {
    SUM: "all-reduce",
    MEAN: "all-reduce of means",
    GATHER: "all-gather",
    EXCHANGE: "all-to-all",
    SPLIT: "all-gather in the backward",
    SUM_GRADIENT: "all-reduce in the backward",
    TAKE_HEADS: "all-reduce in the backward",
}


@dataclass
class _Module:
    """What is drawn of one module, or of all that are alike: its weights, and what it
    communicates."""

    first: ModulePath  # the first of those that are alike
    weights: list = field(default_factory=list)  # entries


def page(plan: Any, how: dict[str, str]) -> str:
    """A whole HTML page; `how`: what the words for how a weight runs mean."""
    return Template(_PAGE).substitute(body=fragment(plan, how))


def fragment(plan: Any, how: dict[str, str]) -> str:
    """The part of a page that shows a plan; see `TensorParallelPlan.to_html`."""
    template = Path(__file__).with_suffix(".html").read_text()
    blocks = _blocks(plan)
    colours = _Colours(plan)
    drawn = [_block(name, inside, colours) for name, inside in blocks.items()]
    used = {e.how for e in plan.entries.values()}
    legend = [
        f'<li><div class="weight {_css(word)}{cut}></div><span><b>{word}</b>: '
        f"{escape(text)}</span></li>"
        for word, text in how.items()
        if word in used
        for cut in [
            '"' if word == "replicated" else ' rows" style="--cuts:2;--pieces:1"'
        ]
    ]
    return Template(template).substitute(
        ranks=plan.tp_size,
        share=f"{plan.share:.1%}",
        cost=escape(str(plan.cost or plan.note)),
        time=_time(plan.cost),
        axes="".join(colours.legend()),
        how="".join(legend),
        blocks="\n".join(drawn),
    )


def _css(how: str) -> str:
    return how.replace(" ", "-")


def _time(cost: Any) -> str:
    """A bar of the seconds of a step."""
    if cost is None or not cost.seconds:
        return ""
    share = 100 * cost.compute_seconds / cost.seconds
    return (
        f'<div class="time" role="img" aria-label="{share:.0f}% of a step computes">'
        f'<i style="width:{share:.1f}%"></i><i style="width:{100 - share:.1f}%"></i>'
        f"</div><p>a step: {share:.0f}% computing (left), {100 - share:.0f}%"
        " communication (right)</p>"
    )


class _Colours:
    """The axes that are drawn, each with a name and a colour, and the communication of
    each module."""

    def __init__(self, plan: Any):
        self.n = plan.tp_size
        self.numbers: dict[str, int] = {}  # of colours, by the axes' names
        self.names: dict[int, str] = {}
        embeddings = [
            e for e in plan.entries.values() if "Embedding" in e.modules.values()
        ]
        rows = {e.shape[0] for e in embeddings}
        for axis in {e.axis for e in plan.entries.values() if e.axis is not None}:
            mine = [e for e in plan.entries.values() if e.axis == axis]
            units = mine[0].units
            share = -(-units // self.n)
            self.names[axis] = f"{units} {_kind(mine, rows)}, {share} a rank"
        self.sent: dict[ModulePath, list[Communication]] = {}
        for c in plan.communications:
            self.sent.setdefault(c.module, []).append(c)

    def of(self, entry: Any) -> str:
        """A CSS value."""
        if entry.axis is None:
            return "var(--own)"
        number = self.numbers.setdefault(self.names[entry.axis], len(self.numbers))
        return f"var(--a{number % COLOURS})"

    def legend(self) -> Iterable[str]:
        for name, number in self.numbers.items():
            colour = f"--c:var(--a{number % COLOURS});--cuts:{self.n};--pieces:1"
            yield (
                f'<li><div class="weight rows" style="{colour}"></div>'
                f"<span>{escape(name)}</span></li>"
            )


def _kind(entries: list, vocabularies: set[int]) -> str:
    """What an axis is of, by the weights that it runs through."""
    kinds = {kind for e in entries for kind in e.modules.values()}
    if entries[0].units in vocabularies and any(e.dim == 0 for e in entries):
        return "tokens of the vocabulary"
    if any(kind.startswith("Conv") for kind in kinds):
        return "channels"
    if any(len(e.shape) == 3 and e.dim == 0 for e in entries):
        return "experts"
    if any(e.units * e.pieces < e.shape[e.dim] for e in entries if e.dim is not None):
        return "heads"
    return "features"


def _blocks(plan: Any) -> dict[str, dict[str, _Module]]:
    """Block -> the modules in it, by name: "layers.0-31" -> "mlp.up"."""
    owners = {name.rpartition(".")[0] for name in plan.entries}
    known = list(plan.entries.values())
    # modules that communicate, and have no weights of their own
    others = {c.module for c in plan.communications} - owners
    bare = [
        replace(known[0], name=f"{path}.", shape=(), dim=None, why="")
        for path in sorted(others)
    ]

    def place(row: tuple[str, Any]) -> int:
        """In the model's order; after what is in a module, what it does itself."""
        name = row[1].name
        within = [i for i, e in enumerate(known) if e.name.startswith(name)]
        return max(within, default=len(known))

    blocks: dict[str, dict[str, _Module]] = {}
    for name, entry in sorted(folded([*known, *bare]), key=place):
        path = name.rpartition(".")[0]
        block, inside = _within(path)
        modules = blocks.setdefault(block, {})
        module = modules.setdefault(inside, _Module(entry.name.rpartition(".")[0]))
        if entry.shape:
            module.weights.append(replace(entry, name=name))
    return blocks


def _within(path: str) -> tuple[str, str]:
    """The outermost numbered block that a module is in, and its place there."""
    found = re.match(r"(.*?(?:^|\.)[\d,-]+)(?:\.|$)(.*)", path)
    return (found[1], found[2]) if found else ("", path)


def _block(name: str, modules: dict[str, _Module], colours: _Colours) -> str:
    times = _times(name)
    title = escape(name) or "around the blocks"
    repeated = f" <small>&times; {times}, drawn once</small>" if times > 1 else ""
    drawn = [_module(inside, m, colours) for inside, m in modules.items()]
    return (
        f'<section class="block"><h2>{title}{repeated}</h2>'
        f'<div class="modules">{"".join(drawn)}</div></section>'
    )


def _times(name: str) -> int:
    """How many blocks "layers.0-2,5" are."""
    runs = re.findall(r"(\d+)(?:-(\d+))?", name.rpartition(".")[2])
    return sum(int(last or first) - int(first) + 1 for first, last in runs)


def _module(name: str, module: _Module, colours: _Colours) -> str:
    weights = [_weight(e, colours) for e in module.weights]
    sent = [
        f'<li title="{escape(c.change)}">{escape(_named(c))}</li>'
        for c in colours.sent.get(module.first, ())
        if c.bytes
    ]
    listed = f'<ul class="sent">{"".join(sent)}</ul>' if sent else ""
    return (
        f'<div class="module"><h3>{escape(name) or "itself"}</h3>'
        f'<div class="weights">{"".join(weights)}</div>{listed}</div>'
    )


def _named(c: Communication) -> str:
    what = c.what.rpartition(".")[2]
    kind = _COLLECTIVES.get(c.change, c.change)
    return f"{what}: {kind}, {_bytes(c.bytes)}"


def _bytes(n: int) -> str:
    unit, name = next(
        (size, name)
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
        if n >= size
    )
    return f"{n / unit:.3g} {name}"


def _weight(entry: Any, colours: _Colours) -> str:
    across = max(1, entry.dim or 1)  # of more dims, that which is cut
    height = _side(entry.shape[0])
    width = _side(entry.shape[across]) if len(entry.shape) > across else SHORTEST
    cuts = colours.n * entry.pieces
    style = f"height:{height}px;width:{width}px;--c:{colours.of(entry)}"
    kind, placement = _css(entry.how), "Replicate()"
    if entry.dim is not None:
        kind += " columns" if entry.dim else " rows"
        style += f";--cuts:{cuts};--pieces:{entry.pieces}"
        pieces = f", {entry.pieces} pieces" if entry.pieces > 1 else ""
        placement = f"Shard({entry.dim}){pieces}"
    shape = " &times; ".join(map(str, entry.shape))
    axis = colours.names.get(entry.axis, "")
    why = "; ".join(filter(None, [entry.how, axis, entry.why]))
    return (
        f'<figure tabindex="0"><div class="weight {kind}" style="{style}"></div>'
        f"<figcaption><b>{escape(entry.name.rpartition('.')[2])}</b> {shape}<br>"
        f"{placement}</figcaption>"
        f'<span class="why" role="tooltip"><b>{escape(entry.name)}</b><br>'
        f"{escape(why)}</span></figure>"
    )


def _side(length: int) -> int:
    return round(SHORTEST + PER_DOUBLING * math.log2(max(length, 1)))
