"""What training reads: samples by image and by sample counter, whatever lies behind them.

images.Images holds a small source in memory, live.Live decodes a large one as it goes, cache.Cache reads what
`gesso cache` wrote.

Legend: N images, B samples; C channels of pixels, H W of their size; c channels of latents, h w of theirs.
"""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gesso.config import RunConfig, SemanticConfig
from gesso.data import crops
from gesso.data.encoders.text import EncodedText
from gesso.data.samplers import EpochShuffle, ExcludeIndices, select_validation
from gesso.errors import UsageError


class SampleBatch(NamedTuple):
    """B samples, on the CPU.

    x       pixels (B, C, H, W) uint8, or latents (B, 2c, h, w) float: means, then standard deviations
    sizes   (B, 2) height and width of the whole picture; boxes (B, 4) float32 crops.View of it as it is stored, not
            mirrored (`columns` states them in the frame that is shown); flips (B,) bool
    tone    (B, 2) float32, mean and standard deviation of the pixels of the view
    labels  (B,) int64
    index   (B,) int64, which images they are
    texts   tokens of the captions, where the data set keeps them; else they are encoded as they come
    """

    x: Tensor
    original_sizes: Tensor
    crop_boxes: Tensor
    flips: Tensor
    pixel_stats: Tensor
    labels: Tensor
    indices: Tensor
    encoded_text: EncodedText | None = None

    def control_columns(self) -> dict[str, Tensor]:
        """Columns of control by name, (B,) float32 each, in the units of config.CONTROLS."""
        return crops.control_columns(self.original_sizes, self.crop_boxes, self.flips, self.pixel_stats)


class Dataset(abc.ABC):
    """N images. Any thread may call `take` at any time; it depends on nothing but its arguments.

    labels (N,) int64; captions N, empty where there is none; class_names empty where there are no classes; notes for
    the user; unreadable (name, reason) of images that were left out; latents: x is latents; immediate: `take` costs next
    to nothing; far: files are fetched as they are needed, few at a time.
    """

    uri: str
    labels: Tensor
    captions: Sequence[str]
    class_names: tuple[str, ...]
    notes: list[str]
    unreadable: list[tuple[str, str]]
    has_latents = False
    is_cheap = False
    is_remote = False
    text_config: SemanticConfig | None = None
    """how the captions were encoded, where `take` gives their tokens"""
    validation_indices = torch.zeros(0, dtype=torch.int64)
    """(k,) rising: images that `order` never comes to"""

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def get(self, indices: Tensor, sample_index: Tensor) -> SampleBatch:
        """Samples `counter` (B,) of the images `index` (B,): what is drawn of a view is keyed to the counter."""

    @abc.abstractmethod
    def get_unaugmented(self, indices: Tensor) -> SampleBatch:
        """The images `index` (B,) with nothing drawn: the middle, not mirrored."""

    def reference_images(self, indices: Tensor) -> Tensor:
        """x of the images `index` (B,) as they are compared with generated ones."""
        return self.get_unaugmented(indices).x

    @abc.abstractmethod
    def channel_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel, float64: of pixels in [-1, 1], or of raw latents."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that change with the images."""

    def indices_of_size(self, height: int, width: int) -> Tensor:
        """(n,) images whose views have that size in pixels."""
        return torch.arange(len(self))

    def implied_settings(self, run: RunConfig) -> dict[str, dict[str, object]]:
        """Fields of the run's blocks `data` and `latent` that the images themselves settle."""
        return {}

    def hold_out_validation(self, count: int) -> None:
        """Keep `count` images from training, the same ones whatever its seed. To be called before `order`.

        Raises UsageError when none would be left.
        """
        if count >= len(self):
            raise UsageError(
                f"data.num_validation={count} leaves nothing of the {len(self)} images in {self.uri}: set it lower"
            )
        self.validation_indices = select_validation(len(self), count) if count else self.validation_indices

    def sample_order(self, seed: int, batch_size: int) -> EpochShuffle | ExcludeIndices:
        """Which image a sample counter stands for."""
        order = EpochShuffle(len(self) - len(self.validation_indices), seed)
        return ExcludeIndices(order, self.validation_indices) if len(self.validation_indices) else order


def pixel_channel_stats(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, float64, of uint8 (B, C, H, W) as numbers in [-1, 1]."""
    values = pixels.double().transpose(0, 1).flatten(1)
    return values.mean(dim=1) / 127.5 - 1, values.std(dim=1, correction=0) / 127.5


def latent_channel_stats(latents: Tensor) -> tuple[Tensor, Tensor]:
    """As `pixel_moments`, of raw latents drawn from (B, 2c, h, w): the variance of means and the mean of variances."""
    mean, std = (half.double().transpose(0, 1).flatten(1) for half in latents.chunk(2, dim=1))
    return mean.mean(dim=1), torch.sqrt(mean.var(dim=1, correction=0) + std.square().mean(dim=1))
