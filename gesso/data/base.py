"""Interface between training and its data: `Dataset` returns batches by image index and sample index.

Implementations: `in_memory.InMemoryDataset` holds a small source in memory, `on_the_fly.OnTheFlyDataset` decodes a
large source during training, and `cache.read.CachedDataset` reads files that `gesso cache` wrote.

Legend: N images, B samples; C channels of pixels, H W their size; c channels of latents, h w their size.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gesso.config import CONTROL_VARIABLES, RunConfig, SemanticConfig
from gesso.data import crops
from gesso.data.encoders.text import EncodedText
from gesso.data.samplers import EpochSampler, EpochShuffle, ExcludeIndices, SampleOrder, select_validation
from gesso.errors import UsageError


class SampleBatch(NamedTuple):
    """Batch of B samples on the CPU.

    Attributes:
        x: Pixels (B, C, H, W) uint8, or latents (B, 2c, h, w) float: means, then standard deviations.
        original_sizes: (B, 2) height and width in pixels of the uncropped image.
        crop_boxes: (B, 4) float32 top, left, bottom, right as shares of the stored, unmirrored image.
        flips: (B,) bool, true where the sample is mirrored left to right.
        pixel_stats: (B, 2) float32 mean and standard deviation of the pixels of the sample, in 0..255.
        labels: (B,) int64 class indices.
        indices: (B,) int64 image indices.
        encoded_text: Tokens of the captions if the dataset stores them; None if they are encoded during training.
    """

    x: Tensor
    original_sizes: Tensor
    crop_boxes: Tensor
    flips: Tensor
    pixel_stats: Tensor
    labels: Tensor
    indices: Tensor
    encoded_text: EncodedText | None = None

    @classmethod
    def from_views(
        cls, x: Tensor, sizes: Sequence[tuple[int, int]], views: Sequence[crops.View], labels: Tensor, indices: Tensor
    ) -> "SampleBatch":
        """Return the batch of B views of images with the original `sizes`; pixel_stats are zero for latents."""
        return cls(
            x=x,
            original_sizes=torch.tensor(sizes),
            crop_boxes=torch.tensor([view[:4] for view in views], dtype=torch.float32),
            flips=torch.tensor([view.flip for view in views]),
            pixel_stats=crops.compute_pixel_stats(x) if x.dtype == torch.uint8 else torch.zeros(len(x), 2),
            labels=labels,
            indices=indices,
        )

    def control_columns(self) -> Mapping[str, Tensor]:
        """Return the columns of the control variables by name, (B,) float32 each, in the units of CONTROL_VARIABLES.

        Raises:
            UsageError: A control variable of the user returns another shape.
        """
        columns = dict(crops.control_columns(self.original_sizes, self.crop_boxes, self.flips, self.pixel_stats))
        for name, variable in CONTROL_VARIABLES.items():
            if variable.measure is not None:
                values, shape = variable.measure(self), (len(self.labels), len(variable.columns))
                if tuple(values.shape) != shape:
                    raise UsageError(f"control variable {name}: measure returned {tuple(values.shape)}, not {shape}")
                columns |= dict(zip(variable.columns, values.float().unbind(1), strict=True))
        return columns


class Dataset(abc.ABC):
    """N images. Methods are thread-safe, and their results depend only on their arguments.

    Attributes:
        uri: The setting data.source.
        labels: (N,) int64 class indices.
        captions: N captions; "" for an image without a caption.
        class_names: Names of the classes; empty without classes.
        notes: Messages for the user.
        unreadable: (name, reason) of each image that was left out.
        has_latents: Whether `SampleBatch.x` holds latents.
        is_cheap: Whether `get` is so fast that prefetching does not pay.
        is_remote: Whether files are fetched from an address during training.
        text_config: Settings of the stored tokens; None if `get` returns no tokens.
        held_out: Sources of the validation and test splits beside the training images, validation first.
        validation_indices: (k,) int64, ascending: images that `sample_order` never returns.
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
    held_out: tuple[str, ...] = ()
    validation_indices = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @abc.abstractmethod
    def get(self, indices: Tensor, sample_index: Tensor) -> SampleBatch:
        """Return augmented samples.

        Args:
            indices: (B,) int64 image indices.
            sample_index: (B,) int64 sample indices, the keys of all random draws.
        """

    @abc.abstractmethod
    def get_unaugmented(self, indices: Tensor) -> SampleBatch:
        """Return the images `indices` (B,) without augmentation: centre crop, not mirrored."""

    def reference_images(self, indices: Tensor) -> Tensor:
        """Return x of the images `indices` (B,) in the form that generated images are compared with."""
        return self.get_unaugmented(indices).x

    @abc.abstractmethod
    def channel_stats(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation per channel, float64: of pixels in [-1, 1], or of raw latents."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the images."""

    def indices_of_size(self, height: int, width: int) -> Tensor:
        """Return the indices (n,) of images whose samples have this size in pixels."""
        return torch.arange(len(self))

    def implied_settings(self, run: RunConfig) -> dict[str, dict[str, object]]:
        """Return the settings of the sections `data` and `latent` that the dataset determines."""
        return {}

    def hold_out_validation(self, count: int) -> None:
        """Exclude `count` images from training; the choice does not depend on the seed. Call before `sample_order`.

        Raises:
            UsageError: No training image would remain.
        """
        if count >= len(self):
            raise UsageError(
                f"data.num_validation={count} leaves no training images, as {self.uri} has {len(self)}: set it lower"
            )
        if count:
            self.validation_indices = select_validation(len(self), count)

    def sample_order(self, seed: int, batch_size: int) -> SampleOrder:
        """Return the function that maps sample indices (B,) to image indices (B,)."""
        order = self._training_order(seed, batch_size)
        return ExcludeIndices(order, self.validation_indices) if len(self.validation_indices) else order

    def _training_order(self, seed: int, batch_size: int) -> EpochSampler:
        """Return the order of the training images, numbered without gaps."""
        return EpochShuffle(len(self) - len(self.validation_indices), seed)


def pixel_channel_stats(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per channel, (C,) float64, of uint8 (B, C, H, W) scaled to [-1, 1]."""
    values = pixels.double().transpose(0, 1).flatten(1)
    return values.mean(dim=1) / 127.5 - 1, values.std(dim=1, correction=0) / 127.5


def latent_channel_stats(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per channel, (c,) float64, of samples of the posteriors (B, 2c, h, w).

    The variance is that of the means plus the mean of the variances.
    """
    mean, std = (half.double().transpose(0, 1).flatten(1) for half in latents.chunk(2, dim=1))
    return mean.mean(dim=1), torch.sqrt(mean.var(dim=1, correction=0) + std.square().mean(dim=1))
