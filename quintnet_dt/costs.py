"""Cost: what a step costs a rank, by the plan's own count."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cost:
    """What the traced inputs cost a rank.

    Args:
        flops, whole_flops: floating-point operations of the forward's matrix products,
            convolutions and attention, counted as torch.utils.flop_counter does: those
            that the busiest rank computes, and those of the whole model.
        bytes_sent: what a rank sends in one forward and backward (ring collectives).
        collectives: how many there are in one forward and backward.
        activation_bytes, whole_activation_bytes: of the outputs of all operators of the
            forward, views not counted: a rank's, and the whole model's.
        compute_seconds, communication_seconds: of one forward and backward, by the
            roofline in planning/cost.py; nothing is taken to overlap.
        device: the name of the DeviceSpec that they are counted for.
        inputs: the traced inputs' shapes and dtypes.
    """

    flops: int
    whole_flops: int
    bytes_sent: int
    collectives: int
    activation_bytes: int
    whole_activation_bytes: int
    compute_seconds: float
    communication_seconds: float
    device: str
    inputs: str

    @property
    def seconds(self) -> float:
        """Of one forward and backward."""
        return self.compute_seconds + self.communication_seconds

    def faults(self) -> list[str]:
        """What is wrong with the fields' types and ranges."""
        names = {"device", "inputs"}
        wrong = []
        for name, value in asdict(self).items():
            is_count = type(value) in (int, float) and value >= 0
            if not (isinstance(value, str) if name in names else is_count):
                wrong.append(f"cost.{name}: {value!r}")
        return wrong

    def __str__(self) -> str:
        share = f"{self.flops / self.whole_flops:.1%}" if self.whole_flops else "none"
        return (
            f"for {self.inputs}: a rank computes {share} of the forward's"
            f" {self.whole_flops / 1e12:.3g} TFLOP and sends"
            f" {self.bytes_sent / 1e6:.2f} MB a step in {self.collectives} collectives;"
            f" about {duration(self.compute_seconds)} of computing and"
            f" {duration(self.communication_seconds)} of communication on {self.device}"
        )


@dataclass(frozen=True)
class Communication:
    """One action on one tensor in a step: where, and what it sends.

    Args:
        module: the path of the module that the tensor is given to, or made in.
        what: a parameter's name, "input" or "output".
        change: of the tensor's placement, as axes/action.py names it.
        bytes: that a rank sends for it, forward and backward.
        axis: the number of the axis that the call works on a shard of (as `Entry.axis`);
            None where it works on whole tensors.
    """

    module: str
    what: str
    change: str
    bytes: int
    axis: int | None = None


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step of the first rank.

    Args:
        name: all-reduce, all-gather, reduce-scatter or all-to-all.
        backward: whether they are the backward's; else the forward's.
        count: how many.
        bytes: what the rank sends in them, as rings.
    """

    name: str
    backward: bool
    count: int
    bytes: int


@dataclass(frozen=True)
class Step:
    """One forward and backward of the first rank, run on fake tensors. All but counts
    are in bytes.

    Args:
        parameters, trained: the rank's part of all parameters, and of those that
            require a gradient.
        elements: how many the former have.
        tensors: how many parameters require a gradient.
        activations: module path -> what it made that is held when the forward returns:
            what autograd saves, and the outputs.
        peak: the most that is held at any moment beside the parameters: inputs,
            buffers, activations, gradients, what is made on the way.
        collectives: by kind, forward and backward apart.
    """

    parameters: int
    elements: int
    trained: int
    tensors: int
    activations: dict[str, int]
    peak: int
    collectives: list[Collective]

    @classmethod
    def of(cls, data: dict) -> "Step":
        """A Step from what `asdict` made of it."""
        collectives = [Collective(**c) for c in data["collectives"]]
        return cls(**{**data, "collectives": collectives})
