"""EMAs tracked during training (EDM2 Eq. 119)."""

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor

from gesso.ema.profiles import Profile


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor (FSDP2's DTensor); other tensors unchanged."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.detach()
    from torch.distributed.tensor import DTensor  # slow to import, and loaded already where there is one

    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full, in which all processes take part; other tensors unchanged."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    # Shards in the host's memory go back to where processes exchange them.
    if not isinstance(tensor, DTensor):
        return tensor
    return cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()


class Tracker:
    """EMAs of named tensors, one per profile, updated in place.

    Usable in any training loop: after each optimizer step, or every few, call `update(t, t_next)` with the images seen
    at the last call and now. EMAs start at the given weights theta(0) and have at least 32 bits. Sharded tensors have
    sharded EMAs: every process updates its own part. Integer tensors are copied, and so are those in `copied_names`
    (buffers such as the statistics of a BatchNorm). device: device of the EMAs; None: that of the tensors.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        profiles: Sequence[Profile],
        device: torch.device | str | None = None,
        copied_names: Collection[str] = (),
    ):
        self.copied_names = frozenset(copied_names)
        self.averages = {
            profile: {k: _average_buffer(v.detach(), device) for k, v in tensors.items()} for profile in profiles
        }
        # Looked up once: a step does nothing but move them. The averages of a tensor follow one another, so that it
        # is read from the cache for all but the first.
        self._averaged_floats, self._copied_ints = (
            [
                local_shard(average[k])
                for k, v in tensors.items()
                if self._is_averaged(k, v) is real
                for average in self.averages.values()
            ]
            for real in (True, False)
        )
        self.rebind(tensors)

    def _is_averaged(self, name: str, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and name not in self.copied_names

    def rebind(self, tensors: dict[str, Tensor]) -> None:
        """Track other tensors from now on, with the same names."""
        self.tensors = {k: v.detach() for k, v in tensors.items()}
        self._source_floats, self._source_ints = (
            [
                part
                for k, v in self.tensors.items()
                if self._is_averaged(k, v) is real
                for part in [local_shard(v)] * len(self.averages)
            ]
            for real in (True, False)
        )

    @torch.no_grad()
    def update(self, t: int, t_next: int) -> None:
        """Advance every EMA from t to t_next images with the current weights (Eq. 119)."""
        weights = [1 - profile.beta(t, t_next) for profile in self.averages]
        # A live tensor itself where device and dtype are those of its average; one copy for all averages where not.
        n = len(weights)
        near = [new.to(old) for new, old in zip(self._source_floats[::n], self._averaged_floats[::n], strict=True)]
        live = [tensor for tensor in near for _ in range(n)]
        torch._foreach_lerp_(self._averaged_floats, live, weights * len(near))
        for old, new in zip(self._copied_ints, self._source_ints, strict=True):
            old.copy_(new)


def _average_buffer(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """Return a copy with at least 32 bits: 16 bits would lose the small steps of an EMA."""
    small = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.to(device or tensor.device, torch.float32 if small else tensor.dtype, copy=True)
