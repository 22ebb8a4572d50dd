"""Loss on images that are not trained on, at levels and with noise that never change: a smooth curve, alike in all runs.

Pair j is image j of the held-out ones, in turn, at a place in the training draw that is stratified over all pairs, with
noise of its own; nothing is withheld from the conditions, and nothing depends on train.seed. The loss is in the process's
native weight, the MSE of the network's own target, whatever weighting is trained with.

Legend: n pairs, B of them in a pass.
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
from gesso.data.samplers import KeyedPermutations
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import loss_bins
from gesso.diffusion import process as processes
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError

MICRO_BATCH_SIZE = 64
"""pairs that go through the network at once, whatever the batch size and the number of ranks"""


def open_validation_set(
    run: RunConfig, dataset: Dataset, setting: str = "monitor.validation_source"
) -> tuple[Dataset, Tensor] | None:
    """What to validate on: images of the source that `setting` names, else those held out; and which of them. None where the
    run says nothing.

    Raises UsageError when that source holds other classes, and for held-out images that would all have to be fetched.
    """
    if source := config.flatten(run)[setting]:
        data = run.data.model_copy(update={"source": source, "shuffle_window_shards": None, "num_validation": 0})
        try:
            other = open_dataset(data, run.latent, 0)
        except UsageError as error:
            raise UsageError(str(error).replace("data.source", setting)) from None
        if other.class_names != dataset.class_names and run.semantic.kind == "label":
            raise UsageError(
                f"{setting}={source} has the classes {', '.join(other.class_names[:3]) or 'none'}, ..., not those "
                f"of data.source={run.data.source}"
            )
        for block, fields in other.implied_settings(run).items():
            for name, value in fields.items():
                ours = getattr(getattr(run, block), name)
                if name not in ("flip", "crop_scale") and ours != value:
                    raise UsageError(f"{setting}={source} holds {block}.{name}={value}, not {ours}")
        same = other.text_config and (other.text_config.encoder, other.text_config.max_tokens) == (
            run.semantic.encoder,
            run.semantic.max_tokens,
        )
        other.text_config = other.text_config if same else None
        return other, torch.arange(len(other))
    if not len(dataset.validation_indices):
        return None
    if dataset.is_remote:
        raise UsageError(
            f"data.num_validation: the held-out images of {run.data.source} lie in all of its files, which would all be fetched; "
            f"name a source of their own by {setting}"
        )
    return dataset, dataset.validation_indices


class ValidationBatch(NamedTuple):
    """One pass: numbers j of its pairs (B,), and their images."""

    pair_indices: Tensor
    samples: SampleBatch


class ValidationLoss:
    """Losses of n pairs.

    For a network of given weights they are equal to the last bit over any batch size, as passes are always the same, and
    their means over any number of ranks, as those are taken over all pairs in float64; over devices and threads to rounding.
    """

    def __init__(self, run: RunConfig, dataset: Dataset, indices: Tensor, device: torch.device, num_pairs: int):
        # Nothing drawn from the seed of training, nothing withheld.
        quiet = run.model_copy(
            update={
                "train": run.train.model_copy(update={"seed": 0}),
                "dropout": Dropout(both=0, control=0, semantic=0),
            }
        )
        self.run, self.device, self.dataset = run, device, dataset
        self.batcher = Batcher(dataset, quiet, processes.build_process(run.process).sigma_data, device)
        number = torch.arange(num_pairs)
        place = KeyedPermutations(0)(num_pairs, "validation stratum", number)
        self.u = (place + rng.uniform(0, number, "validation level")[:, 0]) / num_pairs
        self.image_indices = indices[number % len(indices)]

    def split(self, pair_indices: Tensor) -> list[Tensor]:
        """These pairs (n,), cut into what goes through the network at once: pictures of one size."""
        sizes = self.run.data.buckets or ()
        groups = [
            pair_indices[torch.isin(self.image_indices[pair_indices], self.dataset.indices_of_size(*size))]
            for size in sizes
        ] or [pair_indices]
        return [part for group in groups if len(group) for part in group.split(MICRO_BATCH_SIZE)]

    def load_batch(self, pair_indices: Tensor) -> ValidationBatch:
        return ValidationBatch(pair_indices, self.dataset.get_unaugmented(self.image_indices[pair_indices]))

    @torch.no_grad()
    def losses(self, denoiser: Denoiser, batches: Iterable[ValidationBatch]) -> Tensor:
        """Of every pair, float64 on the CPU; 0 of those that are not in `passes`."""
        found = torch.zeros(len(self.u), dtype=torch.float64)
        for number, samples in batches:
            x0, cond = self.batcher.to_device(number, samples)
            s = denoiser.process.icdf(self.u[number]).to(x0)
            eps = rng.normal(0, number.to(self.device), "validation noise", x0.shape[1:], x0.dtype)
            with diffusion.autocast_context(self.run.train, self.device):
                losses = diffusion.loss(denoiser, denoiser.process, x0, s, eps, cond)
            found[number] = losses.double().cpu()
        return found

    def mean_losses(self, losses: Tensor) -> tuple[float, list[float | None]]:
        """Of the losses of all pairs, and those of each bin of noise levels, to six digits."""
        by_level = loss_bins.bin_sums(losses, self.u, torch.ones_like(losses, dtype=torch.bool))
        return float(f"{float(losses.mean()):.6g}"), loss_bins.bin_means(by_level)
