"""Features of 8x8 grey digits and of drawn shapes for a Frechet distance: the penultimate layers of small classifiers.

Not FID: other networks, other images, another scale. `name` goes beside every number made with them.
tools/train_digit_features.py and tools/train_shape_features.py make the weights. B images, D = 64 features, K classes.
"""

import hashlib
from importlib import resources

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gesso.data.shapes_dataset import COLOURS, KINDS
from gesso.errors import RunError, UsageError

DIGITS_FILE = "digits.safetensors"
DIGITS_SHA256 = "27d7c9f06727feae0ebbea09cc4434690583994706ce5e1bbfe7bc8e0175f7a1"
FASHION_FILE = "fashion.safetensors"
FASHION_SHA256 = "8efad20e198d18db8ed92e57f9300c381254caafebbbf7392584d59a7e65072e"
SHAPES_FILE = "shapes.safetensors"
SHAPES_SHA256 = "69d0bbf4749f84b63abb77607ffe393d5c0892279e6c320dcce9ae86448cec8d"


class DigitFeatures(nn.Module):
    """uint8 (B, 1, 8, 8) or (B, 8, 8), 0 to 255 -> float32 (B, D).

    No normalization layer: the features of an image depend neither on the rest of its batch nor on a mode,
    and a change of its contrast stays visible in them.
    """

    name = "digits-cnn-v1"
    resolution, num_features, num_classes = 8, 64, 10

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 24, 3, padding=1)
        self.conv3 = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, self.num_features)
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features, float32 (B, D). Raises UsageError unless the images are uint8, grey and 8x8."""
        x = _check_images(images, self.resolution, self.name).float() / 127.5 - 1
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.silu(conv(x))
        # SiLU has no upper bound: features of images far from the digits keep moving away.
        return F.silu(self.hidden(x.flatten(1)))

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) and class logits (B, K), float32. Raises UsageError as `forward` does."""
        features = self(images)
        return features, self.head(features)


class FashionFeatures(nn.Module):
    """Classifier of Fashion-MNIST, trained on its 10,000 test images: uint8 (B, 1, 28, 28) -> float32 (B, D).

    The training images, which runs learn from and are compared with, are unseen by it. No normalization layer, as in
    DigitFeatures.
    """

    name = "fashion-cnn-v1"
    resolution, num_features, num_classes = 28, 64, 10

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.conv4 = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 7 * 7, self.num_features)
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D). Raises UsageError unless the images are uint8, grey and 28x28."""
        x = _check_images(images, self.resolution, self.name).float() / 127.5 - 1
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.silu(conv(x))
        return F.silu(self.hidden(x.flatten(1)))

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, D) and class logits (B, K). Raises UsageError as `forward` does."""
        features = self(images)
        return features, self.head(features)


class GreyFeatures(nn.Module):
    """Features of digits in RGB pictures that are grey. Raises UsageError for colour."""

    def __init__(self, network: DigitFeatures | FashionFeatures):
        super().__init__()
        self.network, self.name, self.num_features = network, network.name, network.num_features

    def forward(self, images: Tensor) -> Tensor:
        if not (images == images[:, :1]).all():
            raise UsageError(f"{self.name} reads grey pictures; these have colour")
        return self.network(images[:, :1])


class ShapeFeatures(nn.Module):
    """uint8 RGB (B, 3, R, R) -> float32 (B, D). R a multiple of 32: averaged over squares of R/32 pixels; or 16: each pixel
    is four."""

    name = "shapes-cnn-v1"
    resolution, num_features = 32, 64
    num_classes = len(KINDS) * len(COLOURS)
    """whether there is a shape of this kind and colour"""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, self.num_features)
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features, float32 (B, D). Raises UsageError for pictures of another shape."""
        c, height, width = images.shape[1:]
        half = self.resolution // 2
        if c != 3 or height != width or (height != half and height % self.resolution) or images.dtype != torch.uint8:
            raise UsageError(
                f"{self.name} reads uint8 RGB squares whose edge is {half} or a multiple of {self.resolution}; got {c}x{height}x{width}, {images.dtype}"
            )
        x = images.float() / 127.5 - 1
        x = F.interpolate(x, scale_factor=2) if height == half else F.avg_pool2d(x, height // self.resolution)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.silu(conv(x))
        return F.silu(self.hidden(x.flatten(1)))


def load_digit_features(device: str | torch.device = "cpu") -> DigitFeatures:
    """The shipped network, frozen. Raises RunError when its file is missing or not the one recorded here."""
    network = DigitFeatures()
    network.load_state_dict(_load_weights(network.name, DIGITS_FILE, DIGITS_SHA256))
    return network.requires_grad_(False).eval().to(device)


def load_fashion_features(device: str | torch.device = "cpu") -> FashionFeatures:
    """Return the frozen classifier of Fashion-MNIST. Raises RunError if its file is missing or altered."""
    network = FashionFeatures()
    network.load_state_dict(_load_weights(network.name, FASHION_FILE, FASHION_SHA256))
    return network.requires_grad_(False).eval().to(device)


def load_shape_features(device: str | torch.device = "cpu") -> ShapeFeatures:
    """As load_digit_features."""
    network = ShapeFeatures()
    network.load_state_dict(_load_weights(network.name, SHAPES_FILE, SHAPES_SHA256))
    return network.requires_grad_(False).eval().to(device)


def _load_weights(name: str, file: str, sha256: str) -> dict[str, Tensor]:
    """The weights in a file of this package."""
    try:
        content = resources.files("gesso.evaluation.networks").joinpath(file).read_bytes()
    except FileNotFoundError as error:
        raise RunError(
            f"gesso/evaluation/networks/{file} is missing from this installation; install gesso again"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise RunError(
            f"gesso/evaluation/networks/{file} is not the file that {name} names: sha256 {found},\n"
            f"expected {sha256}. Its numbers would compare with no others; install gesso again."
        )
    return {key: value.float() for key, value in safetensors.torch.load(content).items()}


def _check_images(images: Tensor, resolution: int, name: str) -> Tensor:
    """(B, 1, R, R), or a UsageError."""
    x = images.unsqueeze(1) if images.ndim == 3 else images
    if x.ndim != 4 or tuple(x.shape[1:]) != (1, resolution, resolution):
        raise UsageError(
            f"{name} reads (B, 1, {resolution}, {resolution}) or (B, {resolution}, {resolution}), "
            f"one grey channel; got {tuple(images.shape)}"
        )
    if x.dtype != torch.uint8:
        raise UsageError(f"{name} reads uint8 pixels from 0 to 255; got {images.dtype}")
    return x
