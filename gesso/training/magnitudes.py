"""Magnitudes of activations and weights by resolution or depth, largest and mean (EDM2 Eq. 3, A.6, Figures 3, 15).

Measured are the layers in a network's blocks: matrices and kernels without biases, gains and tables, and their outputs
including biases and gains, before any nonlinearity. Layers that are only partly used are left out, such as those of the
text in the last block of an mmDiT. The main path is the output of the blocks themselves: in a standard network, norms
hide its growth from the layers. The magnitude of a feature is the RMS over the positions of a sample (Eq. 3), averaged
over samples for activations; the magnitude of an output feature's weights is the RMS of their row.

U-Nets have one bucket for each resolution of the encoder (enc), the bottom (mid) and the decoder (dec); transformers,
which have one resolution, have one for each third of their blocks.

Legend: B samples, N features of a layer, M positions.
"""

from typing import cast

import torch
from torch import Tensor, nn

from gesso import models
from gesso.training.ranks import SINGLE_PROCESS, Ranks

STAGE_NAMES = {"encoder": "enc", "down": "enc", "middle": "mid", "decoder": "dec", "up": "dec"}
"""Section of a U-Net by the first part of a block's name."""

MagnitudeBuckets = dict[str, list[float]]
"""[largest, mean] by bucket"""


class Magnitudes:
    """Context manager that measures magnitudes in all forward passes of a network.

    Attributes:
        net: The network.
        resolution: Training resolution of x, which names the buckets of a U-Net.
        valid: Samples of the next pass that count, (B,) bool; None for all.
    """

    def __init__(self, net: nn.Module, resolution: int):
        self.net, self.resolution = net, resolution
        names = {module: name for name, module in net.named_modules()}
        self.blocks = {names[block]: block for block in models.list_blocks(net)}
        self.layers = {names[layer]: layer for block in self.blocks.values() for layer in models.weighted_layers(block)}
        self.valid: Tensor | None = None
        self._layer_sums: dict[str, Tensor] = {}  # by layer (N + 1,) float64: sums of magnitudes, and number of samples
        self._block_sums: dict[str, Tensor] = {}  # by block, the same
        self._block_buckets: dict[str, str | None] = {}  # by block in order of execution; None without resolution
        self._input_height = 0

    def __enter__(self) -> "Magnitudes":
        hooks = [self.net.register_forward_pre_hook(self._on_forward)]
        hooks += [block.register_forward_hook(self._block_hook(name)) for name, block in self.blocks.items()]
        hooks += [layer.register_forward_hook(self._layer_hook(name)) for name, layer in self.layers.items()]
        self._hooks = hooks
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_forward(self, net: nn.Module, inputs: tuple) -> None:
        self._input_height = inputs[0].shape[2]

    def _block_hook(self, name: str):
        def record(block: nn.Module, inputs: tuple, out: Tensor | tuple) -> None:
            out = out[0] if isinstance(out, tuple) else out
            self._block_buckets[name] = None
            if out.ndim == 4:
                side = self.resolution * out.shape[2] // self._input_height
                self._block_buckets[name] = f"{STAGE_NAMES[name.partition('.')[0]]} {side}x{side}"
            self._accumulate(self._block_sums, name, out, out.ndim == 4)

        return record

    def _layer_hook(self, name: str):
        def record(layer: nn.Module, inputs: tuple, out: Tensor) -> None:
            # A layer may apply the coefficient of the following MP-sum, which is not part of its magnitude.
            is_image = cast(Tensor, layer.weight).ndim == 4
            self._accumulate(self._layer_sums, name, out, is_image, getattr(layer, "branch_weight", 1.0))

        return record

    def _accumulate(self, sums: dict[str, Tensor], name: str, out: Tensor, is_image: bool, factor: float = 1.0) -> None:
        """Add the magnitudes of one output.

        Args:
            sums: Sums by layer, changed in place.
            name: Name of the layer.
            out: (B, N, H, W) for images, (B, ..., N) for tokens and vectors.
            is_image: True for (B, N, H, W).
            factor: Constant factor in `out` that is divided out.
        """
        values = out.detach().to(torch.promote_types(out.dtype, torch.float32))
        values = values.flatten(2) if is_image else values.reshape(len(values), -1, values.shape[-1]).mT  # (B, N, M)
        magnitude = values.square().mean(dim=2).sqrt() / factor  # Eq. 3
        if self.valid is not None:
            magnitude = magnitude[self.valid]
        magnitude = torch.cat([magnitude.sum(dim=0), magnitude.new_tensor([len(magnitude)])]).double()
        sums[name] = sums.get(name, 0) + magnitude

    def activations(self, ranks: Ranks = SINGLE_PROCESS) -> MagnitudeBuckets:
        """Return the magnitudes of layer outputs over all passes so far and all ranks."""
        return self._group_by_bucket(_reduce_means(self._layer_sums, ranks))

    def main_path(self, ranks: Ranks = SINGLE_PROCESS) -> MagnitudeBuckets:
        """Return the magnitudes of block outputs over all passes so far and all ranks."""
        return self._group_by_bucket(_reduce_means(self._block_sums, ranks))

    def weights(self, tensors: dict[str, Tensor]) -> MagnitudeBuckets:
        """Return the magnitudes of weights by name, without normalization; needs at least one pass.

        EMAs of normalized weights have a smaller norm than the weights.
        """
        rows = {name: tensors[f"{name}.weight"].detach().flatten(1).double() for name in self._layer_sums}
        return self._group_by_bucket({name: row.square().mean(dim=1).sqrt() for name, row in rows.items()})

    def _group_by_bucket(self, magnitudes: dict[str, Tensor]) -> MagnitudeBuckets:
        """Return magnitudes (N,) by layer as largest and mean by bucket."""
        buckets: dict[str, list[Tensor]] = {}
        for block, bucket in self._bucket_names().items():
            parts = [values for layer, values in magnitudes.items() if layer == block or layer.startswith(f"{block}.")]
            buckets.setdefault(bucket, []).extend(parts)
        joined = {bucket: torch.cat(parts) for bucket, parts in buckets.items() if parts}
        return {bucket: [_round(values.max()), _round(values.mean())] for bucket, values in joined.items()}

    def _bucket_names(self) -> dict[str, str]:
        """Return the bucket of each block that was executed."""
        blocks = list(self._block_buckets)
        if any(self._block_buckets.values()):
            return {block: bucket for block, bucket in self._block_buckets.items() if bucket}
        edges = [round(i * len(blocks) / 3) for i in range(4)]
        names: dict[str, str] = {}
        for start, stop in zip(edges, edges[1:], strict=False):
            bucket = f"block {stop}" if stop - start == 1 else f"blocks {start + 1}-{stop}"
            names |= dict.fromkeys(blocks[start:stop], bucket)
        return names


def _reduce_means(sums: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    totals = ranks.all_reduce(torch.cat(list(sums.values()))).split([len(layer_sums) for layer_sums in sums.values()])
    return {name: total[:-1] / total[-1] for name, total in zip(sums, totals, strict=True)}


def _round(value: Tensor) -> float:
    return float(f"{float(value):.5g}")
