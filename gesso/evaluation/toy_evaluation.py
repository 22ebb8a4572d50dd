"""Toy metrics (eval.toy_metrics): small networks that gesso ships, on all samples of a small data set in memory.

`gesso evaluate RUN`, `gesso ema --sweep` and the monitor of training use them. Each evaluation is an entry of
metrics.json, whose protocol has the `series` guided, unguided or ema_sweep.

Legend: n samples, N training images, H W height and width.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gesso import atomic_io, conditioning, ema, sampling, snapshot
from gesso.config import RunConfig
from gesso.data.base import Dataset
from gesso.data.factory import is_named_source, open_dataset
from gesso.data.normalization import Normalizer
from gesso.data.shapes_dataset import parse_caption
from gesso.data.sources.base import format_names
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.evaluation import ema_export, results
from gesso.evaluation.feature_stats import FeatureStats, Moments, Progress, ProgressCallback
from gesso.evaluation.metrics import METRICS, TOY_METRICS, half_splits
from gesso.evaluation.metrics.base import MetricInputs
from gesso.evaluation.networks import load_networks
from gesso.evaluation.networks.base import SampleConditions
from gesso.evaluation.results import Evaluation
from gesso.evaluation.run_sampler import with_sample_settings
from gesso.snapshot import ReconstructionPlan, TargetProfile

GRID_ROWS, GRID_COLUMNS = 10, 10
NUM_SHAPE_SAMPLES = 1000
"""Number of samples whose drawn shapes are read."""
MAX_REAL_IMAGES = 4096
"""Number of training images that are decoded for comparison, if they are not in memory."""
MAX_WEIGHTS_BYTES = 4e9
"""Bytes of EMA weights in memory at the same time."""
DESCRIPTIONS = {
    "digits": "Frechet distance and class accuracy in the features of a small digit classifier; not FID",
    "shapes": "share of images whose shapes match the caption or class",
    "none": "images only",
}


class ToyEvaluator:
    """Conditions of the samples of a run, and the toy metrics of such samples."""

    def __init__(
        self,
        run: RunConfig,
        dataset: Dataset,
        control_rows: Tensor | None,
        normalizer: Normalizer,
        device: torch.device,
    ):
        self.run, self.dataset, self.normalizer, self.device = run, dataset, normalizer, device
        limit = {"digits": len(dataset), "shapes": NUM_SHAPE_SAMPLES, "none": GRID_ROWS * GRID_COLUMNS}
        self.num_samples = min(len(dataset) // 2, limit[run.eval.toy_metrics])
        self.metrics = [METRICS[name] for name in TOY_METRICS[run.eval.toy_metrics]]
        self.networks = load_networks((metric.network for metric in self.metrics), run.eval, device, run.sample_size)
        # Conditions of samples: labels that cycle through the classes, or captions of training images.
        n = self.num_samples
        labels, indices = conditioning.expand_labels(run, None, range(n)), torch.arange(n) % len(dataset)
        prompts = [dataset.captions[i] for i in indices.tolist()] if run.semantic.kind == "text" else None
        self.cond, _ = sampling.build_cond(run, range(n), control_rows, labels, prompts)
        self.conditions = SampleConditions(labels or dataset.labels[indices].tolist(), prompts)

    @functools.cached_property
    def real_images(self) -> tuple[Tensor, Tensor]:
        """Training images (N, C, H, W) uint8 of the sampled size and their indices (N,).

        They are all images if that needs no decoding, else the first MAX_REAL_IMAGES.
        """
        run, dataset = self.run, self.dataset
        indices = dataset.indices_of_size(*run.sample_size) if run.data.buckets else torch.arange(len(dataset))
        if not len(indices):
            raise UsageError(
                f"no image of {run.data.source} has the sampled size {run.sample_size}: set sample.aspect to one that "
                "the data has"
            )
        indices = indices if dataset.is_cheap and not dataset.has_latents else indices[:MAX_REAL_IMAGES]
        parts = [self.normalizer.to_pixels(dataset.reference_images(part)) for part in indices.split(64)]
        return torch.cat(parts), indices

    def _features(self, images: Tensor, conditions: SampleConditions) -> dict[str, FeatureStats]:
        """Return the features of images under each network, which reads all of them in one batch."""
        images = images.to(self.device)
        return {
            name: FeatureStats(Moments(), network.extract_features(images, conditions))
            for name, network in self.networks.items()
        }

    @functools.cached_property
    def _real_features(self) -> dict[str, FeatureStats]:
        images, indices = self.real_images
        if self.run.eval.toy_metrics == "shapes":  # slow to read; half_splits needs all images
            images, indices = images[: self.num_samples], indices[: self.num_samples]
        captions = [self.dataset.captions[i] for i in indices.tolist()] if self.conditions.captions else None
        return self._features(images, SampleConditions(self.dataset.labels[indices].tolist(), captions))

    def values(self, images: Tensor) -> dict[str, float]:
        """Return the metrics of samples (n, C, H, W) uint8 that were generated with `cond`."""
        features = self._features(images, self.conditions)
        values: dict[str, float] = {}
        for metric in self.metrics:
            inputs = MetricInputs(features[metric.network], self.run.eval)
            if "training_images" in metric.needs:
                inputs = inputs._replace(reference=self._real_features[metric.network])
            values |= metric.compute(metric.name, inputs)
        return values

    @functools.cached_property
    def reference_values(self) -> dict[str, float]:
        """Metrics of training images: values that perfect samples would reach."""
        values: dict[str, float] = {}
        for metric in self.metrics:
            real = self._real_features[metric.network]
            if metric.compute is half_splits.compute:
                values |= half_splits.floor(metric.name, real.features, self.num_samples, self.run.eval)
            else:
                values |= metric.compute(metric.name, MetricInputs(real, self.run.eval))
        return values

    def protocol(self, run: RunConfig, nimg: int, series: str, repeat: int = 0) -> dict[str, Any]:
        """Return everything that decides a number besides the training, for samples with the settings of `run`."""
        cfg, n = self.run.eval, self.num_samples
        halves = (
            f"{cfg.num_splits} random halves of the {self.run.data.num_images} training images, {n} each; mean and std"
        )
        return results.base_protocol(run, nimg, self.networks) | {
            "toy_metrics": cfg.toy_metrics,
            "description": DESCRIPTIONS[cfg.toy_metrics],
            "series": series,
            "repeat": repeat,
            "num_samples": n,
            "num_repeats": 1,
            "conditions": "captions of training images" if self.run.semantic.kind == "text" else "labels round-robin",
            "seeds": f"{repeat * n} to {(repeat + 1) * n - 1}",
            **({"reference": halves} if cfg.toy_metrics == "digits" else {}),
        }


class Point(NamedTuple):
    """One evaluation: weights, sampling settings and seeds. extra: further protocol entries."""

    target: TargetProfile
    run: RunConfig
    series: str
    repeat: int = 0
    extra: dict[str, Any] = {}


def point_evaluation(evaluator: ToyEvaluator, plan: ReconstructionPlan, point: Point) -> Evaluation:
    """Return the evaluation of a point without its values."""
    protocol = evaluator.protocol(point.run, plan.nimg, point.series, point.repeat) | point.extra
    return Evaluation(protocol, results.describe_weights(plan, point.target))


def run_points(
    folder: Path,
    evaluator: ToyEvaluator,
    plan: ReconstructionPlan,
    points: Sequence[Point],
    guide: Denoiser | None,
    progress: Callable[[int], None],
) -> Iterator[tuple[Point, Tensor, Evaluation]]:
    """Evaluate points and record each in metrics.json.

    Yields:
        Each point with its samples (n, C, H, W) uint8 and its evaluation; the points of one target come together.
    """
    targets = list(dict.fromkeys(point.target for point in points))
    group_size = max(1, int(MAX_WEIGHTS_BYTES / plan.sources[-1].path.stat().st_size))
    for first in range(0, len(targets), group_size):
        group = targets[first : first + group_size]
        weights = snapshot.reconstruct(plan._replace(targets=group), evaluator.device)
        for target, tensors in zip(group, weights, strict=True):
            denoiser = snapshot.denoiser_from_weights(tensors, evaluator.run, evaluator.device)
            for point in [point for point in points if point.target == target]:
                images = _generate(evaluator, denoiser, point, guide, progress)
                evaluation = point_evaluation(evaluator, plan, point)
                if evaluator.metrics:
                    metrics = results.single_values(evaluator.values(images))
                    evaluation = evaluation._replace(metrics=metrics, reference_metrics=evaluator.reference_values)
                    results.record_evaluation(folder, evaluation)
                yield point, images, evaluation


def _generate(
    evaluator: ToyEvaluator, denoiser: Denoiser, point: Point, guide: Denoiser | None, progress: Callable[[int], None]
) -> Tensor:
    """Return the samples of a point; repeats have other seeds under the same conditions."""
    n, run, batches = evaluator.num_samples, point.run, []
    seeds = range(point.repeat * n, (point.repeat + 1) * n)
    guide = guide if run.sample.guidance != 1 else None
    for batch in sampling.generate(denoiser, run, seeds, evaluator.cond, guide, evaluator.normalizer):
        batches.append(batch)
        progress(len(batch))
    return torch.cat(batches)


def evaluate(folder: Path, run: RunConfig, progress: ProgressCallback) -> list[str]:
    """Evaluate a run with and without guidance and, for digits, over EMA lengths. Returns the lines to print.

    Writes metrics.json, sheets/by_class.png and sheets/nearest.png.
    """
    cfg = run.eval
    evaluator = open_toy_evaluator(folder, run)
    if cfg.toy_metrics == "shapes" and evaluator.conditions.captions is not None:
        for caption in evaluator.conditions.captions:
            parse_caption(caption)  # raises UsageError before any sample is generated
    target, guided = ema.sampling_profile(run.sample), run.sample.guidance != 1
    points = [Point(target, run, "guided")] if guided else []
    if evaluator.metrics or not guided:
        points.append(Point(target, with_sample_settings(run, guidance=1.0, control_guidance=1.0), "unguided"))
    if cfg.toy_metrics == "digits":
        for sigma_rel in cfg.sweep_sigma_rels:
            values = {"guidance": cfg.sweep_guidance, "control_guidance": 1.0, "steps": cfg.sweep_steps}
            settings = with_sample_settings(run, **values, sigma_rel=sigma_rel, halflife=None)
            points.append(Point(ema.PowerProfile(sigma_rel), settings, "ema_sweep"))
    targets = list(dict.fromkeys(point.target for point in points))
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(folder), targets, cfg.nimg)
    counter = Progress(progress, evaluator.num_samples * len(points))
    # Only one command computes the points; an equal one waits for it and returns its result.
    with atomic_io.lock(folder / "sheets") as has_waited:
        evaluations = _recorded_points(folder, evaluator, plan, points) if has_waited else []
        if not evaluations:
            guide = sampling.load_guide(folder, run)
            for point, images, evaluation in run_points(folder, evaluator, plan, points, guide, counter):
                if point is points[0]:
                    _save_image_grids(folder, run, images, evaluator.real_images[0])
                evaluations.append((point, evaluation))
    rows = {
        f"guidance {point.run.sample.guidance:g}": evaluation.best()
        for point, evaluation in evaluations
        if point.series != "ema_sweep"
    }
    warnings = [*_used_images(evaluator.dataset), *ema_export.accuracy_warnings(plan)]
    if not evaluator.metrics:
        sheets = "by_class.png and nearest.png, the nearest training images"
        return [*warnings, f"wrote samples and their nearest training images: {sheets}, in {folder / 'sheets'}"]
    table = results.format_table(rows | {"training images": evaluator.reference_values})
    return [*table, *warnings, f"wrote {folder / results.FILE_NAME}"]


def _recorded_points(
    folder: Path, evaluator: ToyEvaluator, plan: ReconstructionPlan, points: Sequence[Point]
) -> list[tuple[Point, Evaluation]]:
    """Return the points with their evaluations in metrics.json; empty unless it has all of them."""
    recorded = results.read_evaluations(folder)
    keys = [point_evaluation(evaluator, plan, point).key for point in points]
    if not evaluator.metrics or not recorded.keys() >= set(keys):
        return []
    return [(point, recorded[key]) for point, key in zip(points, keys, strict=True)]


def open_toy_evaluator(folder: Path, run: RunConfig) -> ToyEvaluator:
    """Return the toy evaluator of a run folder. Raises UsageError if the training images have changed."""
    atomic_io.check_run_folder(folder, "sheets")
    dataset = open_dataset(run.data, run.latent, run.train.seed)
    if dataset.fingerprint() != run.data.fingerprint:
        raise UsageError(
            f"the images in {run.data.source} are not those that {folder} was trained on: restore them, or name a "
            "copy with data.source=PATH"
        )
    sampling.check_sampling(run)
    control_rows, normalizer = snapshot.load_control_rows(folder), sampling.open_decoder(run)
    return ToyEvaluator(run, dataset, control_rows, normalizer, sampling.run_device(run))


def _used_images(dataset: Dataset) -> list[str]:
    """Return lines on the training images and on the files that are not among them."""
    if is_named_source(dataset.uri):
        return []
    lines = [f"training images: {len(dataset):,} of {dataset.uri}", *(f"note: {note}" for note in dataset.notes)]
    if dataset.unreadable:
        names = [f"{name} ({reason})" for name, reason in dataset.unreadable]
        lines.append(f"note: {len(names)} unreadable files are left out: {format_names(names)}")
    return lines


def _save_image_grids(folder: Path, run: RunConfig, samples: Tensor, real: Tensor) -> None:
    """Write sheets/by_class.png, with a row for each class, and sheets/nearest.png, the nearest real images."""
    classes = len(conditioning.trained_classes(run))
    if classes:
        rows = (range(label, len(samples), classes)[:GRID_COLUMNS] for label in range(min(classes, GRID_ROWS)))
        chosen = [i for row in rows for i in row]
    else:
        chosen = list(range(min(len(samples), GRID_ROWS * GRID_COLUMNS)))
    grid = samples[chosen]
    nearest = real[nearest_images(grid, real)]
    sampling.save_png(sampling.image_grid(grid, GRID_COLUMNS), folder / "sheets" / "by_class.png")
    sampling.save_png(sampling.image_grid(nearest, GRID_COLUMNS), folder / "sheets" / "nearest.png")


def nearest_images(images: Tensor, reference: Tensor, chunk_size: int = 1024) -> Tensor:
    """Return the index of the reference image nearest to each image in pixel L2, the first one among equals.

    Args:
        images: Images (n, ...) uint8, on a device with float64.
        reference: Images (N, ...) uint8 of the same shape, N >= 1.
        chunk_size: Images in a block; memory grows with chunk_size^2 and chunk_size * pixels.

    Returns:
        Indices (n,) int64 on the device of `images`.

    Raises:
        UsageError: The dtypes or shapes do not match.
    """
    if images.dtype != torch.uint8 or reference.dtype != torch.uint8:
        raise UsageError(f"nearest_images takes uint8 pixels; got {images.dtype} and {reference.dtype}")
    if images.shape[1:] != reference.shape[1:] or len(reference) == 0:
        raise UsageError(f"images {tuple(images.shape)} do not compare with {tuple(reference.shape)}")
    # |a - b|^2 = |a|^2 - 2ab + |b|^2 is a sum of integers: exact in float64, so equal images stay equal.
    indices = [torch.empty(0, dtype=torch.int64, device=images.device)]
    for a in images.flatten(1).double().split(chunk_size) if len(images) else ():
        best = torch.full((len(a),), torch.inf, dtype=torch.float64, device=a.device)
        index = torch.zeros(len(a), dtype=torch.int64, device=a.device)
        for start in range(0, len(reference), chunk_size):
            b = reference[start : start + chunk_size].to(a.device).flatten(1).double()
            distances = b.square().sum(dim=1) - 2 * a @ b.T  # |a|^2 is the same for every b
            value = distances.min(dim=1).values
            # argmax of a mask of 0 and 1: min() does not promise the first of equals.
            first = (distances == value[:, None]).byte().argmax(dim=1) + start
            closer = value < best
            best, index = torch.where(closer, value, best), torch.where(closer, first, index)
        indices.append(index)
    return torch.cat(indices)
