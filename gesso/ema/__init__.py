"""EMAs of weights: tracked in training, and reconstructed at any length afterwards (EDM2 Section 3, Appendix C)."""

from gesso.ema.combine import linear_combination
from gesso.ema.profiles import (
    PerTensorProfile,
    PowerProfile,
    Profile,
    RawProfile,
    TraditionalProfile,
    sampling_profile,
    sigma_rel_to_gamma,
    tracked_profiles,
)
from gesso.ema.solve import Density, Fit, build_mixture, densities, fit_profile, inner_products, kummer
from gesso.ema.tracker import Tracker, full_tensor

__all__ = [
    "Density",
    "Fit",
    "PerTensorProfile",
    "PowerProfile",
    "Profile",
    "RawProfile",
    "Tracker",
    "TraditionalProfile",
    "build_mixture",
    "densities",
    "fit_profile",
    "full_tensor",
    "inner_products",
    "kummer",
    "linear_combination",
    "sampling_profile",
    "sigma_rel_to_gamma",
    "tracked_profiles",
]
