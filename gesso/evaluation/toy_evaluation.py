"""Score a run: class agreement and Frechet distance with their floor, and quality against EMA length.

Writes metrics.json and pictures; reads nothing but the run folder and the images it was trained on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gesso import atomic_io, build_conditions, ema, rng, sampling, snapshot
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.data.base import Dataset
from gesso.data.factory import open_dataset
from gesso.data.normalization import Normalizer
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.evaluation import runner
from gesso.evaluation.metrics import functional, shapes_reader
from gesso.evaluation.networks import toy_networks

LogCallback = Callable[[str], None]
MetricFn = Callable[[Tensor], dict[str, float]]
"""of images (n, C, H, W) uint8"""
GRID_ROWS, GRID_COLUMNS = 10, 10
NUM_SHAPE_SAMPLES = 1000
"""pictures of shapes that are read back"""
MAX_REAL_IMAGES = 4096
"""training images that are read for comparison where they are not in memory"""


def evaluate_run(folder: Path, run: RunConfig, progress: Callable[[int, int], None]) -> list[str]:
    """Score a run folder; returns the lines to show. Raises UsageError when its images have changed since."""
    if run.eval.metrics:
        return runner.evaluate_metrics_of_run(folder, run, progress)
    images = open_dataset(run.data, run.latent, run.train.seed)
    if images.fingerprint() != run.data.fingerprint:
        raise UsageError(f"the images in {run.data.source} are not those that {folder} was trained on")
    result = compute_toy_metrics(folder, run, images, sampling.run_device(run), progress)
    if run.eval.toy_metrics == "shapes":
        return _shape_table(run, result)
    if run.eval.toy_metrics == "none":
        return ["no feature network for these images (eval.toy_metrics=none): wrote pictures, no metrics"]
    lines = [f"{'':22}class agreement   Frechet distance"]
    rows = {f"guidance {run.sample.guidance:g}": result, "unguided": result.get("unguided")}
    for name, row in rows.items():
        if row:
            lines.append(
                f"{name:22}{row['class_agreement']:14.1%}   {row['frechet_distance']:.3f} +- {row['frechet_distance_std']:.3f}"
            )
    floor = result["floor"]
    real = result["real"]["class_agreement"]
    lines.append(
        f"{'real against real':22}{real:14.1%}   {floor['frechet_distance']:.3f} +- {floor['frechet_distance_std']:.3f}"
    )
    return lines


def compute_toy_metrics(
    folder: Path, run: RunConfig, dataset: Dataset, device: torch.device, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Score the run in `folder` with the settings of `run` and write metrics.json and samples/*.png.

    tick(done, total) counts generated images. Returns what metrics.json holds.
    """
    cfg = run.eval
    sweeping = cfg.toy_metrics == "digits"
    if cfg.toy_metrics == "shapes" and run.semantic.kind == "text":
        for caption in dataset.captions[:NUM_SHAPE_SAMPLES]:
            shapes_reader.parse_caption(caption)  # raises UsageError before any picture is made
    count = num_samples(run, dataset)
    profiles = [ema.sampling_profile(run.sample), *(map(ema.PowerProfile, cfg.sweep_sigma_rels) if sweeping else ())]
    weights, _, nimg, fits = snapshot.reconstruct_from_run(folder, profiles)
    default = snapshot.denoiser_from_weights(weights[0], run, device)
    cond, labels = sample_conditions(run, dataset, count, snapshot.load_control_rows(folder))
    guided = run.sample.guidance != 1
    settings = {"guided": run} if guided else {}
    settings["unguided"] = _with_sample_settings(run, guidance=1.0, control_guidance=1.0)
    if cfg.toy_metrics == "none":
        settings = dict(list(settings.items())[:1])
    total = count * (len(settings) + (len(cfg.sweep_sigma_rels) if sweeping else 0))
    space = sampling.open_decoder(run)
    counter = SampleGenerator(progress, total, cond, sampling.load_guide(folder, run), space)
    real = reference_images(space, dataset, run)

    made = {name: counter.generate(default, setting, count) for name, setting in settings.items()}
    _save_image_grids(folder, run, next(iter(made.values())), real)
    result: dict[str, Any] = {"protocol": describe_protocol(run, nimg, count)}
    if cfg.toy_metrics == "shapes":
        result |= {name: shape_accuracy(run, some, dataset, labels) for name, some in made.items()}
        result["real"] = shape_accuracy(run, real[:count], dataset, dataset.labels[:count])
    if cfg.toy_metrics == "digits":
        score = DigitMetrics(toy_networks.load_digit_features(str(device)), run, real, dataset.labels, labels, device)
        rows = {name: score(some) for name, some in made.items()}
        quick, sweep = (
            _with_sample_settings(run, guidance=cfg.sweep_guidance, control_guidance=1.0, steps=cfg.sweep_steps),
            [],
        )
        for sigma_rel, tensors, fit in zip(cfg.sweep_sigma_rels, weights[1:], fits[1:], strict=True):
            some = counter.generate(snapshot.denoiser_from_weights(tensors, run, device), quick, count)
            told = {"sigma_rel": sigma_rel, "profile_error": fit.squared_error, "initial_weight": fit.initial_weight}
            sweep.append(told | score(some))
        result |= rows.pop("guided") if guided else rows["unguided"]
        result |= rows if guided else {}
        result |= {"floor": score.floor, "real": {"class_agreement": score.real_accuracy}}
        how = {"guidance": cfg.sweep_guidance, "sampler": run.sample.sampler, "steps": cfg.sweep_steps}
        result["ema_sweep"] = how | {"rows": sweep}
    atomic_io.write_json(folder / "metrics.json", result)
    return result


def num_samples(run: RunConfig, dataset: Dataset) -> int:
    """How many images are drawn for each score."""
    return min(
        len(dataset) // 2,
        {"digits": len(dataset), "shapes": NUM_SHAPE_SAMPLES, "none": GRID_ROWS * GRID_COLUMNS}[run.eval.toy_metrics],
    )


def toy_metric_fn(run: RunConfig, dataset: Dataset, real: Tensor, labels: Tensor, device: torch.device) -> MetricFn:
    """Scores by name of samples of these labels, with nothing drawn beside them. real: as `real_pictures`."""
    if run.eval.toy_metrics == "shapes":
        return lambda made: shape_accuracy(run, made, dataset, labels)
    return DigitMetrics(toy_networks.load_digit_features(str(device)), run, real, dataset.labels, labels, device)


def reference_images(normalizer: Normalizer, dataset: Dataset, run: RunConfig) -> Tensor:
    """(n, C, H, W) uint8: training images, all of them where that takes no decoding, else the first NEAR.

    Raises UsageError when there are none of the size that is sampled.
    """
    index = dataset.indices_of_size(*run.sample_size) if run.data.buckets else torch.arange(len(dataset))
    if not len(index):
        raise UsageError(
            f"no image of {run.data.source} has the size {run.sample_size} that is sampled: set sample.aspect"
        )
    index = index if dataset.is_cheap and not dataset.has_latents else index[:MAX_REAL_IMAGES]
    return torch.cat([normalizer.to_pixels(dataset.reference_images(some)) for some in index.split(64)])


def shape_accuracy(run: RunConfig, samples: Tensor, dataset: Dataset, labels: Tensor) -> dict[str, float]:
    """How often the shapes of pictures are those of their captions or classes."""
    if run.semantic.kind == "text":
        return shapes_reader.caption_accuracy(samples, dataset.captions[: len(samples)])
    return shapes_reader.class_accuracy(samples, labels)


def _shape_table(run: RunConfig, result: dict[str, Any]) -> list[str]:
    """A table of what was read back."""
    rows = {f"guidance {run.sample.guidance:g}": "guided", "unguided": "unguided", "real pictures": "real"}
    lines = ["".join(["what is drawn".ljust(18), *(name.rjust(9) for name in result["real"])])]
    return lines + [
        "".join([title.ljust(18), *(f"{rate:9.1%}" for rate in result[name].values())])
        for title, name in rows.items()
        if name in result
    ]


def sample_conditions(
    run: RunConfig, dataset: Dataset, num_samples: int, control_rows: Tensor | None
) -> tuple[Cond, Tensor]:
    """What samples 0 to count-1 are to show: labels in turn, or captions of training images; and their labels.

    rows: control variables of training samples, from which theirs are drawn.
    """
    seeds, prompts = range(num_samples), None
    labels = build_conditions.expand_labels(run, None, num_samples)
    if run.semantic.kind == "text":
        prompts = [dataset.captions[i % len(dataset)] for i in seeds]
    cond, _ = build_conditions.build_cond(run, seeds, control_rows, labels, prompts)
    return cond, dataset.labels[torch.arange(num_samples) % len(dataset)] if labels is None else torch.tensor(labels)


TOY_METRIC_DESCRIPTIONS = {
    "digits": "Frechet distance and class agreement in the features of a small digit classifier; not FID",
    "shapes": "share of pictures whose shapes, read back, are as the caption or class says",
    "none": "pictures only",
}


def describe_protocol(run: RunConfig, nimg: int, num_samples: int) -> dict[str, Any]:
    """Everything that decides a number besides the weights."""
    halves = f"{run.eval.num_splits} random halves of the {run.data.num_images} training images, {num_samples} each; mean and std"
    return {
        "features": toy_networks.DigitFeatures.name if run.eval.toy_metrics == "digits" else run.eval.toy_metrics,
        "what": TOY_METRIC_DESCRIPTIONS[run.eval.toy_metrics],
        "images": num_samples,
        **({"reference": halves} if run.eval.toy_metrics == "digits" else {}),
        "conditions": "captions of training images" if run.semantic.kind == "text" else "labels in turn",
        **run.sample.model_dump(mode="json", exclude={"batch_size"}),
        "nimg": nimg,
        "seeds": f"0 to {num_samples - 1}",
    }


def _with_sample_settings(run: RunConfig, **sample: Any) -> RunConfig:
    return run.model_copy(update={"sample": run.sample.model_copy(update=sample)})


class SampleGenerator:
    """Generates under the same conditions with a common count of images done."""

    def __init__(
        self,
        progress: Callable[[int, int], None],
        total: int,
        cond: Cond,
        guide: Denoiser | None,
        normalizer: Normalizer,
    ):
        self.progress, self.total, self.done = progress, total, 0
        self.cond, self.guide, self.normalizer = cond, guide, normalizer

    def generate(self, denoiser: Denoiser, run: RunConfig, num_samples: int) -> Tensor:
        """Images of seeds 0 to count-1. (count, C, R, R) uint8."""
        batches = []
        for batch in sampling.generate(
            denoiser, run, range(num_samples), self.cond[:num_samples], self.guide, self.normalizer
        ):
            batches.append(batch)
            self.done += len(batch)
            self.progress(self.done, self.total)
        return torch.cat(batches)


class DigitMetrics:
    """Frechet distance to each of several random halves of the real images, and class agreement.

    `floor` is the distance of each half to its other half: what perfect samples would reach at this
    number of images.
    """

    def __init__(
        self,
        network: toy_networks.DigitFeatures,
        run: RunConfig,
        real_images: Tensor,
        real_labels: Tensor,
        labels: Tensor,
        device: torch.device,
    ):
        self.network, self.device, count = network, device, len(labels)
        real, logits = network.classify(real_images.to(device))
        self.real_accuracy = functional.class_accuracy(logits, real_labels.to(device))
        self.labels = labels.to(device)
        self.reference_halves = []
        distances = []
        for split in range(run.eval.num_splits):
            order = rng.random_bits(run.eval.seed, torch.arange(len(real_images)), f"evaluation split {split}", 1)[
                :, 0
            ].argsort(stable=True)
            a, b = (functional.Moments() for _ in range(2))
            a.update(real[order[:count]])
            b.update(real[order[count : 2 * count]])
            self.reference_halves.append(b)
            distances.append(functional.frechet_distance(a.mean, a.cov, b.mean, b.cov))
        self.floor = _mean_std(distances)

    def __call__(self, samples: Tensor) -> dict[str, float]:
        found, logits = self.network.classify(samples.to(self.device))
        moments = functional.Moments()
        moments.update(found)
        distances = [
            functional.frechet_distance(moments.mean, moments.cov, b.mean, b.cov) for b in self.reference_halves
        ]
        return {"class_agreement": functional.class_accuracy(logits, self.labels), **_mean_std(distances)}


def _mean_std(distances: list[float]) -> dict[str, float]:
    values = torch.tensor(distances, dtype=torch.float64)
    return {"frechet_distance": float(values.mean()), "frechet_distance_std": float(values.std(correction=0))}


def _save_image_grids(folder: Path, run: RunConfig, samples: Tensor, real: Tensor) -> None:
    """samples/by_class.png, a row for each of the first classes, and samples/nearest.png, the training images nearest to them."""
    classes = run.input_spec.num_classes
    if classes:
        chosen = [i for c in range(min(classes, GRID_ROWS)) for i in range(c, len(samples), classes)[:GRID_COLUMNS]]
    else:
        chosen = list(range(min(len(samples), GRID_ROWS * GRID_COLUMNS)))
    shown = samples[chosen]
    near = real[functional.nearest_images(shown, real)]
    sampling.save_png(sampling.image_grid(shown, GRID_COLUMNS), folder / "samples" / "by_class.png")
    sampling.save_png(sampling.image_grid(near, GRID_COLUMNS), folder / "samples" / "nearest.png")
