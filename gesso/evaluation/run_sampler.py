"""Samples of a run by seed, and their features.

Legend: n seeds, H W height and width.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gesso import conditioning, rng, sampling, snapshot
from gesso.config import RunConfig
from gesso.data.normalization import Normalizer
from gesso.data.sources import open_source
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.evaluation.metrics.base import Metric
from gesso.evaluation.networks.base import FeatureNetwork, SampleConditions


class Prompt(NamedTuple):
    """A caption, and the class of the image that it belongs to."""

    caption: str
    label: int


def load_prompts(run: RunConfig) -> list[Prompt] | None:
    """Return the captions of eval.prompts, or of the training images; None for a run without text."""
    if run.semantic.kind != "text":
        return None
    uri = run.eval.prompts or run.data.source
    source = open_source(uri)
    pairs = zip(source.captions(), source.labels.tolist(), strict=True)
    prompts = [Prompt(caption, label) for caption, label in pairs if caption]
    if not prompts:
        raise UsageError(f"eval.prompts={uri} has no captions: name a source with captions")
    return prompts


def sample_labels(run: RunConfig, seeds: Sequence[int]) -> list[int] | None:
    """Return the label of each seed by eval.labels; None for a run without classes."""
    classes = conditioning.trained_classes(run)
    if not classes or run.eval.labels == "round_robin":
        return conditioning.expand_labels(run, None, seeds)
    u = rng.uniform(run.eval.seed, torch.tensor(list(seeds)), "label of a sample")[:, 0]
    return [classes[i] for i in (u * len(classes)).long().tolist()]


def with_sample_settings(run: RunConfig, **values: object) -> RunConfig:
    """Return the run with changed settings of `sample`, which are not validated again."""
    return run.model_copy(update={"sample": run.sample.model_copy(update=values)})


class RunSampler(NamedTuple):
    """Everything that samples of a run are generated with. control_rows: control variables of training samples."""

    run: RunConfig
    device: torch.device
    denoiser: Denoiser
    guide: Denoiser | None
    normalizer: Normalizer
    prompts: Sequence[Prompt] | None
    control_rows: Tensor | None

    def generate_batches(
        self, seeds: Sequence[int], control: Mapping[str, str] | None = None
    ) -> Iterator[tuple[Tensor, SampleConditions]]:
        """Yield batches of RGB samples (n, 3, H, W) uint8 on the device, and their conditions.

        Args:
            seeds: Seeds; a sample depends on its seed only.
            control: Control variables of all samples, as text.
        """
        labels, captions = sample_labels(self.run, seeds), None
        if self.prompts is not None:
            prompts = [self.prompts[seed % len(self.prompts)] for seed in seeds]
            captions = [prompt.caption for prompt in prompts]
        cond, _ = sampling.build_cond(self.run, seeds, self.control_rows, labels, captions, control)
        if self.prompts is not None:
            labels = [prompt.label for prompt in prompts]
        start = 0
        for images in sampling.generate(self.denoiser, self.run, seeds, cond, self.guide, self.normalizer):
            batch = slice(start, start + len(images))
            yield (
                images.expand(-1, 3, -1, -1).to(self.device),
                SampleConditions(labels and labels[batch], captions and captions[batch]),
            )
            start += len(images)


def open_run_sampler(folder: Path, run: RunConfig, denoiser: Denoiser, device: torch.device) -> RunSampler:
    """Return the sampler of a run folder with given weights. Raises UsageError if something is missing."""
    guide, normalizer = sampling.load_guide(folder, run), sampling.open_decoder(run)
    control_rows = snapshot.load_control_rows(folder)
    return RunSampler(run, device, denoiser, guide, normalizer, load_prompts(run), control_rows)


def sample_features(
    sampler: RunSampler, networks: Mapping[str, FeatureNetwork], seeds: Sequence[int], names: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Return the features of the samples of these seeds under the networks in `names`."""
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    for images, conditions in sampler.generate_batches(seeds):
        for name in names:
            features[name].append(networks[name].extract_features(images, conditions))
    return {name: {"rows": torch.cat(parts)} for name, parts in features.items()}


def diversity_distances(
    sampler: RunSampler, metric: Metric, network: nn.Module, seeds: Sequence[int], names: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Return distances between samples of one seed under different original sizes, rows (n, 3 or 4).

    The columns are the mean distance of all pairs of sizes; that of pairs without sizes below the resolution of the
    run (Berrada et al. Section 3.1), for LPIPS if there are any; the detail energy at the smallest and largest size.
    """
    sizes = metric.sizes
    samples = [
        torch.cat([images for images, _ in sampler.generate_batches(seeds, {"size": f"{size}x{size}"})])
        for size in sizes
    ]
    pairs = [(i, j) for j in range(len(sizes)) for i in range(j)]
    distances = torch.stack([network(samples[i], samples[j]).cpu() for i, j in pairs], dim=1)
    columns = [distances.mean(dim=1)]
    high_resolution = [k for k, (i, _) in enumerate(pairs) if sizes[i] >= sampler.run.data.resolution]
    if f"{metric.name}_hr" in metric.labels and high_resolution:
        columns.append(distances[:, high_resolution].mean(dim=1))
    energies = [detail_energy(samples[k]).to(distances) for k in (0, -1)]
    return {name: {"rows": torch.stack([*columns, *energies], dim=1)} for name in names}


def detail_energy(images: Tensor) -> Tensor:
    """Return the mean square (n,) of what halving each image and enlarging it again removes."""
    images = images.double()
    restored = F.interpolate(F.avg_pool2d(images, 2), size=images.shape[2:], mode="bilinear")
    return (images - restored).square().mean(dim=(1, 2, 3)).cpu()
