"""Interface of the feature networks.

Legend: B images in a batch, D features.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class SampleConditions(NamedTuple):
    """Labels and captions that the images of a batch were generated for, or None."""

    labels: Sequence[int] | None = None
    captions: Sequence[str] | None = None


class FeatureNetwork(nn.Module):
    """Map uint8 images (B, C, H, W) to features.

    Attributes:
        name: Network and implementation; recorded with every number.
        num_features: Number of features D.
    """

    name: str
    num_features: int

    def extract_features(self, images: Tensor, conditions: SampleConditions) -> Tensor:
        """Return the features (B, D) of images, on the CPU."""
        return self(images).cpu()
