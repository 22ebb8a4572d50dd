"""Slow reference of EMA: weights of a piecewise constant trajectory (EDM2 Eq. 112-120)."""

import numpy as np

from gesso.ema import PowerProfile, Profile


def interval_weights(profile: Profile, edges: np.ndarray) -> np.ndarray:
    """Return the weights of theta(0) and of theta in each interval between edges 0 to t, from the integral of p."""
    t = edges[-1]
    if isinstance(profile, PowerProfile):
        cdf = (edges / t) ** (profile.gamma + 1)
    else:
        cdf = 2.0 ** (-(t - edges) / profile.halflife)
    return np.diff(cdf, prepend=0.0)
