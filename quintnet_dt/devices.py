"""What a device can do, as far as a plan asks: the constants of the model of time in
planning/cost.py."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceSpec:
    """Peak rates of one rank's device.

    Args:
        name: as a plan prints it; a GPU whose name holds it has these rates.
        half, single, double: floating-point operations a second of dense matrix
            products, in float16 and bfloat16, float32 (TF32 off, as is torch's default)
            and float64.
        memory_bandwidth: bytes a second that are read from or written to memory.
        link_bandwidth: bytes a second that a rank can send to the others of its group.
        latency: seconds that a collective takes, however little it sends.
    """

    name: str
    half: float
    single: float
    double: float
    memory_bandwidth: float
    link_bandwidth: float
    latency: float = 1e-5

    def peak(self, dtype: torch.dtype) -> float:
        """Floating-point operations a second in tensors of this dtype."""
        if dtype.itemsize <= 2:
            return self.half
        return (
            self.double if dtype in (torch.float64, torch.complex128) else self.single
        )


# Dense peaks, memory and links (one direction) of the vendors' data sheets. Where GPUs
# have no link of their own, PCIe's.
_SPECS = [
    # https://www.nvidia.com/en-us/data-center/dgx-b200 (a GPU's share)
    DeviceSpec(
        name="B200",
        half=2.25e15,
        single=80e12,
        double=40e12,
        memory_bandwidth=8.0e12,
        link_bandwidth=900e9,
    ),
    # https://www.nvidia.com/en-us/data-center/h200
    DeviceSpec(
        name="H200",
        half=989e12,
        single=67e12,
        double=67e12,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
    ),
    # https://www.nvidia.com/en-us/data-center/h100 (SXM)
    DeviceSpec(
        name="H100",
        half=989e12,
        single=67e12,
        double=67e12,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
    ),
    # https://www.nvidia.com/en-us/data-center/a100 (SXM, 80 GB)
    DeviceSpec(
        name="A100",
        half=312e12,
        single=19.5e12,
        double=19.5e12,
        memory_bandwidth=2.04e12,
        link_bandwidth=300e9,
    ),
    # https://www.nvidia.com/en-us/data-center/v100 (SXM2)
    DeviceSpec(
        name="V100",
        half=125e12,
        single=15.7e12,
        double=7.8e12,
        memory_bandwidth=0.9e12,
        link_bandwidth=150e9,
    ),
    # https://www.nvidia.com/en-us/data-center/l40s
    DeviceSpec(
        name="L40S",
        half=362e12,
        single=91.6e12,
        double=1.4e12,
        memory_bandwidth=0.864e12,
        link_bandwidth=32e9,
        latency=2e-5,
    ),
    # Ada GPU architecture whitepaper (NVIDIA, 2022)
    DeviceSpec(
        name="RTX 4090",
        half=165e12,
        single=82.6e12,
        double=1.3e12,
        memory_bandwidth=1.008e12,
        link_bandwidth=32e9,
        latency=2e-5,
    ),
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    DeviceSpec(
        name="MI300X",
        half=1307e12,
        single=163e12,
        double=163e12,
        memory_bandwidth=5.3e12,
        link_bandwidth=448e9,
    ),
    # One core a rank and gloo, as measured where benchmarks/README.md's figures are.
    DeviceSpec(
        name="CPU",
        half=36e9,
        single=36e9,
        double=18e9,
        memory_bandwidth=15e9,
        link_bandwidth=1e9,
        latency=2e-4,
    ),
]
DEVICES = {spec.name: spec for spec in _SPECS}
DEFAULT = DEVICES["H100"]


def device_spec(device: "str | DeviceSpec | None", lies_on: str) -> DeviceSpec:
    """The constants to plan with: those that the user gives or names; else those of the
    type of device that the weights lie on, `lies_on`, an H100's where that is unknown.

    Raises: TypeError, ValueError for what is neither a DeviceSpec nor a name in
    DEVICES.
    """
    if isinstance(device, DeviceSpec):
        return device
    if device is not None and device not in DEVICES:
        kind = ValueError if isinstance(device, str) else TypeError
        raise kind(
            f"device: expected a DeviceSpec or one of {', '.join(DEVICES)}, found"
            f" {device!r}"
        )
    if device is not None:
        return DEVICES[device]
    if lies_on == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_name()
        return next((s for s in _SPECS if s.name in found), DEFAULT)
    return DEVICES["CPU"] if lies_on == "cpu" else DEFAULT
