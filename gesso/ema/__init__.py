"""Averages of weights: tracked in training, any other rebuilt from them afterwards (EDM2 Section 3, Appendix C)."""

from gesso.ema.combine import Reader, combined
from gesso.ema.profiles import PerTensor, Power, Profile, Raw, Traditional, chosen, sigma_rel_to_gamma, tracked
from gesso.ema.solve import Density, Fit, densities, inner_products, kummer, mixture, solve
from gesso.ema.track import Tracker, whole

__all__ = [
    "Density",
    "Fit",
    "PerTensor",
    "Power",
    "Profile",
    "Raw",
    "Reader",
    "Tracker",
    "Traditional",
    "chosen",
    "combined",
    "densities",
    "inner_products",
    "kummer",
    "mixture",
    "sigma_rel_to_gamma",
    "solve",
    "tracked",
    "whole",
]
