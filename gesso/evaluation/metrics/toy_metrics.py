"""Judges without weights from elsewhere: what digits and drawn shapes show beside what they were to show.

Legend: B pictures, K questions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gesso.errors import UsageError
from gesso.evaluation.metrics import shapes_reader
from gesso.evaluation.networks.toy_networks import DigitFeatures, FashionFeatures

CAPTION_CHECKS = ("colour", "kind", "pair", "place", "side", "relation", "all", "sided", "flipped", "border")
CLASS_CHECKS = ("kind", "all", "border")
"""questions that are asked of a picture drawn for a caption, for a class"""


class ClassAccuracy(nn.Module):
    """Share of samples that a classifier assigns to their class: RGB (B, 3, H, W) uint8 and labels (B,) -> (B, 1) of 0 and 1."""

    num_features = 1

    def __init__(self, network: DigitFeatures | FashionFeatures):
        super().__init__()
        self.network, self.name = network, network.name
        self.checks = ("class_agreement",)

    def forward(self, images: Tensor, labels: Sequence[int], captions: Sequence[str] | None) -> Tensor:
        _, logits = self.network.classify(images[:, :1])
        return (logits.argmax(dim=1).cpu() == torch.tensor(list(labels)))[:, None].float()


class FeatureDistance(nn.Module):
    """How far two samples are apart that were told different sizes: Euclidean, in the features of digits. Not LPIPS."""

    def __init__(self, network: DigitFeatures):
        super().__init__()
        self.network, self.name = network, network.name

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """RGB (B, 3, 8, 8) uint8 each -> (B,)."""
        return (self.network(a[:, :1]) - self.network(b[:, :1])).norm(dim=1)


class ShapeAccuracy(nn.Module):
    """Whether shapes are drawn as their caption or class says: (B, K) of 0 and 1, -1 where it says nothing."""

    name = "shapes read back"

    def __init__(self, has_captions: bool):
        super().__init__()
        self.has_captions, self.checks = has_captions, CAPTION_CHECKS if has_captions else CLASS_CHECKS
        self.num_features = len(self.checks)

    def forward(self, images: Tensor, labels: Sequence[int], captions: Sequence[str] | None) -> Tensor:
        """Raises UsageError for captions that are not those of shapes."""
        found = shapes_reader.detect_shapes(images.cpu())
        if self.has_captions:
            if captions is None:
                raise UsageError("shapes are read beside captions, and there are none")
            rows = [shapes_reader.check_caption(caption, some) for caption, some in zip(captions, found, strict=True)]
        else:
            rows = [shapes_reader.check_class(label, some) for label, some in zip(labels, found, strict=True)]
        return torch.tensor(
            [[-1 if row[name] is None else int(row[name]) for name in self.checks] for row in rows]
        ).float()


def mean_rates(network: ClassAccuracy | ShapeAccuracy, results: Tensor) -> dict[str, float]:
    """By question: the share that holds among those asked; 0 among none."""
    asked = results >= 0
    return {
        name: float((results[:, k] * asked[:, k]).sum() / asked[:, k].sum().clamp(min=1))
        for k, name in enumerate(network.checks)
    }
