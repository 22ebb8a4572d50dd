"""Settings of validation, sampling and logging during training; they do not change the trained weights."""

from typing import Literal

from pydantic import model_validator

from gesso.config.base import BatchSize, PositiveCount, Settings


class MonitorConfig(Settings):
    """Measurements during training. Each `*_every` is an interval in images; null: never."""

    validate_every: PositiveCount | None = 250_000
    """interval of the validation loss, in images. The images come from data.num_validation or
    monitor.validation_source; without either there is no validation"""
    validation_source: str | None = None
    """separate validation images, written as data.source, with the same classes; null: those of data.num_validation"""
    validation_pairs: PositiveCount = 1_000
    """number of (image, noise level) pairs in the validation loss; the same pairs at every evaluation and in every
    run"""
    magnitude_every: PositiveCount | None = 1_000_000
    """interval of the magnitudes of activations and weights by resolution or depth, in images (EDM2 Eq. 3, Figure 15),
    measured on the tracked EMA closest to sample.sigma_rel or sample.halflife"""
    magnitude_samples: PositiveCount = 4_096
    """number of training samples over which activation magnitudes are measured"""
    sample_every: PositiveCount | None = None
    """interval of sample grids, in images; written to sheets/nimgN.png with the settings sample.* and the tracked EMA
    closest to the requested one"""
    num_samples: BatchSize = 16
    """number of images in a sample grid; their seeds are 0, 1, 2, ..."""
    evaluate_every: PositiveCount | None = None
    """interval of the metrics that eval.toy_metrics selects, in images, with the settings sample.* and the tracked EMA
    closest to the requested one"""
    tensorboard: bool = False
    """also write log.jsonl and the sample grids as TensorBoard events to the run folder's tensorboard/"""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """also log to Weights & Biases; offline writes to the run folder's wandb/, for `wandb sync`"""
    wandb_project: str = "gesso"
    """name of the Weights & Biases project"""

    @model_validator(mode="after")
    def _check_wandb(self) -> "MonitorConfig":
        if not self.wandb_project.strip():
            raise ValueError("monitor.wandb_project is empty: set it to the name of a project")
        return self
