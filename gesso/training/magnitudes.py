"""Magnitudes of activations and weights, by resolution or depth, largest and mean (EDM2 Eq. 3, Appendix A.6, Figures 3, 15).

What is looked at are the layers in a network's blocks: matrices and kernels, without biases, gains and tables, and what
they put out, biases and gains included, before any nonlinearity; not a layer that is used in part, as that of the text in
the last block of an mmDiT. Beside them the main path, which is what the blocks themselves put out: in a standard network
norms hide its growth from the layers. The magnitude of a feature is the rms over the positions
of a sample (Eq. 3), of activations its mean over samples; of an output feature's weights it is the rms of their row.

U-Nets have a bucket for each resolution on the way down (enc), at the bottom (mid) and on the way up (dec); of transformers,
which have one resolution, each third of the blocks is one.

Legend: B samples, N features of a layer, M positions.
"""

import torch
from torch import Tensor, nn

from gesso import models
from gesso.training.ranks import SINGLE_PROCESS, Ranks

STAGE_NAMES = {"encoder": "enc", "down": "enc", "middle": "mid", "decoder": "dec", "up": "dec"}
"""by the first part of the name of a U-Net's block"""

MagnitudeBuckets = dict[str, list[float]]
"""[largest, mean] by bucket"""


class Magnitudes:
    """Of a network that is run within `with`; `counts` (B,) bool says which samples of the next pass count, None: all.

    resolution: of the images (latents) that a U-Net was built for, after which buckets are named, whatever is run.
    """

    def __init__(self, net: nn.Module, resolution: int):
        self.net, self.resolution = net, resolution
        names = {module: name for name, module in net.named_modules()}
        self.blocks = {names[block]: block for block in models.list_blocks(net)}
        self.layers = {names[layer]: layer for block in self.blocks.values() for layer in models.weighted_layers(block)}
        self.valid: Tensor | None = None
        self._layer_sums: dict[str, Tensor] = {}  # of layers, (N + 1,) float64: of the magnitudes, and how many
        self._block_sums: dict[str, Tensor] = {}  # of blocks, the same
        self._block_buckets: dict[str, str | None] = {}  # of a U-Net's blocks, in the order they ran
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
        def place(block: nn.Module, inputs: tuple, out: Tensor | tuple) -> None:
            out = out[0] if isinstance(out, tuple) else out
            side = self.resolution * out.shape[2] // self._input_height if out.ndim == 4 else None
            self._block_buckets[name] = None if side is None else f"{STAGE_NAMES[name.partition('.')[0]]} {side}x{side}"
            self._accumulate(self._block_sums, name, out, out.ndim == 4)

        return place

    def _layer_hook(self, name: str):
        def note(layer: nn.Module, inputs: tuple, out: Tensor) -> None:
            # The coefficient of an MP-sum that is folded into the layer is no part of its output.
            self._accumulate(self._layer_sums, name, out, layer.weight.ndim == 4, getattr(layer, "branch_weight", 1.0))

        return note

    def _accumulate(self, sums: dict[str, Tensor], name: str, out: Tensor, is_image: bool, share: float = 1.0) -> None:
        """out: (B, N, H, W) of an image, (B, ..., N) of tokens and vectors; share: a factor in it that is taken out."""
        wide = out.detach().to(torch.promote_types(out.dtype, torch.float32))
        wide = wide.flatten(2) if is_image else wide.reshape(len(wide), -1, wide.shape[-1]).mT
        found = wide.square().mean(dim=2).sqrt() / share  # Eq. 3
        if self.valid is not None:
            found = found[self.valid]
        found = torch.cat([found.sum(dim=0), found.new_tensor([len(found)])]).double()
        sums[name] = sums.get(name, 0) + found

    def activations(self, ranks: Ranks = SINGLE_PROCESS) -> MagnitudeBuckets:
        """What layers put out, in all passes so far, of all ranks."""
        return self._group_by_bucket(_reduce_means(self._layer_sums, ranks))

    def main_path(self, ranks: Ranks = SINGLE_PROCESS) -> MagnitudeBuckets:
        """What blocks put out."""
        return self._group_by_bucket(_reduce_means(self._block_sums, ranks))

    def weights(self, tensors: dict[str, Tensor]) -> MagnitudeBuckets:
        """Of tensors by name, as they are: averages of weights on the sphere lie inside it. After a pass at least."""
        rows = {name: tensors[f"{name}.weight"].detach().flatten(1).double() for name in self._layer_sums}
        return self._group_by_bucket({name: row.square().mean(dim=1).sqrt() for name, row in rows.items()})

    def _group_by_bucket(self, magnitudes: dict[str, Tensor]) -> MagnitudeBuckets:
        """found: (N,) magnitudes by layer."""
        buckets: dict[str, list[Tensor]] = {}
        for block, place in self._bucket_names().items():
            parts = [values for layer, values in magnitudes.items() if layer == block or layer.startswith(f"{block}.")]
            buckets.setdefault(place, []).extend(parts)
        joined = {place: torch.cat(parts) for place, parts in buckets.items() if parts}
        return {place: [_round(values.max()), _round(values.mean())] for place, values in joined.items()}

    def _bucket_names(self) -> dict[str, str]:
        """Bucket of each block that ran."""
        ran = list(self._block_buckets)
        if any(self._block_buckets.values()):
            return {name: place for name, place in self._block_buckets.items() if place}
        edges = [round(i * len(ran) / 3) for i in range(4)]
        names = {}
        for first, stop in zip(edges, edges[1:], strict=False):
            said = f"block {stop}" if stop - first == 1 else f"blocks {first + 1}-{stop}"
            names |= dict.fromkeys(ran[first:stop], said)
        return names


def _reduce_means(sums: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    totals = ranks.all_reduce(torch.cat(list(sums.values()))).split([len(one) for one in sums.values()])
    return {name: total[:-1] / total[-1] for name, total in zip(sums, totals, strict=True)}


def _round(value: Tensor) -> float:
    return float(f"{float(value):.5g}")
