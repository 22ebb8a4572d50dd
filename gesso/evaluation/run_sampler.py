"""Samples of a run, drawn by their seeds, and what networks make of them.

Legend: n seeds, H W height and width.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gesso import build_conditions, rng, sampling, snapshot
from gesso.config import RunConfig
from gesso.data.normalization import Normalizer
from gesso.data.sources import open_source
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.evaluation.feature_stats import SampleConditions, extract_features

DIVERSITY_SIZES = {"lpips": (64, 128, 256, 512, 1024), "told": (4, 8)}
"""original sizes that conditional diversity is measured over (Berrada et al. Table 2a). The text of Section 3.1 speaks of ten
generations; five sizes make ten pairs. told: those of data.source=digits-mixed-resolution"""


class Prompt(NamedTuple):
    """A caption, and the class of the picture that it was written for."""

    caption: str
    label: int


def load_prompts(run: RunConfig) -> list[Prompt] | None:
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


def sample_labels(run: RunConfig, seeds: Sequence[int]) -> list[int] | None:
    """Classes of the samples of these seeds, where the run has any."""
    classes = run.input_spec.num_classes
    if not classes or run.eval.labels == "turn":
        return [seed % classes for seed in seeds] if classes else None
    u = rng.uniform(run.eval.seed, torch.tensor(list(seeds)), "label of a sample")[:, 0]
    return (u * classes).long().tolist()


class RunSampler(NamedTuple):
    """What samples are drawn with."""

    run: RunConfig
    device: torch.device
    denoiser: Denoiser
    guide: Denoiser | None
    normalizer: Normalizer
    prompts: Sequence[Prompt] | None
    control_rows: Tensor | None
    """control variables of training samples"""

    def images(
        self, seeds: Sequence[int], control: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Tensor, SampleConditions]]:
        """Batches of RGB samples (n, 3, H, W) uint8 on the device, and what they were told; control: what all are told."""
        run, labels, captions = self.run, sample_labels(self.run, seeds), None
        if self.prompts is not None:
            prompts = [self.prompts[seed % len(self.prompts)] for seed in seeds]
            captions = [prompt.caption for prompt in prompts]
        cond, _ = build_conditions.build_cond(run, seeds, self.control_rows, labels, captions, control)
        if captions is not None:
            labels = [prompt.label for prompt in prompts]
        at = 0
        for images in sampling.generate(self.denoiser, run, seeds, cond, self.guide, self.normalizer):
            some = slice(at, at + len(images))
            yield (
                images.expand(-1, 3, -1, -1).to(self.device),
                SampleConditions(labels and labels[some], captions and captions[some]),
            )
            at += len(images)


def open_run_sampler(folder: Path, run: RunConfig, denoiser: Denoiser, device: torch.device) -> RunSampler:
    """Of a run folder, with these weights. Raises UsageError for what the folder or this machine lacks."""
    guide, space, rows = (
        sampling.load_guide(folder, run),
        sampling.open_decoder(run),
        snapshot.load_control_rows(folder),
    )
    return RunSampler(run, device, denoiser, guide, space, load_prompts(run), rows)


def sample_features(
    sampler: RunSampler, networks: dict[str, nn.Module], seeds: Sequence[int]
) -> dict[str, dict[str, Tensor]]:
    """Features of the samples of these seeds by every network."""
    rows: dict[str, list[Tensor]] = {name: [] for name in networks}
    for images, told in sampler.images(seeds):
        for name, network in networks.items():
            rows[name].append(extract_features(network, images, told))
    return {name: {"rows": torch.cat(parts)} for name, parts in rows.items()}


def diversity_distances(
    sampler: RunSampler, name: str, network: nn.Module, seeds: Sequence[int]
) -> dict[str, dict[str, Tensor]]:
    """Rows (n, 3 or 4): of each seed, class or prompt, and noise, the mean distance between its samples under two of SIZES;
    of lpips then without sizes below the resolution of the run (Berrada et al. Section 3.1), where two are left; last the
    fine energy under the smallest and under the largest size."""
    sizes = DIVERSITY_SIZES[name]
    made = [torch.cat([x for x, _ in sampler.images(seeds, {"size": f"{size}x{size}"})]) for size in sizes]
    pairs = [(i, j) for j in range(len(sizes)) for i in range(j)]
    found = torch.stack([network(made[i], made[j]).cpu() for i, j in pairs], dim=1)
    columns = [found.mean(dim=1)]
    sharp = [k for k, (i, _) in enumerate(pairs) if sizes[i] >= sampler.run.data.resolution]
    if name == "lpips" and sharp:
        columns.append(found[:, sharp].mean(dim=1))
    return {name: {"rows": torch.stack([*columns, *(fine_energy(made[k]).to(found) for k in (0, -1))], dim=1)}}


def fine_energy(images: Tensor) -> Tensor:
    """Mean square, by image, of what halving an image and enlarging it again takes away."""
    images = images.double()
    restored = F.interpolate(F.avg_pool2d(images, 2), size=images.shape[2:], mode="bilinear")
    return (images - restored).square().mean(dim=(1, 2, 3)).cpu()
