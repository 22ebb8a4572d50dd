"""LPIPS, a distance of two pictures (Zhang et al. 2018), over AlexNet or VGG16: version 0.1, linear heads.

Legend: B pairs, C channels, H W height and width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import UsageError
from gesso.evaluation.networks import downloads
from gesso.evaluation.networks.downloads import WeightFile

# Features in the numbering of the weight files: a convolution (channels, kernel, stride, padding), its ReLU after it, or a
# maximum pool (kernel, stride). True: what comes out of the ReLU is compared.
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
BACKBONES = {
    "alex": (ALEXNET_LAYERS, downloads.ALEXNET, downloads.LPIPS_ALEX),
    "vgg": (VGG16_LAYERS, downloads.VGG16, downloads.LPIPS_VGG),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
MIN_SIZE = 32
"""pixels of an edge that leave something to compare after all pools"""


class LPIPS(nn.Module):
    """Distance (B,) of uint8 RGB pictures (B, 3, H, W) and others of the same size; equal ones have 0."""

    def __init__(self, layers: list[tuple], name: str):
        super().__init__()
        self.layers, self.name = layers, name
        self.features, self.heads = nn.ModuleDict(), nn.ModuleDict()
        n, at = 3, 0
        for layer in layers:
            if layer[0] == POOL:
                at += 1
                continue
            n_out, kernel, stride, padding, compared = layer
            self.features[str(at)] = nn.Conv2d(n, n_out, kernel, stride, padding)
            if compared:
                self.heads[str(len(self.heads))] = nn.Conv2d(n_out, 1, 1, bias=False)
            n, at = n_out, at + 2
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def normalized_features(self, images: Tensor) -> list[Tensor]:
        """Features whose channels have length 1 at every place."""
        x, at, found = (images.float() / 127.5 - 1 - self.shift) / self.scale, 0, []
        for layer in self.layers:
            if layer[0] == POOL:
                x, at = F.max_pool2d(x, layer[1], stride=2), at + 1
                continue
            x, at = F.relu(self.features[str(at)](x)), at + 2
            if layer[4]:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Raises UsageError unless both are uint8, RGB, of one size, and that no less than 32x32."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or {a.dtype, b.dtype} != {torch.uint8}:
            raise UsageError(
                f"LPIPS compares uint8 RGB pictures of one size; got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if min(a.shape[2:]) < MIN_SIZE:
            raise UsageError(
                f"LPIPS compares pictures from {MIN_SIZE}x{MIN_SIZE} on; these are {a.shape[2]}x{a.shape[3]}"
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
    """With public weights, frozen; name: alex or vgg. Raises as weights.load."""
    layers, *public = BACKBONES[name]
    trunk, heads = (downloads.load_tensors(file, weights_dir) for file in weight_files or public)
    tensors = {k: v for k, v in trunk.items() if k.startswith("features.")}
    for i in range(5):
        tensors[f"heads.{i}.weight"] = heads.get(f"lin{i}.model.1.weight", torch.empty(0))
    return downloads.load_into(LPIPS(layers, f"LPIPS ({name})"), tensors, f"LPIPS ({name})").to(device)
