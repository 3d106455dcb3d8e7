"""The import changes nothing of torch, and asks for none of its private names."""

import subprocess
import sys

CODE = """
import torch, torch.distributed.tensor.parallel, torch.distributed.checkpoint, torch.distributed.fsdp
import torch._subclasses.fake_tensor as fakes, torch.distributed.tensor.placement_types as placements
import torch.utils._python_dispatch as dispatch, torch.distributed.tensor._ops._pointwise_ops as pointwise

for name in "FakeCopyMode", "FakeTensor", "FakeTensorMode", "unset_fake_temporarily":
    delattr(fakes, name)
for name in "get_eval_frame_callback", "set_code_exec_strategy", "_FrameExecStrategy":
    delattr(torch._C._dynamo.eval_frame, name)
del placements._StridedShard, dispatch.TorchDispatchMode, torch._C._current_graph_task_id


def refuse(*args):
    raise AssertionError("torch was changed")


def names():
    owners = torch, torch.compiler, torch.nn.Module, torch.Tensor, torch.distributed.tensor.DTensor
    return {(owner, name): id(x) for owner in owners for name, x in vars(owner).items()}


pointwise._register_single_dim_pointwise, before = refuse, names()
import quintnet_dt

for name in quintnet_dt.__all__:
    getattr(quintnet_dt, name)
after = names()
assert [name for name, x in before.items() if after.get(name) != x] == []
try:
    quintnet_dt.plan_tensor_parallel(torch.nn.Linear(8, 8), 2, example_inputs=(torch.ones(2, 8),))
except RuntimeError as e:
    print(e)
"""


def test_a_torch_without_private_names():
    """Nothing of it is changed; what needs one of them says so when it is used."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert (
        "expected torch._subclasses.fake_tensor, which torch" in done.stdout
        and "does not have" in done.stdout
    )
