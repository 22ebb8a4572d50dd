"""Inception score."""

import torch
from torch import Tensor

from gesso.errors import UsageError
from gesso.evaluation.metrics.base import MetricInputs
from gesso.evaluation.metrics.precision_recall import shuffle
from gesso.evaluation.networks.inception import Inception, NvidiaInception


def compute(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the inception score of samples, and its standard deviation over splits."""
    network, features = inputs.network, inputs.samples.features
    assert isinstance(network, Inception | NvidiaInception)
    probabilities = network.probabilities(features.to(next(network.parameters()).device)).cpu()
    mean, std = inception_score(shuffle(probabilities))
    return {name: mean, f"{name}_std": std}


def inception_score(probabilities: Tensor, num_splits: int = 10) -> tuple[float, float]:
    """Return exp E KL(p(y|x) || p(y)) (Salimans et al. 2016): mean and standard deviation over splits.

    Args:
        probabilities: Class probabilities (N, K) of samples in random order.
        num_splits: Number of splits.

    Raises:
        UsageError: There are fewer samples than splits.
    """
    if len(probabilities) < num_splits:
        raise UsageError(
            f"inception_score takes at least one sample for each of {num_splits} splits; got {len(probabilities)}"
        )
    p = probabilities.to("cpu", torch.float64)
    scores = []
    for i in range(num_splits):
        part = p[len(p) * i // num_splits : len(p) * (i + 1) // num_splits]
        # KL(p || m) = sum p log p - sum p log m, with 0 log 0 = 0.
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(dim=0))
        scores.append(float(divergence.sum(dim=1).mean().exp()))
    values = torch.tensor(scores, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))
