"""Frechet distance of two sets of features, as Gaussians."""

import torch
from torch import Tensor

from gesso.errors import RunError, UsageError
from gesso.evaluation.metrics.base import MetricInputs


def compute(name: str, inputs: MetricInputs) -> dict[str, float]:
    """Return the Frechet distance between samples and reference."""
    a, b = inputs.samples.moments, inputs.reference.moments
    return {name: frechet_distance(a.mean, a.cov, b.mean, b.cov)}


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    Dowson and Landau (1982); computed in float64 on the CPU.

    Args:
        mean1: Mean (D,).
        cov1: Covariance (D, D) of any rank.
        mean2: Mean (D,).
        cov2: Covariance (D, D) of any rank.

    Raises:
        RunError: An input has NaN or infinity.
        UsageError: The shapes do not match.
    """
    m1, c1, m2, c2 = (torch.as_tensor(t).detach().to("cpu", torch.float64) for t in (mean1, cov1, mean2, cov2))
    d = m1.shape[0] if m1.ndim == 1 else 0
    if d == 0 or m2.shape != (d,) or c1.shape != (d, d) or c2.shape != (d, d):
        shapes = ", ".join(str(tuple(t.shape)) for t in (m1, c1, m2, c2))
        raise UsageError(f"frechet_distance takes means (D,) and covariances (D, D); got {shapes}")
    for label, tensor in {"mean1": m1, "cov1": c1, "mean2": m2, "cov2": c2}.items():
        if not tensor.isfinite().all():
            raise RunError(f"no Frechet distance: {label} has NaN or infinity")
    # tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of S1 C2 S1 = (S1 S2)(S1 S2)^T with S = C^(1/2): the
    # singular values of S1 S2. With them, a rank-deficient C costs an error of eps, not of sqrt(eps).
    trace_root = torch.linalg.svdvals(_sqrtm_psd(c1) @ _sqrtm_psd(c2)).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * trace_root
    return max(float(distance), 0.0)


def _sqrtm_psd(cov: Tensor) -> Tensor:
    """Return the symmetric square root (D, D). Eigenvalues within rounding of zero, or below it, count as zero."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    rounding = len(values) * torch.finfo(cov.dtype).eps * values[-1].clamp(min=0)
    roots = torch.where(values > rounding, values, 0).sqrt()
    return (vectors * roots) @ vectors.T
