"""Settings of the weights that training starts from."""

from typing import Literal

from pydantic import NonNegativeInt

from gesso.config.base import PositiveCount, Settings, SigmaRel

RECORDED_FIELDS = ("resolution", "path", "sigma_rel", "halflife", "nimg", "fingerprint", "class_mapping")
"""Fields of InitConfig that are read from the source; they are reset when init.source changes."""


class InitConfig(Settings):
    """Initial weights from another gesso run or from another project (Berrada et al. Sections 2.2, 3.4)."""

    source: str | None = None
    """source of the initial weights: a run folder, RUN@0.1 (EMA length), RUN@100k (images seen), RUN@0.1@100k, a
    snapshot file, or a weight file of another project. init=RUN is short for init.source=RUN. null: random
    initialization"""
    labels: str | None = None
    """mapping from the classes of this run to those of the source: names (equal names), index (equal numbers), random
    (random embeddings), or a JSON or YAML file {class: source class}. null: names if both have names, otherwise
    index"""
    pos_embed: Literal["resampled", "extrapolated"] = "resampled"
    """position grid at another resolution: resampled puts more tokens into the source's range (Berrada et al.
    Pseudocode 1); extrapolated keeps the source's spacing and extends the range (Figure 8a). net.pos_embed=interpolated
    resizes the source's table bicubically (Figure 4)"""
    noise_levels: Literal["scale", "keep"] = "scale"
    """process.resolution_scale at k times the source's resolution: scale is k times the source's value (Proposition
    1); keep is the source's value (Figure 8b)"""
    process: Literal["source", "run"] = "source"
    """noise process for weights of another project: source is the one they were trained with (DiT: linear betas); run
    is the one set by process.*"""
    resolution: PositiveCount | None = None
    """resolution in pixels that the source was trained at; needed only if a weight file of another project does not
    contain it"""
    path: str | None = None
    """absolute path of the source. This field and those below are recorded when the source is opened"""
    sigma_rel: SigmaRel | None = None
    """relative EMA length of the source weights; null: sample.sigma_rel or sample.halflife of the source"""
    halflife: PositiveCount | None = None
    """half-life in images of the source's traditional EMA"""
    nimg: PositiveCount | None = None
    """number of images that the source weights were trained on"""
    fingerprint: str | None = None
    """hash of the source weights; training refuses to start from different weights"""
    class_mapping: tuple[NonNegativeInt | None, ...] | None = None
    """source class of each class; null in place of a number: initialize as the source's null class if it has one"""
