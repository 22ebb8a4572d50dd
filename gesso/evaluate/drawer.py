"""Samples of a run, drawn by their seeds, and what networks make of them.

Legend: n seeds, H W height and width.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gesso import conditions, generate, keyed, snapshot
from gesso.config import Run
from gesso.data.sources import open_source
from gesso.data.space import Space
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.evaluate.statistics import Told, features_of

SIZES = {"lpips": (64, 128, 256, 512, 1024), "told": (4, 8)}
"""original sizes that conditional diversity is measured over (Berrada et al. Table 2a). The text of Section 3.1 speaks of ten
generations; five sizes make ten pairs. told: those of data.source=digits-coarse"""


class Prompt(NamedTuple):
    """A caption, and the class of the picture that it was written for."""

    caption: str
    label: int


def prompts_of(run: Run) -> list[Prompt] | None:
    """Captions that samples are drawn for, where the run has words: those of eval.prompts, else of the training images."""
    if run.semantic.kind != "text":
        return None
    where = run.eval.prompts or run.data.source
    source = open_source(where)
    pairs = zip(source.captions(), source.labels.tolist(), strict=True)
    prompts = [Prompt(caption, label) for caption, label in pairs if caption]
    if not prompts:
        raise UsageError(f"eval.prompts={where} has no captions")
    return prompts


def labels_of(run: Run, seeds: Sequence[int]) -> list[int] | None:
    """Classes of the samples of these seeds, where the run has any."""
    classes = run.inputs.num_classes
    if not classes or run.eval.labels == "turn":
        return [seed % classes for seed in seeds] if classes else None
    u = keyed.uniform(run.eval.seed, torch.tensor(list(seeds)), "label of a sample")[:, 0]
    return (u * classes).long().tolist()


class Drawer(NamedTuple):
    """What samples are drawn with."""

    run: Run
    device: torch.device
    denoiser: Denoiser
    guide: Denoiser | None
    space: Space
    prompts: Sequence[Prompt] | None
    rows: Tensor | None
    """control variables of training samples"""

    def images(self, seeds: Sequence[int], control: Mapping[str, str] | None = None) -> Iterator[tuple[Tensor, Told]]:
        """Batches of RGB samples (n, 3, H, W) uint8 on the device, and what they were told; control: what all are told."""
        run, labels, captions = self.run, labels_of(self.run, seeds), None
        if self.prompts is not None:
            prompts = [self.prompts[seed % len(self.prompts)] for seed in seeds]
            captions = [prompt.caption for prompt in prompts]
        cond, _ = conditions.build(run, seeds, self.rows, labels, captions, control)
        if captions is not None:
            labels = [prompt.label for prompt in prompts]
        at = 0
        for images in generate.generate(self.denoiser, run, seeds, cond, self.guide, self.space):
            some = slice(at, at + len(images))
            yield (
                images.expand(-1, 3, -1, -1).to(self.device),
                Told(labels and labels[some], captions and captions[some]),
            )
            at += len(images)


def opened(folder: Path, run: Run, denoiser: Denoiser, device: torch.device) -> Drawer:
    """Of a run folder, with these weights. Raises UsageError for what the folder or this machine lacks."""
    guide, space, rows = generate.guide_of(folder, run), generate.opened_space(run), snapshot.control_rows(folder)
    return Drawer(run, device, denoiser, guide, space, prompts_of(run), rows)


def embedded(drawer: Drawer, networks: dict[str, nn.Module], seeds: Sequence[int]) -> dict[str, dict[str, Tensor]]:
    """Features of the samples of these seeds by every network."""
    rows: dict[str, list[Tensor]] = {name: [] for name in networks}
    for images, told in drawer.images(seeds):
        for name, network in networks.items():
            rows[name].append(features_of(network, images, told))
    return {name: {"rows": torch.cat(parts)} for name, parts in rows.items()}


def distances(drawer: Drawer, name: str, network: nn.Module, seeds: Sequence[int]) -> dict[str, dict[str, Tensor]]:
    """Rows (n, 3 or 4): of each seed, class or prompt, and noise, the mean distance between its samples under two of SIZES;
    of lpips then without sizes below the resolution of the run (Berrada et al. Section 3.1), where two are left; last the
    fine energy under the smallest and under the largest size."""
    sizes = SIZES[name]
    made = [torch.cat([x for x, _ in drawer.images(seeds, {"size": f"{size}x{size}"})]) for size in sizes]
    pairs = [(i, j) for j in range(len(sizes)) for i in range(j)]
    found = torch.stack([network(made[i], made[j]).cpu() for i, j in pairs], dim=1)
    columns = [found.mean(dim=1)]
    sharp = [k for k, (i, _) in enumerate(pairs) if sizes[i] >= drawer.run.data.resolution]
    if name == "lpips" and sharp:
        columns.append(found[:, sharp].mean(dim=1))
    return {name: {"rows": torch.stack([*columns, *(fine_energy(made[k]).to(found) for k in (0, -1))], dim=1)}}


def fine_energy(images: Tensor) -> Tensor:
    """Mean square, by image, of what halving an image and enlarging it again takes away."""
    images = images.double()
    restored = F.interpolate(F.avg_pool2d(images, 2), size=images.shape[2:], mode="bilinear")
    return (images - restored).square().mean(dim=(1, 2, 3)).cpu()
