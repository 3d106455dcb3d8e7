"""Numbers in a module's attributes that count what is sharded, its heads say: while its
forward runs on a shard, it finds how many this rank has.

So one writes it by hand (`self.num_heads // tp_size`), and code that checks its own
sizes is right on a shard too.
"""

from typing import Any

from torch import nn

from ..groups import Group
from .sizes import LocalSize


class Numbers:
    """The numbers of one module, while it runs."""

    def __init__(self, module: nn.Module, rules: dict[str, LocalSize], group: Group):
        self.module = module
        self.before: dict[str, Any] = {name: getattr(module, name) for name in rules}
        self.local = {
            name: rule.local(self.before[name], group) for name, rule in rules.items()
        }

    def show(self) -> None:
        for name, number in self.local.items():
            setattr(self.module, name, number)

    def hide(self) -> None:
        """Put back what was there, where the forward has not set it anew."""
        for name, number in self.before.items():
            if getattr(self.module, name, None) == self.local[name]:
                setattr(self.module, name, number)
