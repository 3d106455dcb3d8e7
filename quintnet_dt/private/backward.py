"""Whether a backward runs, when it ends, and what ends the forwards that it
recomputes."""

from collections.abc import Callable

import torch

from .absent import absent

try:
    graph_task_id = torch._C._current_graph_task_id
except AttributeError:
    graph_task_id = absent("torch._C._current_graph_task_id")

# Ends a forward that is recomputed as soon as its backward has all that it needs,
# within a call.
try:
    from torch.utils.checkpoint import _StopRecomputationError as RecomputationEnds
except ImportError:
    RecomputationEnds = ()  # nothing is caught


def in_backward() -> bool:
    """Whether autograd is running a backward in this thread."""
    return graph_task_id() != -1


def at_end_of_backward(function: Callable[[], object]) -> None:
    """Call a function when the backward that runs has ended, as torch's own DDP and
    FSDP2 do."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
