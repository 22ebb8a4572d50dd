"""InceptionV3 for the Frechet inception distance: the network of 2015-12-05, with 2,048 features and 1,008 logits.

It differs from InceptionV3 for classification in three points: average pools do not count the padding, the last block
has a maximum pool, and images are resized as in TensorFlow 1, without the shift of half a pixel. Batch normalization is
folded into the convolutions.

Implementations prepare images differently, so their numbers differ: torch-fidelity resizes as TensorFlow 1, like ADM's
evaluator; pytorch-fid resizes between pixel centers and scales to [-1, 1]; NVIDIA publishes a TorchScript.

Legend: B images, C channels, H W height and width.
"""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.errors import RunError, UsageError
from gesso.evaluation.networks import downloads
from gesso.evaluation.networks.base import FeatureNetwork

BATCH_NORM_EPS = 1e-3

# A block is a list of branches whose outputs are concatenated. A branch is a list of layers: (name, channels, kernel,
# stride), a pool, or a list of two layers with one input, whose outputs are concatenated. Convolutions of stride 1 keep
# the size, others are not padded.
LayerSpec = tuple[str, int, int | tuple[int, int], int]
AVG_POOL, MAX_POOL, MAX_POOL_STRIDE_2 = "average", "maximum", "half"


def inception_a(pool_channels: int) -> list:
    """Return the branches of a block at 35x35."""
    return [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
        [AVG_POOL, ("branch_pool", pool_channels, 1, 1)],
    ]


def inception_b() -> list:
    """Return the branches of the block from 35x35 to 17x17."""
    return [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
        [MAX_POOL_STRIDE_2],
    ]


def inception_c(c: int) -> list:
    """Return the branches of a block at 17x17 with c inner channels."""
    across, down = (1, 7), (7, 1)
    return [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", c, 1, 1), ("branch7x7_2", c, across, 1), ("branch7x7_3", 192, down, 1)],
        [
            ("branch7x7dbl_1", c, 1, 1), ("branch7x7dbl_2", c, down, 1), ("branch7x7dbl_3", c, across, 1),
            ("branch7x7dbl_4", c, down, 1), ("branch7x7dbl_5", 192, across, 1),
        ],
        [AVG_POOL, ("branch_pool", 192, 1, 1)],
    ]  # fmt: skip


def inception_d() -> list:
    """Return the branches of the block from 17x17 to 8x8."""
    return [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, (1, 7), 1), ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        [MAX_POOL_STRIDE_2],
    ]  # fmt: skip


def inception_e(pool_kind: str) -> list:
    """Return the branches of a block at 8x8."""
    across, down = (1, 3), (3, 1)
    return [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), [("branch3x3_2a", 384, across, 1), ("branch3x3_2b", 384, down, 1)]],
        [
            ("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1),
            [("branch3x3dbl_3a", 384, across, 1), ("branch3x3dbl_3b", 384, down, 1)],
        ],
        [pool_kind, ("branch_pool", 192, 1, 1)],
    ]  # fmt: skip


STEM: list[LayerSpec | str] = [
    ("Conv2d_1a_3x3", 32, 3, 2), ("Conv2d_2a_3x3", 32, 3, 0), ("Conv2d_2b_3x3", 64, 3, 1), MAX_POOL_STRIDE_2,
    ("Conv2d_3b_1x1", 80, 1, 1), ("Conv2d_4a_3x3", 192, 3, 0), MAX_POOL_STRIDE_2,
]  # fmt: skip
"""Layers before the blocks; stride 0 is stride 1 without padding."""
BLOCKS = {
    "Mixed_5b": inception_a(32), "Mixed_5c": inception_a(64), "Mixed_5d": inception_a(64), "Mixed_6a": inception_b(),
    "Mixed_6b": inception_c(128), "Mixed_6c": inception_c(160), "Mixed_6d": inception_c(160),
    "Mixed_6e": inception_c(192),
    "Mixed_7a": inception_d(), "Mixed_7b": inception_e(AVG_POOL), "Mixed_7c": inception_e(MAX_POOL),
}  # fmt: skip


class InceptionBlock(nn.Module):
    """Concatenate branches: (B, C, H, W) -> (B, out_channels, H', W')."""

    def __init__(self, n_in: int, branches: list):
        super().__init__()
        self.branches = branches
        self.out_channels: int = 0
        for branch in branches:
            n = n_in
            for layer in branch:
                n = (
                    sum(self._add_conv(n, fork) for fork in layer)
                    if isinstance(layer, list)
                    else self._add_conv(n, layer)
                )
            self.out_channels += n

    def _add_conv(self, n_in: int, layer: LayerSpec | str) -> int:
        """Add the convolution of a layer, unless it is a pool, and return the channels after it."""
        if isinstance(layer, str):
            return n_in
        self.add_module(layer[0], build_conv(n_in, layer))
        return layer[1]

    def _apply_layer(self, x: Tensor, layer: LayerSpec | str | list) -> Tensor:
        if isinstance(layer, list):
            return torch.cat([self._apply_layer(x, fork) for fork in layer], dim=1)
        return pool(x, layer) if isinstance(layer, str) else F.relu(self.get_submodule(layer[0])(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return the concatenated outputs of the branches."""
        outputs = []
        for branch in self.branches:
            y = x
            for layer in branch:
                y = self._apply_layer(y, layer)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def build_conv(n_in: int, layer: LayerSpec) -> nn.Conv2d:
    """Return the convolution of a layer."""
    _, n_out, kernel, stride = layer
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (size[0] // 2, size[1] // 2) if stride == 1 else (0, 0)
    return nn.Conv2d(n_in, n_out, size, stride=max(stride, 1), padding=padding)


def pool(x: Tensor, kind: str) -> Tensor:
    """Return x (B, C, H, W) after a 3x3 pool."""
    if kind == AVG_POOL:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    if kind == MAX_POOL:
        return F.max_pool2d(x, 3, stride=1, padding=1)
    return F.max_pool2d(x, 3, stride=2)


class Inception(FeatureNetwork):
    """Map uint8 images (B, 3, H, W) to features (B, 2048) float32, prepared as in torch-fidelity or pytorch-fid."""

    num_features, num_classes = 2048, 1008

    def __init__(self, implementation: str = "torch-fidelity") -> None:
        super().__init__()
        self.preprocess = PREPROCESSING[implementation]
        self.name = "inception-v3-2015-12-05" + (" (pytorch-fid)" if implementation == "pytorch-fid" else "")
        n = 3
        for layer in STEM:
            if not isinstance(layer, str):
                self.add_module(layer[0], build_conv(n, layer))
                n = layer[1]
        for name, branches in BLOCKS.items():
            block = InceptionBlock(n, branches)
            self.add_module(name, block)
            n = block.out_channels
        self.fc = nn.Linear(n, self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 2048). Raises UsageError unless the images are uint8 and RGB."""
        _check_images(images, self.name)
        x = self.preprocess(images)
        for layer in STEM:
            x = pool(x, layer) if isinstance(layer, str) else F.relu(self.get_submodule(layer[0])(x))
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))

    def probabilities(self, features: Tensor) -> Tensor:
        """Return class probabilities (B, 1008) from features, without the bias, as for the inception score."""
        return (features @ self.fc.weight.T).softmax(dim=1)


def resize_tf1(x: Tensor, size: int) -> Tensor:
    """Resize (B, C, H, W) to (B, C, size, size), bilinear as TensorFlow 1: output i is taken at i * H / size."""
    for dim in (2, 3):
        n = x.shape[dim]
        position = torch.arange(size, device=x.device, dtype=x.dtype) * (n / size)
        low = position.floor().long().clamp(max=n - 1)
        fraction = (position - low).reshape((-1, 1) if dim == 2 else (-1,))
        below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = below + (above - below) * fraction
    return x


def preprocess_torch_fidelity(images: Tensor) -> Tensor:
    """Return uint8 images prepared as in torch-fidelity and ADM's graph: resized as TensorFlow 1, (x - 128) / 128."""
    return (resize_tf1(images.float(), 299) - 128) / 128


def preprocess_pytorch_fid(images: Tensor) -> Tensor:
    """Return uint8 images prepared as in pytorch-fid: bilinear between pixel centers, not antialiased, in [-1, 1]."""
    return 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1


PREPROCESSING = {"torch-fidelity": preprocess_torch_fidelity, "pytorch-fid": preprocess_pytorch_fid}


class NvidiaInception(FeatureNetwork):
    """Map uint8 images (B, 3, H, W) to features (B, 2048) float32 with NVIDIA's TorchScript, as EDM2's numbers.

    The script resizes and scales images itself, so its features differ slightly from those of the other two.
    """

    name = "inception-v3-2015-12-05 (nvidia)"
    num_features, num_classes = Inception.num_features, Inception.num_classes

    def __init__(self, script: torch.jit.ScriptModule):
        super().__init__()
        self.script = script

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 2048). Raises UsageError unless the images are uint8 and RGB."""
        _check_images(images, self.name)
        with torch.jit.optimized_execution(False):  # avoids compiling for each batch size
            return self.script(images, return_features=True).float()

    def probabilities(self, features: Tensor) -> Tensor:
        """Return class probabilities (B, 1008) from features, without the bias."""
        shape = (self.num_classes, self.num_features)
        head = next(tensor for tensor in self.script.state_dict().values() if tensor.shape == shape)
        return (features @ head.T).softmax(dim=1)


def _check_images(images: Tensor, name: str) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"{name} reads uint8 RGB images (B, 3, H, W); got {images.dtype} {tuple(images.shape)}")


def load_inception(
    weights_dir: Path | None = None, device: torch.device | str = "cpu", implementation: str = "torch-fidelity"
) -> Inception | NvidiaInception:
    """Return the network with public weights, frozen.

    Args:
        weights_dir: Folder with weight files; None: PyTorch's cache.
        device: Device.
        implementation: Key of downloads.INCEPTION_FILES.

    Raises:
        UsageError: The file is missing.
        RunError: The file has another content.
    """
    file = downloads.INCEPTION_FILES[implementation]
    if implementation in PREPROCESSING:
        return downloads.load_into(
            Inception(implementation), fold_batch_norm(downloads.load_tensors(file, weights_dir)), file.name
        ).to(device)
    path = downloads.verified_path(file, weights_dir)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated
            script = torch.jit.load(path, map_location="cpu")  # a TorchScript, unlike a pickle, cannot run Python
    except RuntimeError as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}") from None
    return NvidiaInception(script).eval().requires_grad_(False).to(device)


def fold_batch_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return X.conv and X.bn as one convolution X: weight g/s and bias b - m g/s, with s = sqrt(variance + eps)."""
    folded = {name: value for name, value in state.items() if name.startswith("fc.")}
    for name in (name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")):
        parts = ("weight", "bias", "running_mean", "running_var")
        if any(f"{name}.bn.{part}" not in state for part in parts):
            continue  # load_into reports it as missing
        norm = {part: state[f"{name}.bn.{part}"] for part in parts}
        factor = norm["weight"].double() / (norm["running_var"].double() + BATCH_NORM_EPS).sqrt()
        folded[f"{name}.weight"] = (state[f"{name}.conv.weight"].double() * factor[:, None, None, None]).float()
        folded[f"{name}.bias"] = (norm["bias"].double() - norm["running_mean"].double() * factor).float()
    return folded
