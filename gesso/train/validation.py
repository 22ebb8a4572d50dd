"""Loss on images that are not trained on, at levels and with noise that never change: a smooth curve, alike in all runs.

Pair j is image j of the held-out ones, in turn, at a place in the training draw that is stratified over all pairs, with
noise of its own; nothing is withheld from the conditions, and nothing depends on train.seed. The loss is in the process's
native weight, the MSE of the network's own target, whatever weighting is trained with.

Legend: n pairs, B of them in a pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gesso import keyed
from gesso.cond import Cond
from gesso.config import Run
from gesso.data.batches import Batches
from gesso.data.dataset import open_dataset
from gesso.data.order import Permutations
from gesso.data.samples import Dataset, Samples
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.train import levels, parallel
from gesso.train.ranks import ALONE, Ranks

PASS = 64
"""pairs that go through the network at once, whatever the batch size and the number of ranks"""


def images(run: Run, dataset: Dataset) -> tuple[Dataset, Tensor] | None:
    """What to validate on: images, and which of them. None where the run says nothing.

    Raises UsageError when watch.source holds other classes, and for held-out images that would all have to be fetched.
    """
    if not run.watch.validate_images:
        return None
    if run.watch.source:
        data = run.data.model_copy(update={"source": run.watch.source, "window": None})
        try:
            other = open_dataset(data, run.latent, 0)
        except UsageError as error:
            raise UsageError(str(error).replace("data.source", "watch.source")) from None
        if other.class_names != dataset.class_names and run.semantic.kind == "label":
            raise UsageError(
                f"watch.source={run.watch.source} has the classes {', '.join(other.class_names[:3]) or 'none'}, ..., not those "
                f"of data.source={run.data.source}"
            )
        for block, fields in other.settled(run).items():
            for name, value in fields.items():
                ours = getattr(getattr(run, block), name)
                if name not in ("flip", "crop_scale") and ours != value:
                    raise UsageError(f"watch.source={run.watch.source} holds {block}.{name}={value}, not {ours}")
        same = other.encoded and (other.encoded.encoder, other.encoded.tokens) == (
            run.semantic.encoder,
            run.semantic.tokens,
        )
        other.encoded = other.encoded if same else None
        return other, torch.arange(len(other))
    if not len(dataset.held):
        return None
    if dataset.far:
        raise UsageError(
            f"data.held_out: the held-out images of {run.data.source} lie in all of its files, which would all be fetched; "
            "name a source of their own by watch.source"
        )
    return dataset, dataset.held


class Pairs(NamedTuple):
    """One pass: numbers j of its pairs (B,), and their images."""

    number: Tensor
    samples: Samples


class Validation:
    """Loss by pair. Images are read once and kept.

    For a network of given weights the result is equal to the last bit over any batch size and number of ranks, as passes
    are always the same and sums are taken over all pairs in float64; over devices and threads to rounding.
    """

    def __init__(
        self, run: Run, dataset: Dataset, index: Tensor, device: torch.device, sd: float, ranks: Ranks = ALONE
    ):
        # Nothing drawn from the seed of training, nothing withheld.
        quiet = run.model_copy(
            update={
                "train": run.train.model_copy(update={"seed": 0}),
                "semantic": run.semantic.model_copy(update={"dropout": 0.0}),
                "control": run.control.model_copy(update={"dropout": 0.0}),
            }
        )
        self.run, self.ranks, self.device = run, ranks, device
        self.batches = Batches(dataset, quiet, sd, device)
        n = run.watch.validate_samples
        number = torch.arange(n)
        place = Permutations(0)(n, "validation stratum", number)
        self.u = (place + keyed.uniform(0, number, "validation level")[:, 0]) / n
        image = index[number % len(index)]
        # Pictures of one size go together.
        sizes = run.data.buckets or ()
        groups = [number[torch.isin(image, dataset.alike(*size))] for size in sizes] or [number]
        parts = [part for group in groups if len(group) for part in group.split(PASS)][ranks.rank :: ranks.world]
        self.passes = [Pairs(part, dataset.plain(image[part])) for part in parts]

    @torch.no_grad()
    def __call__(self, denoiser: Denoiser) -> tuple[float, list[float | None]]:
        """Mean loss, and that of each bin of noise levels."""
        found = torch.zeros(len(self.u), dtype=torch.float64)
        for number, samples in self.passes:
            x0, cond = self.batches.finish(number, samples)
            found[number] = self._losses(denoiser, number, x0, cond).double().cpu()
        found = self.ranks.sum(found.to(self.device)).cpu()
        by_level = levels.sums(found, self.u, torch.ones_like(found, dtype=torch.bool))
        return float(f"{float(found.mean()):.6g}"), levels.means(by_level)

    def _losses(self, denoiser: Denoiser, number: Tensor, x0: Tensor, cond: Cond) -> Tensor:
        s = denoiser.process.quantile(self.u[number]).to(x0)
        eps = keyed.normal(0, number.to(self.device), "validation noise", x0.shape[1:], x0.dtype)
        with parallel.products(self.run.train, self.device):
            return diffusion.loss(denoiser, denoiser.process, x0, s, eps, cond)
