"""LPIPS, a distance between two images (Zhang et al. 2018), with AlexNet or VGG16: version 0.1, linear heads.

Legend: B pairs, C channels, H W height and width.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import UsageError
from gesso.evaluation.networks import downloads
from gesso.evaluation.networks.base import FeatureNetwork
from gesso.evaluation.networks.downloads import WeightFile

# Layers in the order of the weight files: a convolution (channels, kernel, stride, padding, compared) with a ReLU, or a
# maximum pool (kernel) of stride 2. The outputs of ReLUs with compared=True enter the distance.
POOL = "pool"
ALEXNET_LAYERS = [
    (64, 11, 4, 2, True), (POOL, 3), (192, 5, 1, 2, True), (POOL, 3), (384, 3, 1, 1, True), (256, 3, 1, 1, True),
    (256, 3, 1, 1, True),
]  # fmt: skip
VGG16_LAYERS = [
    (64, 3, 1, 1, False), (64, 3, 1, 1, True), (POOL, 2), (128, 3, 1, 1, False), (128, 3, 1, 1, True), (POOL, 2),
    (256, 3, 1, 1, False), (256, 3, 1, 1, False), (256, 3, 1, 1, True), (POOL, 2),
    (512, 3, 1, 1, False), (512, 3, 1, 1, False), (512, 3, 1, 1, True), (POOL, 2),
    (512, 3, 1, 1, False), (512, 3, 1, 1, False), (512, 3, 1, 1, True),
]  # fmt: skip


class Backbone(NamedTuple):
    """A network of LPIPS: its layers, and the files of the backbone and of the heads."""

    layers: list[tuple]
    weight_files: tuple[WeightFile, WeightFile]


BACKBONES = {
    "alex": Backbone(ALEXNET_LAYERS, (downloads.ALEXNET, downloads.LPIPS_ALEX)),
    "vgg": Backbone(VGG16_LAYERS, (downloads.VGG16, downloads.LPIPS_VGG)),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MIN_SIZE = 32
"""Smallest edge in pixels: smaller images vanish in the pools."""


class LPIPS(FeatureNetwork):
    """Map two batches of uint8 RGB images (B, 3, H, W) to their distances (B,); equal images have 0."""

    num_features = 1
    shift: Tensor
    scale: Tensor

    def __init__(self, layers: list[tuple], name: str):
        super().__init__()
        self.layers, self.name = layers, name
        self.features, self.heads = nn.ModuleDict(), nn.ModuleDict()
        n_in, index = 3, 0  # index of the layer in the weight file
        for layer in layers:
            if layer[0] == POOL:
                index += 1
                continue
            n_out, kernel, stride, padding, compared = layer
            self.features[str(index)] = nn.Conv2d(n_in, n_out, kernel, stride, padding)
            if compared:
                self.heads[str(len(self.heads))] = nn.Conv2d(n_out, 1, 1, bias=False)
            n_in, index = n_out, index + 2
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def normalized_features(self, images: Tensor) -> list[Tensor]:
        """Return the compared features (B, C, H, W), whose channels have length 1 at every position."""
        x, index, compared = (images.float() / 127.5 - 1 - self.shift) / self.scale, 0, []
        for layer in self.layers:
            if layer[0] == POOL:
                x, index = F.max_pool2d(x, layer[1], stride=2), index + 1
                continue
            x, index = F.relu(self.features[str(index)](x)), index + 2
            if layer[4]:
                compared.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return compared

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return distances (B,). Raises UsageError unless both are uint8 RGB of one size, at least 32x32."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or {a.dtype, b.dtype} != {torch.uint8}:
            raise UsageError(f"LPIPS compares uint8 RGB images of one size; got {tuple(a.shape)} and {tuple(b.shape)}")
        if min(a.shape[2:]) < MIN_SIZE:
            raise UsageError(
                f"LPIPS compares images of {MIN_SIZE}x{MIN_SIZE} or more; these are {a.shape[2]}x{a.shape[3]}"
            )
        total = torch.zeros(len(a), device=a.device)
        for head, x, y in zip(
            self.heads.values(), self.normalized_features(a), self.normalized_features(b), strict=True
        ):
            total = total + head((x - y).square()).mean(dim=(1, 2, 3))
        return total


def load_lpips(
    name: str = "alex",
    weights_dir: Path | None = None,
    device: torch.device | str = "cpu",
    weight_files: tuple[WeightFile, WeightFile] | None = None,
) -> LPIPS:
    """Return LPIPS with public weights, frozen.

    Args:
        name: Network, alex or vgg.
        weights_dir: Folder with weight files; None: PyTorch's cache.
        device: Device.
        weight_files: Files of the backbone and of the heads; None: the public ones.

    Raises:
        UsageError: A file is missing.
        RunError: A file has another content.
    """
    layers, public_files = BACKBONES[name]
    backbone, heads = (downloads.load_tensors(file, weights_dir) for file in weight_files or public_files)
    tensors = {k: v for k, v in backbone.items() if k.startswith("features.")}
    for i in range(5):
        tensors[f"heads.{i}.weight"] = heads.get(f"lin{i}.model.1.weight", torch.empty(0))
    return downloads.load_into(LPIPS(layers, f"LPIPS ({name})"), tensors, f"LPIPS ({name})").to(device)
