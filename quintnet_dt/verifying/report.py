"""Verification: what was compared of a split model and the whole one, and what
differs. Pure data."""

from dataclasses import dataclass

from ..keys import ModulePath

OUTPUTS, GRADIENTS = "outputs", "gradients"
BUFFERS, PARAMETERS = "buffers", "parameters after a step"


@dataclass(frozen=True)
class Difference:
    """Where a tensor of the split model differs most from the whole model's.

    Args:
        module: the path of the module that it is of, "" for the model itself.
        name: of the parameter or buffer, with the module's path; of an output, where it
            lies in what the module returns ("" for the tensor itself).
        rank: of the tp group, where it differs most.
        greatest: the greatest absolute difference; inf where there is nothing to
            compare, which `note` tells.
        relative: the same over what was allowed for as its scale: the greatest element
            of the whole tensor, or 1e-3 of the greatest of all gradients.
        at: the index of that element in the whole tensor, None where there is none.
        note: what else there is to say.
    """

    module: ModulePath
    name: str
    rank: int
    greatest: float
    relative: float
    at: tuple[int, ...] | None = None
    note: str = ""

    def __str__(self) -> str:
        place = "" if self.at is None else f" at {list(self.at)}"
        size = (
            f"differs by {self.greatest:.3g}{place} ({self.relative:.1e} of its scale)"
        )
        name = f", {self.name}" if self.name else ""
        what = self.note or size
        return f"{self.module or 'the model'}{name}: {what}, on rank {self.rank}"


@dataclass(frozen=True)
class Compared:
    """All tensors of one kind: how many they are, the greatest relative difference, and
    those that differ by more than the tolerance."""

    kind: str
    count: int
    greatest: float
    differences: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        wrong = f", {len(self.differences)} wrong" if self.differences else ""
        return f"{self.kind}: {self.count}, within {self.greatest:.1e}{wrong}"


@dataclass(frozen=True)
class Verification:
    """What `verify_tensor_parallel` found; the same on every rank.

    Args:
        tp_size, dtype, tolerance: what was compared, and how closely: differences are
            relative to the greatest element of the whole model's tensor.
        compared: outputs, gradients, buffers, and parameters after one step.
        first_output: of the first module, in the forward's order, whose output differs;
            None where the outputs are right.
        first_gradient: of the first parameter, in the backward's order, whose gradient
            differs.
    """

    tp_size: int
    dtype: str
    tolerance: float
    compared: tuple[Compared, ...]
    first_output: Difference | None = None
    first_gradient: Difference | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not any(c.differences for c in self.compared)

    def __str__(self) -> str:
        verdict = "computes what the whole model does" if self.ok else "is wrong"
        head = (
            f"tensor parallel over {self.tp_size} ranks {verdict} (in {self.dtype},"
            f" tolerance {self.tolerance:.1e})"
        )
        lines = [head, *map(str, self.compared)]
        if self.first_output is not None:
            lines.append(f"first output that differs: {self.first_output}")
        if self.first_gradient is not None:
            lines.append(
                f"first gradient that differs, backwards: {self.first_gradient}"
            )
        if not self.ok and self.first_output is self.first_gradient is None:
            worst = [c.differences[0] for c in self.compared if c.differences]
            lines += [f"differs: {d}" for d in worst]
        return "\n  ".join(lines)
