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

from gesso import config, keyed
from gesso.config import Dropout, Run
from gesso.data.batches import Batches
from gesso.data.dataset import open_dataset
from gesso.data.order import Permutations
from gesso.data.samples import Dataset, Samples
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import levels
from gesso.diffusion import process as processes
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError

PASS = 64
"""pairs that go through the network at once, whatever the batch size and the number of ranks"""


def images(run: Run, dataset: Dataset, setting: str = "watch.source") -> tuple[Dataset, Tensor] | None:
    """What to validate on: images of the source that `setting` names, else those held out; and which of them. None where the
    run says nothing.

    Raises UsageError when that source holds other classes, and for held-out images that would all have to be fetched.
    """
    if source := config.flat(run)[setting]:
        data = run.data.model_copy(update={"source": source, "window": None, "held_out": 0})
        try:
            other = open_dataset(data, run.latent, 0)
        except UsageError as error:
            raise UsageError(str(error).replace("data.source", setting)) from None
        if other.class_names != dataset.class_names and run.semantic.kind == "label":
            raise UsageError(
                f"{setting}={source} has the classes {', '.join(other.class_names[:3]) or 'none'}, ..., not those "
                f"of data.source={run.data.source}"
            )
        for block, fields in other.settled(run).items():
            for name, value in fields.items():
                ours = getattr(getattr(run, block), name)
                if name not in ("flip", "crop_scale") and ours != value:
                    raise UsageError(f"{setting}={source} holds {block}.{name}={value}, not {ours}")
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
            f"name a source of their own by {setting}"
        )
    return dataset, dataset.held


class Pairs(NamedTuple):
    """One pass: numbers j of its pairs (B,), and their images."""

    number: Tensor
    samples: Samples


class Validation:
    """Losses of n pairs.

    For a network of given weights they are equal to the last bit over any batch size, as passes are always the same, and
    their means over any number of ranks, as those are taken over all pairs in float64; over devices and threads to rounding.
    """

    def __init__(self, run: Run, dataset: Dataset, index: Tensor, device: torch.device, n: int):
        # Nothing drawn from the seed of training, nothing withheld.
        quiet = run.model_copy(
            update={
                "train": run.train.model_copy(update={"seed": 0}),
                "dropout": Dropout(both=0, control=0, semantic=0),
            }
        )
        self.run, self.device, self.dataset = run, device, dataset
        self.batches = Batches(dataset, quiet, processes.build(run.process).sd, device)
        number = torch.arange(n)
        place = Permutations(0)(n, "validation stratum", number)
        self.u = (place + keyed.uniform(0, number, "validation level")[:, 0]) / n
        self.image = index[number % len(index)]

    def passes(self, number: Tensor) -> list[Tensor]:
        """These pairs (n,), cut into what goes through the network at once: pictures of one size."""
        sizes = self.run.data.buckets or ()
        groups = [number[torch.isin(self.image[number], self.dataset.alike(*size))] for size in sizes] or [number]
        return [part for group in groups if len(group) for part in group.split(PASS)]

    def read(self, number: Tensor) -> Pairs:
        return Pairs(number, self.dataset.plain(self.image[number]))

    @torch.no_grad()
    def losses(self, denoiser: Denoiser, passes: Iterable[Pairs]) -> Tensor:
        """Of every pair, float64 on the CPU; 0 of those that are not in `passes`."""
        found = torch.zeros(len(self.u), dtype=torch.float64)
        for number, samples in passes:
            x0, cond = self.batches.finish(number, samples)
            s = denoiser.process.quantile(self.u[number]).to(x0)
            eps = keyed.normal(0, number.to(self.device), "validation noise", x0.shape[1:], x0.dtype)
            with diffusion.products(self.run.train, self.device):
                losses = diffusion.loss(denoiser, denoiser.process, x0, s, eps, cond)
            found[number] = losses.double().cpu()
        return found

    def means(self, losses: Tensor) -> tuple[float, list[float | None]]:
        """Of the losses of all pairs, and those of each bin of noise levels, to six digits."""
        by_level = levels.sums(losses, self.u, torch.ones_like(losses, dtype=torch.bool))
        return float(f"{float(losses.mean()):.6g}"), levels.means(by_level)
