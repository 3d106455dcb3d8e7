"""The private names of torch that the library cannot do without, by what they are
needed for.

A release of torch that lacks one costs what needs it, told when it is used, and not the
import. Nothing of torch is changed by importing this.
"""

from .backward import RecomputationEnds, at_end_of_backward, in_backward
from .compiled import (
    as_compiled,
    compiling,
    constant,
    not_compiled,
    top_not_compiled,
    within_compiled,
)
from .fakes import (
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    hidden_fakes,
    silent_fakes,
    unset_fake_temporarily,
)
from .hooks import as_parameter, global_hooks, has_hooks, saves_by_hooks, share_hooks
from .modes import (
    forward_mode,
    function_mode,
    modes_aside,
    transform,
    transforms_aside,
)
from .operators import HigherOrderOperator, TorchDispatchMode, is_any_true, safe_softmax
from .sharded import (
    DDP_SPEC,
    SINCE_2_13,
    _StridedShard,
    broadcasting,
    compute_dtype,
    fsdp_state,
    own_chunk_list,
    read_local,
)

__all__ = [
    "DDP_SPEC",
    "FakeCopyMode",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "RecomputationEnds",
    "SINCE_2_13",
    "TorchDispatchMode",
    "_StridedShard",
    "as_compiled",
    "as_parameter",
    "at_end_of_backward",
    "broadcasting",
    "compiling",
    "compute_dtype",
    "constant",
    "forward_mode",
    "fsdp_state",
    "function_mode",
    "global_hooks",
    "has_hooks",
    "hidden_fakes",
    "in_backward",
    "is_any_true",
    "modes_aside",
    "not_compiled",
    "own_chunk_list",
    "read_local",
    "safe_softmax",
    "saves_by_hooks",
    "share_hooks",
    "silent_fakes",
    "top_not_compiled",
    "transform",
    "transforms_aside",
    "unset_fake_temporarily",
    "within_compiled",
]
