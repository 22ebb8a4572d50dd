"""What is measured, drawn and passed on while a run trains. Nothing of it changes what is trained. No torch here."""

from typing import Literal

from pydantic import model_validator

from gesso.config.base import Positive, Settings


class Watch(Settings):
    """What is measured and drawn while a run trains, each at its own multiples of images seen; null: never."""

    validate_images: Positive | None = 250_000
    """validation loss, where there are images for it: those of data.held_out, or of watch.source"""
    source: str | None = None
    """other images to validate on, as data.source, with the same classes; null: those of data.held_out"""
    validate_samples: Positive = 1_000
    """pairs of an image and a noise level, the same ones each time and in each run; images in turn"""
    magnitude_images: Positive | None = 1_000_000
    """magnitudes of activations and weights, by resolution or depth (EDM2 Eq. 3, Figure 15), of the average next to sample.*"""
    magnitude_samples: Positive = 4_096
    """training samples that activations are measured on"""
    sample_images: Positive | None = None
    """a grid of samples, samples/nimgN.png, by the settings of sample.* and the tracked average next to its length"""
    samples: Positive = 16
    """images of a grid: seeds 0, 1, 2, ..."""
    evaluate_images: Positive | None = None
    """what eval.features says, at sample.*'s settings, with the tracked average next to its length"""
    tensorboard: bool = False
    """log.jsonl and the grids for TensorBoard too, in the run folder's tensorboard/"""
    wandb: Literal["no", "offline", "online"] = "no"
    """log.jsonl and the grids for Weights & Biases too; offline: in the run folder's wandb/, for `wandb sync`"""
    wandb_project: str = "gesso"

    @model_validator(mode="after")
    def _named(self) -> "Watch":
        if not self.wandb_project.strip():
            raise ValueError("watch.wandb_project is empty: name a project")
        return self
