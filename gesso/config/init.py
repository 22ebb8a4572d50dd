"""Weights to start from in the place of random ones. No torch here."""

from typing import Literal

from pydantic import NonNegativeInt

from gesso.config.base import Positive, Settings, SigmaRel

FOUND = ("resolution", "file", "sigma_rel", "halflife", "nimg", "fingerprint", "rows")
"""of Init: what opening the source tells; of another source they are forgotten"""


class Init(Settings):
    """Weights to start from: another run's, or another project's (Berrada et al. Sections 2.2, 3.4)."""

    source: str | None = None
    """a run folder, RUN@0.1 (an EMA length), RUN@100k (a time), RUN@0.1@100k, one snapshot, or another project's weight
    file; init=RUN is short for it. null: random weights"""
    labels: str | None = None
    """the source's class that each class here starts as: names (of the same name), index (of the same number), fresh (none),
    or a JSON or YAML file {class here: class there}. null: names where both have them, else index"""
    positions: Literal["resampled", "extrapolated"] = "resampled"
    """at another resolution: more tokens on the source's grid (Pseudocode 1), or more at its distance (Figure 8a), so that
    the source's tokens keep their positions. net.positions=interpolated resizes the source's table bicubically (Figure 4)"""
    noise: Literal["scaled", "kept"] = "scaled"
    """process.scale at k times the resolution: k times the source's (Proposition 1), or the source's (Figure 8b)"""
    process: Literal["source", "run"] = "source"
    """the process of another project's weights: the one that they were trained under (DiT's linear betas), or this run's"""
    resolution: Positive | None = None
    """pixels that the source was trained at; found, but where another project's weights do not tell it"""
    file: str | None = None
    """this and all below is recorded when the source is opened: where it is"""
    sigma_rel: SigmaRel | None = None
    """EMA length; where not said that of the source's sample.sigma_rel or halflife"""
    halflife: Positive | None = None
    nimg: Positive | None = None
    """images that the source had seen"""
    fingerprint: str | None = None
    """of its weights: training again starts from the same, or is refused"""
    rows: tuple[NonNegativeInt | None, ...] | None = None
    """the source's class of each class; null: none, which starts as its null class where it has one"""
