"""Definition of a metric."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from gesso.config import EvalConfig
from gesso.evaluation.feature_stats import FeatureStats, Moments

Need = Literal["reference", "labels", "captions", "validation", "training_images"]
"""reference: features of reference images. labels, captions: those that samples were generated for. validation: losses
of validation images in place of samples. training_images: all of them in memory, for eval.toy_metrics."""


class MetricInputs(NamedTuple):
    """Input of a metric: features of samples and of reference images under its network."""

    samples: FeatureStats
    config: EvalConfig
    reference: FeatureStats = FeatureStats(Moments())
    network: nn.Module | None = None


@dataclass(frozen=True)
class Metric:
    """One metric of samples.

    Attributes:
        name: Name in eval.metrics.
        network: Key in NETWORKS of the network whose features it reads.
        compute: Function of the name and the inputs; returns numbers by name. NAME_std is the spread of NAME.
        labels: Description of each number, for pages.
        lower_is_better: True for distances and losses.
        needs: What it needs besides samples.
        needs_features: It reads the features of every image (N, D), not only their moments.
        sizes: Original sizes in pixels; each seed is sampled once for each size, and the network compares the samples.
        short_label: Label for axes and table heads; "" is the name of the number.
        is_share: True if the numbers are shares from 0 to 1, shown in percent.
    """

    name: str
    network: str
    compute: Callable[[str, MetricInputs], dict[str, float]]
    labels: Mapping[str, str]
    lower_is_better: bool = False
    needs: tuple[Need, ...] = ()
    needs_features: bool = False
    sizes: tuple[int, ...] = ()
    short_label: str = ""
    is_share: bool = False

    @property
    def needs_reference(self) -> bool:
        """True if it compares samples with reference images."""
        return "reference" in self.needs

    @property
    def needs_run(self) -> bool:
        """True if it is computed for runs only, not for a folder of images."""
        return bool(self.sizes or {"labels", "validation"} & set(self.needs))

    @property
    def compares_moments(self) -> bool:
        """True for Frechet distances, whose covariance needs more samples than features."""
        return self.needs_reference and not self.needs_features
