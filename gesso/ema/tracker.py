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
    from torch.distributed.tensor import DTensor  # slow to import, but already imported where a tensor is sharded

    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor.detach()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full; other tensors unchanged. All processes must call it."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor
    # Shards in host memory are moved to the device, where processes can exchange them.
    return cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()


class Tracker:
    """EMAs of named tensors, one per profile, updated in place.

    It works in any training loop: after each optimizer step, or every few steps, call `update(t, t_next)` with the
    numbers of images seen at the last call and now. EMAs start at the given weights theta(0) and have at least 32 bits.
    Sharded tensors have sharded EMAs: every process updates its part.

    Args:
        tensors: The tensors by name.
        profiles: Profiles of the EMAs.
        device: Device of the EMAs; None is that of the tensors.
        copied_names: Tensors to copy instead of averaging them, such as the statistics of a BatchNorm. Integer tensors
            are always copied.
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
        # The EMAs of a tensor follow each other, so that all but the first read it from the processor's cache.
        averages = self.averages.values()
        self._averaged = [k for k, v in tensors.items() if v.is_floating_point() and k not in self.copied_names]
        self._copied = [k for k in tensors if k not in set(self._averaged)]
        self._average_shards = [local_shard(average[k]) for k in self._averaged for average in averages]
        self._copy_shards = [local_shard(average[k]) for k in self._copied for average in averages]
        self.rebind(tensors)

    def rebind(self, tensors: dict[str, Tensor]) -> None:
        """Track other tensors with the same names from now on."""
        self.tensors = {k: v.detach() for k, v in tensors.items()}
        self._averaged_sources = [local_shard(self.tensors[k]) for k in self._averaged]
        self._copied_sources = [local_shard(self.tensors[k]) for k in self._copied for _ in self.averages]

    @torch.no_grad()
    def update(self, t: int, t_next: int) -> None:
        """Advance every EMA from t to t_next images with the current tensors (Eq. 119)."""
        weights, n = [1 - profile.beta(t, t_next) for profile in self.averages], len(self.averages)
        # One copy for all EMAs of a tensor, or none if the tensor has their device and dtype.
        sources = [new.to(old) for new, old in zip(self._averaged_sources, self._average_shards[::n], strict=True)]
        repeated = [tensor for tensor in sources for _ in range(n)]
        torch._foreach_lerp_(self._average_shards, repeated, weights * len(sources))
        for old, new in zip(self._copy_shards, self._copied_sources, strict=True):
            old.copy_(new)


def _average_buffer(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    """Return a copy with at least 32 bits: 16 bits would lose the small steps of an EMA."""
    is_short = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return tensor.to(device or tensor.device, torch.float32 if is_short else tensor.dtype, copy=True)
