"""Power-function averages of weights and any other length from them afterwards (EDM2 Section 3, Appendix C).

Legend: t time in images, gamma exponent of the profile p(t) ~ t^gamma, sigma_rel its relative standard
deviation, theta weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Exponent of the power profile of a relative length (EDM2 Eq. 126, Algorithm 2).

    Raises ValueError outside (0, 12^-1/2), where no profile with gamma > 0 exists.
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"an EMA length sigma_rel lies between 0 and {12**-0.5:.4f}, not {sigma_rel}")
    t = float(sigma_rel) ** -2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_beta(gamma: float, t: float, t_next: float) -> float:
    """Weight that the old average keeps when time goes from t to t_next, any step apart (Eq. 127)."""
    return (t / t_next) ** (gamma + 1)


def inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """<p_a, p_b> of power profiles (Eq. 151); the arguments broadcast."""
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    ratio = (t_a / t_b) ** exponent
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def solve(t: Sequence[float], gamma: Sequence[float], t_target: float, gamma_target: float) -> tuple[np.ndarray, float]:
    """Coefficients x of the stored averages for the target profile, and its squared relative error.

    Least squares between profiles (Eq. 141), then rescaled to sum to 1, as the published code does. The
    error is |p* - p|^2 / |p|^2 of the profiles after rescaling. Raises ValueError when nothing is stored
    up to t_target.
    """
    t, gamma = np.asarray(t, np.float64), np.asarray(gamma, np.float64)
    if not len(t) or t.min() > t_target:
        raise ValueError(f"nothing is stored up to image {t_target:,.0f}")
    # Times in units of the target time: the products then lie near 1, whatever the length of training.
    t = t / t_target
    A = inner_products(t[:, None], gamma[:, None], t[None, :], gamma[None, :])
    b = inner_products(t, gamma, np.float64(1), np.float64(gamma_target))
    x = np.linalg.solve(A, b)
    x = x / x.sum()
    norm = inner_products(np.float64(1), np.float64(gamma_target), np.float64(1), np.float64(gamma_target))
    return x, float(max(x @ A @ x - 2 * x @ b + norm, 0.0) / norm)


class PowerEMA:
    """Averages of named tensors for several relative lengths, held beside them and updated in place.

    Usable in any training loop: after each optimizer step, or every few, call `update(t, t_next)` with
    the images seen at the last call and now.
    """

    def __init__(self, tensors: dict[str, Tensor], sigma_rels: Sequence[float]):
        self.live = {k: v.detach() for k, v in tensors.items()}
        self.averages = {s: {k: v.clone() for k, v in self.live.items()} for s in sigma_rels}
        self.gammas = {s: sigma_rel_to_gamma(s) for s in sigma_rels}

    @torch.no_grad()
    def update(self, t: int, t_next: int) -> None:
        """Move every average on from t to t_next images, with the live weights as they are now."""
        live = list(self.live.values())
        for sigma_rel, average in self.averages.items():
            beta = power_beta(self.gammas[sigma_rel], t, t_next)
            torch._foreach_lerp_(list(average.values()), live, 1 - beta)


class Reader(Protocol):
    """One stored average: an open safetensors file."""

    def keys(self) -> Iterable[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...


def combine(
    readers: Sequence[Reader], coefficients: np.ndarray, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """sum_i x_i theta_i, tensor by tensor: memory for two tensors, one pass over the files.

    coefficients (readers,) or (readers, targets); with targets each tensor has a leading dimension. names: of
    the tensors to combine, all when None.
    Sums run in float64: at short lengths the coefficients are large and of both signs.
    """
    coefficients = torch.as_tensor(np.asarray(coefficients, np.float64))
    for name in list(readers[0].keys() if names is None else names):
        total = None
        for reader, x in zip(readers, coefficients, strict=True):
            theta = reader.get_tensor(name)
            part = x.reshape(*x.shape, *[1] * theta.ndim) * theta.double()
            total = part if total is None else total.add_(part)
        yield name, total.to(theta.dtype)
