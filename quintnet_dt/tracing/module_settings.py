"""What is noted of a module when it runs: whether its forward can differ, and its
settings."""

from types import NoneType

from torch import nn

# Forwards that make the same calls each time, so that nothing need watch them.
_STEADY_MODULES = (
    (nn.Linear, nn.Bilinear, nn.Embedding, nn.Sequential, nn.Identity, nn.Dropout)
    + (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    + (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softmax)
)
STEADY = {module.forward for module in _STEADY_MODULES}


def settings_of(module):
    """The attributes of a module that may choose what it computes, and that a user may
    change: flags, strings, what is None; of one of torch.nn its numbers too, which no
    forward of theirs changes."""
    plain = [bool, str, NoneType]
    if type(module).__module__.startswith("torch.nn."):
        plain += [int, float]
    return {
        name: x
        for name, x in vars(module).items()
        if type(x) in plain and name not in _TORCHS
    }


_TORCHS = set(vars(nn.Module()))  # what torch itself keeps of every module
