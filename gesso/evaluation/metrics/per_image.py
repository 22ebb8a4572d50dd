"""Metrics that are a mean of one number per image or per seed: CLIPScore, accuracies, conditional diversity."""

from collections.abc import Sequence

from torch import Tensor

from gesso.evaluation.metrics.base import MetricInputs
from gesso.evaluation.networks.toy_networks import CAPTION_CHECKS, CLASS_CHECKS


def mean_score(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the mean of a network with one output."""
    return {name: float(inputs.samples.moments.mean)}


def class_accuracy(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the share of samples that are classified as their label."""
    return match_rates(inputs.samples.features, (name,))


def shape_accuracy(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the share of samples that pass each check of their caption or class."""
    results = inputs.samples.features
    return match_rates(results, CAPTION_CHECKS if results.shape[1] == len(CAPTION_CHECKS) else CLASS_CHECKS)


def match_rates(results: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return the share of 1 among 1 and 0 in each column of results (N, K); 0 for a column that has only -1."""
    counted = results >= 0
    hits = (results * counted).double().sum(dim=0) / counted.sum(dim=0).clamp(min=1)
    return dict(zip(names, hits.tolist(), strict=True))


def size_diversity(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the mean distance between samples of one seed conditioned on different original sizes.

    NAME_hr leaves out sizes below the resolution of the run (Berrada et al. Section 3.1). size_detail is the rms of
    what halving a sample and enlarging it again removes, at the largest size over that at the smallest; 1 if the size
    has no effect. The columns are those of `run_sampler.diversity_distances`.
    """
    *distances, smallest, largest = inputs.samples.moments.mean.tolist()
    detail = (largest / smallest) ** 0.5 if smallest else 1.0
    return dict(zip((name, f"{name}_hr"), distances, strict=False)) | {"size_detail": detail}
