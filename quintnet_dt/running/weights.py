"""Whether a split model's weights were changed from outside in ways that DTensor loses,
or that ranks do not share."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..around import undisturbed
from ..comm_ops import all_gather
from ..keys import ParamName
from ..places import Owners

SAMPLE = 8  # elements of a parameter that are looked at


class Mark(NamedTuple):
    """How a parameter was when it was last looked at. `.data = t` gives a DTensor
    another storage, and its local tensor stays as it was."""

    param: DTensor
    storage: torch.UntypedStorage
    local: torch.UntypedStorage
    sample: torch.Tensor


class Weights:
    """What was seen of the parameters of one split model."""

    def __init__(self, owners: Owners, mesh: DeviceMesh):
        self.owners, self.mesh = owners, mesh
        self.marks = {name: _mark(p) for name, p in self.present()}
        self.warned = False

    def present(self) -> Iterator[tuple[ParamName, DTensor]]:
        """(name, parameter) of those that lie on the tp mesh alone and have values."""
        for name, at in self.owners.items():
            module, attr = at[0]
            p = module._parameters.get(attr)
            if (
                isinstance(p, DTensor)
                and p.device_mesh == self.mesh
                and p.device.type != "meta"
                and p.numel()
            ):
                yield name, p

    @undisturbed
    def check_assigned(self) -> None:
        """Raise RuntimeError where `p.data = t` was done to a parameter since it was
        last looked at, and lost; warn where it may have been."""
        lost, perhaps = [], []
        for name, p in self.present():
            old, new = self.marks.get(name), _mark(p)
            if (
                old is None
                or old.param is not p
                or new.storage is old.storage
                or new.local is not old.local
            ):
                self.marks[name] = new
            elif torch.equal(old.sample, new.sample):
                lost.append(name)
            else:
                self.marks[name] = new
                perhaps.append(name)
        if lost:
            raise RuntimeError(
                f"{_some(lost)}: expected values to be copied into a DTensor, found"
                " `.data` assigned, which changes nothing (DTensor keeps its local"
                " tensor): with torch.no_grad(): p.copy_(values)"
            )
        if perhaps and not self.warned:
            self.warned = True
            warnings.warn(
                f"{_some(perhaps)}: `.data` was assigned since the last call. `p.data"
                " += t` works; `p.data = t` changes nothing, as DTensor keeps its"
                " local tensor: with torch.no_grad(): p.copy_(t)"
            )

    @undisturbed
    def check_shared(self) -> None:
        """Raise RuntimeError, on every rank, where replicated parameters differ between
        ranks (initialised after the split, say); warn where all ranks' shards are the
        same random numbers. One small exchange; on every rank."""
        present = list(self.present())
        if not present or self.mesh.size() == 1:
            return
        mine = torch.stack([_mark(p).sample for _, p in present]).to(
            self.mesh.device_type
        )
        everyone = all_gather(mine[None], 0, self.mesh.get_group()).cpu()
        alike = (everyone == everyone[:1]).flatten(2).all(-1).all(0).tolist()
        apart, twins = [], []
        for (name, p), same, row in zip(present, alike, everyone[0]):
            if p.placements[0].is_replicate():
                apart += [] if same else [name]
            elif (
                same and len(set(row.tolist())) > SAMPLE // 2
            ):  # random numbers, the same
                twins.append(name)
        if apart:
            raise RuntimeError(
                f"{_some(apart)}: expected the same values on every rank of the tp"
                " group, found others: initialise before apply_tensor_parallel, or"
                " with materialize(model, init) from the meta device"
            )
        if twins:
            warnings.warn(
                f"{_some(twins)}: every rank's shard begins with the same numbers, as"
                " after torch.nn.init on the split model with one seed: initialise"
                " before apply_tensor_parallel, or with materialize(model, init)"
            )


@torch.no_grad()
def _mark(p: DTensor) -> Mark:
    # Bits, so that NaN is equal to itself.
    whole = p.to_local()
    local = whole.flatten()[:SAMPLE]
    sample = torch.zeros(SAMPLE, dtype=torch.float64, device=local.device)
    if local.numel():
        sample[: local.numel()] = (
            torch.view_as_real(local)[..., 0] if local.is_complex() else local
        )
    return Mark(
        p, p.untyped_storage(), whole.untyped_storage(), sample.view(torch.int64)
    )


def _some(names: list[ParamName]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
