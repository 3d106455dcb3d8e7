"""What is wrong with placements that a user gives, for the parameters of a model."""

from collections.abc import Mapping

from torch.distributed.tensor.placement_types import Placement

from .keys import ParamName
from .private import _StridedShard


def problems(
    placements: Mapping[ParamName, Placement], shapes: Mapping[ParamName, tuple]
) -> list[str]:
    """What is wrong with a user's placements for a model whose parameters have these
    shapes: a list of messages."""
    errors = []
    for name, p in placements.items():
        if name not in shapes:
            close = [
                n for n in shapes if n.split(".")[-2:] == str(name).split(".")[-2:]
            ][:1]
            hint = f" (is it {close[0]}?)" if close else ""
            errors.append(f"{name}: the model has no such parameter{hint}")
        elif not isinstance(p, Placement) or p.is_partial():
            errors.append(f"{name}: expected Shard(dim) or Replicate(), found {p!r}")
        elif p.is_shard() or isinstance(p, _StridedShard):
            shape, last = tuple(shapes[name]), len(shapes[name]) - 1
            if not 0 <= p.dim <= last:
                errors.append(
                    f"{name}: expected a dim of 0 to {last} for shape {shape}, found"
                    f" Shard({p.dim})"
                )
    return errors


def check_user_plan(
    placements: Mapping[ParamName, Placement], shapes: Mapping[ParamName, tuple]
) -> None:
    """Raise one ValueError that lists every entry that does not fit the model."""
    errors = problems(placements, shapes)
    if errors:
        head = (
            f"the plan does not fit the model, {len(errors)} of its entries are wrong:"
        )
        raise ValueError("\n  ".join([head, *errors]))
