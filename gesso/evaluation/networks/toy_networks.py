"""Small networks for digits, Fashion-MNIST and drawn shapes, whose weights ship with gesso.

Their Frechet distances are not FID: network, images and scale differ. `tools/train_*_features.py` train the weights.

Legend: B images in a batch, D features (64), K classes or checks.
"""

import hashlib
from collections.abc import Callable
from importlib import resources

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gesso.data.shapes_dataset import COLOURS, KINDS
from gesso.errors import RunError, UsageError
from gesso.evaluation.networks import shapes_reader
from gesso.evaluation.networks.base import FeatureNetwork, SampleConditions

DIGITS_FILE = "digits.safetensors"
DIGITS_SHA256 = "27d7c9f06727feae0ebbea09cc4434690583994706ce5e1bbfe7bc8e0175f7a1"
FASHION_FILE = "fashion.safetensors"
FASHION_SHA256 = "8efad20e198d18db8ed92e57f9300c381254caafebbbf7392584d59a7e65072e"
SHAPES_FILE = "shapes.safetensors"
SHAPES_SHA256 = "69d0bbf4749f84b63abb77607ffe393d5c0892279e6c320dcce9ae86448cec8d"
CAPTION_CHECKS = ("colour", "kind", "pair", "place", "side", "relation", "all", "sided", "flipped", "border")
CLASS_CHECKS = ("kind", "all", "border")
"""Checks of an image drawn for a caption, and for a class (`shapes_reader.check_caption` and `check_class`)."""


class DigitFeatures(FeatureNetwork):
    """Map uint8 grayscale digits (B, 1, 8, 8), (B, 3, 8, 8) or (B, 8, 8) to features (B, D) float32.

    There is no normalization layer, so the features of an image do not depend on the rest of its batch, and a change
    of its contrast changes them.
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
        """Return features (B, D). Raises UsageError unless the images are uint8, grayscale and 8x8."""
        x = _check_grayscale(images, self.resolution, self.name).float() / 127.5 - 1
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.silu(conv(x))
        # SiLU has no upper bound: features of images far from the digits keep moving away.
        return F.silu(self.hidden(x.flatten(1)))

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, D) and class logits (B, K)."""
        features = self(images)
        return features, self.head(features)


class FashionFeatures(FeatureNetwork):
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
        x = _check_grayscale(images, self.resolution, self.name).float() / 127.5 - 1
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.silu(conv(x))
        return F.silu(self.hidden(x.flatten(1)))

    def classify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, D) and class logits (B, K). Raises UsageError as `forward` does."""
        features = self(images)
        return features, self.head(features)


Classifier = DigitFeatures | FashionFeatures


class LabelMatch(FeatureNetwork):
    """Check whether a classifier assigns RGB images to their labels: (B, 1), 1 for a match and 0 otherwise."""

    def __init__(self, network: Classifier):
        super().__init__()
        self.network, self.name, self.num_features = network, network.name, 1

    def extract_features(self, images: Tensor, conditions: SampleConditions) -> Tensor:
        """Return matches (B, 1) float32. Raises RunError if logits are NaN."""
        logits = self.network.classify(images)[1].cpu()
        if num_nan := int(logits.isnan().any(dim=1).sum()):
            raise RunError(f"no class accuracy: the logits of {num_nan} of {len(logits)} images are NaN")
        assert conditions.labels is not None  # Metric.needs has labels
        return (logits.argmax(dim=1) == torch.tensor(list(conditions.labels)))[:, None].float()


class DigitDistance(FeatureNetwork):
    """Measure the Euclidean distance between the features of two batches of digits."""

    num_features = 1

    def __init__(self, device: str | torch.device = "cpu"):
        super().__init__()
        self.network = load_digit_features(device)
        self.name = self.network.name

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance (B,) between RGB digits, two tensors (B, 3, 8, 8) uint8."""
        return (self.network(a) - self.network(b)).norm(dim=1)


class ShapeFeatures(FeatureNetwork):
    """Map uint8 RGB images (B, 3, R, R) to features (B, D) float32.

    R is a multiple of 32, and images are averaged over squares of R/32 pixels; or R is 16, and each pixel is repeated
    2x2.
    """

    name = "shapes-cnn-v1"
    resolution, num_features = 32, 64
    num_classes = len(KINDS) * len(COLOURS)
    """Number of outputs: one for each kind and colour, whether such a shape is in the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(48, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, self.num_features)
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D). Raises UsageError for images of another shape or dtype."""
        c, height, width = images.shape[1:]
        half = self.resolution // 2
        if c != 3 or height != width or (height != half and height % self.resolution) or images.dtype != torch.uint8:
            raise UsageError(
                f"{self.name} reads square uint8 RGB images whose edge is {half} or a multiple of {self.resolution}; "
                f"got {c}x{height}x{width}, {images.dtype}"
            )
        x = images.float() / 127.5 - 1
        x = F.interpolate(x, scale_factor=2) if height == half else F.avg_pool2d(x, height // self.resolution)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.silu(conv(x))
        return F.silu(self.hidden(x.flatten(1)))


class ShapeMatch(FeatureNetwork):
    """Check drawn shapes against captions or classes: (B, K) of 1 and 0, or -1 where the caption makes no claim."""

    name, num_features = "shapes reader", len(CAPTION_CHECKS)

    def extract_features(self, images: Tensor, conditions: SampleConditions) -> Tensor:
        """Return CAPTION_CHECKS of each image, or CLASS_CHECKS without captions.

        Raises:
            UsageError: A caption does not describe shapes.
        """
        labels, captions = conditions
        detected = shapes_reader.detect_shapes(images.cpu())
        checks: tuple[str, ...]
        if captions is not None:
            checks = CAPTION_CHECKS
            rows = [shapes_reader.check_caption(text, shapes) for text, shapes in zip(captions, detected, strict=True)]
        else:
            assert labels is not None  # Metric.needs has labels
            checks = CLASS_CHECKS
            rows = [dict(shapes_reader.check_class(i, shapes)) for i, shapes in zip(labels, detected, strict=True)]
        return torch.tensor(
            [[-1 if row[check] is None else int(row[check] or 0) for check in checks] for row in rows]
        ).float()


def load_digit_features(device: str | torch.device = "cpu") -> DigitFeatures:
    """Return the network for digits, frozen.

    Raises:
        RunError: Its weight file is missing or has another content.
    """
    network = DigitFeatures()
    network.load_state_dict(_load_weights(network.name, DIGITS_FILE, DIGITS_SHA256))
    return network.requires_grad_(False).eval().to(device)


def load_fashion_features(device: str | torch.device = "cpu") -> FashionFeatures:
    """Return the frozen classifier of Fashion-MNIST. Raises RunError if its file is missing or altered."""
    network = FashionFeatures()
    network.load_state_dict(_load_weights(network.name, FASHION_FILE, FASHION_SHA256))
    return network.requires_grad_(False).eval().to(device)


CLASSIFIERS: dict[tuple[int, int], Callable[..., Classifier]] = {
    (8, 8): load_digit_features,
    (28, 28): load_fashion_features,
}
"""Loaders of classifiers by height and width of the images that they read."""


def load_classifier(size: tuple[int, int], device: str | torch.device = "cpu") -> Classifier:
    """Return the classifier of images of a size (height, width). Raises UsageError if there is none."""
    if size not in CLASSIFIERS:
        known = ", ".join(f"{width}x{height}" for height, width in CLASSIFIERS)
        raise UsageError(f"gesso has no classifier of {size[1]}x{size[0]} images, only of {known}")
    return CLASSIFIERS[size](device)


def load_shape_features(device: str | torch.device = "cpu") -> ShapeFeatures:
    """Return the network for drawn shapes, frozen. Raises as `load_digit_features`."""
    network = ShapeFeatures()
    network.load_state_dict(_load_weights(network.name, SHAPES_FILE, SHAPES_SHA256))
    return network.requires_grad_(False).eval().to(device)


def _load_weights(name: str, file: str, sha256: str) -> dict[str, Tensor]:
    """Return the weights in a file of this package."""
    path = f"gesso/evaluation/networks/{file}"
    try:
        content = resources.files("gesso.evaluation.networks").joinpath(file).read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing from this installation: install gesso again") from error
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise RunError(
            f"{path} is not the file of {name}, so its numbers would not compare: its sha256 is {actual},\n"
            f"expected {sha256}. Install gesso again"
        )
    return {key: value.float() for key, value in safetensors.torch.load(content).items()}


def _check_grayscale(images: Tensor, resolution: int, name: str) -> Tensor:
    """Return images (B, 1, R, R). Raises UsageError for another shape or dtype, or for colour."""
    x = images.unsqueeze(1) if images.ndim == 3 else images
    if x.ndim != 4 or x.shape[1] not in (1, 3) or tuple(x.shape[2:]) != (resolution, resolution):
        raise UsageError(
            f"{name} reads (B, 1, {resolution}, {resolution}), (B, 3, {resolution}, {resolution}) or "
            f"(B, {resolution}, {resolution}); got {tuple(images.shape)}"
        )
    if x.dtype != torch.uint8:
        raise UsageError(f"{name} reads uint8 pixels from 0 to 255; got {images.dtype}")
    if x.shape[1] == 3 and not (x == x[:, :1]).all():
        raise UsageError(f"{name} reads grayscale images, but these have colour")
    return x[:, :1]
