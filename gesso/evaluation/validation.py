"""Loss on validation images, at noise levels and with noise that are the same in every evaluation and every run.

Pair j is validation image j (modulo their number) at a position in the training draw of noise levels that is stratified
over all pairs, with its own noise; no condition is dropped, and nothing depends on train.seed. The loss has the native
weighting of the process, the MSE of the network's own target, whatever weighting is trained with.

Legend: n pairs, B pairs in a pass.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gesso import config, rng
from gesso.config import Dropout, RunConfig
from gesso.data.base import Dataset, SampleBatch
from gesso.data.batching import Batcher
from gesso.data.factory import open_dataset
from gesso.data.samplers import KeyedPermutations, select_validation
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import process as processes
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError

MICRO_BATCH_SIZE = 64
"""Pairs in a pass of the network, whatever the batch size and the number of ranks."""


def open_validation_set(
    run: RunConfig, dataset: Dataset, setting: str = "monitor.validation_source"
) -> tuple[Dataset, Tensor] | None:
    """Return the validation images and the indices to use; None if the run has none.

    They are those of the source in `setting`, or the ones that data.num_validation excludes from training; if the
    source has a validation or test split, that many of its images instead.

    Raises:
        UsageError: The source does not match the run, or excluded images would have to be downloaded with all others.
    """
    if source := config.flatten(run)[setting]:
        return _open_validation_source(run, dataset, setting, source)
    if run.data.num_validation and dataset.held_out:
        held_out, _ = _open_validation_source(run, dataset, "data.num_validation", dataset.held_out[0])
        count = min(run.data.num_validation, len(held_out))
        return held_out, select_validation(len(held_out), count) if count < len(held_out) else torch.arange(count)
    if not len(dataset.validation_indices):
        return None
    if dataset.is_remote:
        raise UsageError(
            f"data.num_validation: the validation images of {run.data.source} lie in all of its files, which would all "
            f"be downloaded: set {setting} to a separate source"
        )
    return dataset, dataset.validation_indices


def _open_validation_source(run: RunConfig, dataset: Dataset, setting: str, source: str) -> tuple[Dataset, Tensor]:
    """Return all images of a separate source, which must match the classes and preparation of the training images."""
    data = run.data.model_copy(update={"source": source, "shuffle_window_shards": None, "num_validation": 0})
    try:
        validation = open_dataset(data, run.latent, 0)
    except UsageError as error:
        raise UsageError(str(error).replace("data.source", setting)) from None
    if validation.class_names != dataset.class_names and run.semantic.kind == "label":
        raise UsageError(
            f"{setting}={source} has the classes {', '.join(validation.class_names[:3]) or 'none'}, ..., not those "
            f"of data.source={run.data.source}"
        )
    for block, fields in validation.implied_settings(run).items():
        for name, value in fields.items():
            expected = getattr(getattr(run, block), name)
            if name not in ("flip", "crop_scale") and expected != value:
                raise UsageError(f"{setting}={source} has {block}.{name}={value}, not {expected}")
    text = validation.text_config
    if text and (text.encoder, text.max_tokens) != (run.semantic.encoder, run.semantic.max_tokens):
        validation.text_config = None
    return validation, torch.arange(len(validation))


class ValidationBatch(NamedTuple):
    """Pairs of one pass: their indices (B,) and images."""

    pair_indices: Tensor
    samples: SampleBatch


class ValidationLoss:
    """Losses of n pairs of a validation image and a noise level.

    For given weights they are bit-equal at every batch size, as passes are always the same; so are their means at every
    number of ranks, as those are taken over all pairs in float64. Over devices and threads they are equal to rounding.
    """

    def __init__(self, run: RunConfig, dataset: Dataset, indices: Tensor, device: torch.device, num_pairs: int):
        # Nothing depends on the seed of training, and no condition is dropped.
        fixed_run = run.model_copy(
            update={
                "train": run.train.model_copy(update={"seed": 0}),
                "dropout": Dropout(both=0, control=0, semantic=0),
            }
        )
        self.run, self.device, self.dataset = run, device, dataset
        sigma_data = processes.build_process(run.process).sigma_data
        self.batcher = Batcher(dataset, fixed_run, sigma_data, device)
        pair = torch.arange(num_pairs)
        stratum = KeyedPermutations(0)(num_pairs, "validation stratum", pair)
        self.positions = (stratum + rng.uniform(0, pair, "validation level")[:, 0]) / num_pairs
        self.image_indices = indices[pair % len(indices)]

    def split(self, pair_indices: Tensor) -> list[Tensor]:
        """Return pairs (n,) cut into passes; the images of a pass have one size."""
        sizes = self.run.data.buckets or ()
        groups = [
            pair_indices[torch.isin(self.image_indices[pair_indices], self.dataset.indices_of_size(*size))]
            for size in sizes
        ] or [pair_indices]
        return [part for group in groups if len(group) for part in group.split(MICRO_BATCH_SIZE)]

    def load_batch(self, pair_indices: Tensor) -> ValidationBatch:
        """Return the images of a pass."""
        return ValidationBatch(pair_indices, self.dataset.get_unaugmented(self.image_indices[pair_indices]))

    @torch.no_grad()
    def losses(self, denoiser: Denoiser, batches: Iterable[ValidationBatch]) -> Tensor:
        """Return the loss of every pair, (num_pairs,) float64 on the CPU; 0 for pairs that are not in `batches`."""
        result = torch.zeros(len(self.positions), dtype=torch.float64)
        for pair, samples in batches:
            x0, cond = self.batcher.to_device(pair, samples)
            s = denoiser.process.icdf(self.positions[pair]).to(x0)
            eps = rng.normal(0, pair.to(self.device), "validation noise", x0.shape[1:], x0.dtype)
            with diffusion.autocast_context(self.run.train, self.device):
                losses = diffusion.loss(denoiser, denoiser.process, x0, s, eps, cond)
            result[pair] = losses.double().cpu()
        return result

    def features(self, denoiser: Denoiser, pairs: range, names: list[str]) -> dict[str, dict[str, Tensor]]:
        """Return losses and positions of a range of pairs, (n, 2), as a ShardedTask computes them."""
        batches = map(self.load_batch, self.split(torch.tensor(pairs)))
        columns = torch.stack([self.losses(denoiser, batches), self.positions], dim=1)
        return {name: {"rows": columns[pairs.start : pairs.stop].contiguous()} for name in names}
