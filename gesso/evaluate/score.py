"""Score a run: class agreement and Frechet distance with their floor, and quality against EMA length.

Writes metrics.json and pictures; reads nothing but the run folder and the images it was trained on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gesso import conditions, ema, files, generate, keyed, snapshot
from gesso.cond import Cond
from gesso.config import Run
from gesso.data.dataset import open_dataset
from gesso.data.samples import Dataset
from gesso.data.space import Space
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.evaluate import features, measure, metrics, shapes

Say = Callable[[str], None]
Score = Callable[[Tensor], dict[str, float]]
"""of images (n, C, H, W) uint8"""
ROWS, COLUMNS = 10, 10
DRAWN = 1000
"""pictures of shapes that are read back"""
NEAR = 4096
"""training images that are read for comparison where they are not in memory"""


def evaluate_folder(folder: Path, run: Run, tick: Callable[[int, int], None]) -> list[str]:
    """Score a run folder; returns the lines to show. Raises UsageError when its images have changed since."""
    if run.eval.scores:
        return measure.measure_folder(folder, run, tick)
    images = open_dataset(run.data, run.latent, run.train.seed)
    if images.fingerprint() != run.data.fingerprint:
        raise UsageError(f"the images in {run.data.source} are not those that {folder} was trained on")
    result = evaluate(folder, run, images, generate.device_of(run), tick)
    if run.eval.features == "shapes":
        return _rates(run, result)
    if run.eval.features == "none":
        return ["no feature network for these images (eval.features=none): wrote pictures, no metrics"]
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


def evaluate(
    folder: Path, run: Run, images: Dataset, device: torch.device, tick: Callable[[int, int], None]
) -> dict[str, Any]:
    """Score the run in `folder` with the settings of `run` and write metrics.json and samples/*.png.

    tick(done, total) counts generated images. Returns what metrics.json holds.
    """
    cfg = run.eval
    sweeping = cfg.features == "digits"
    if cfg.features == "shapes" and run.semantic.kind == "text":
        for caption in images.captions[:DRAWN]:
            shapes.parse(caption)  # raises UsageError before any picture is made
    count = number(run, images)
    profiles = [ema.chosen(run.sample), *(map(ema.Power, cfg.sweep) if sweeping else ())]
    weights, _, nimg, fits = snapshot.synthesize(folder, profiles)
    default = snapshot.denoiser(weights[0], run, device)
    cond, labels = conditions_of(run, images, count, snapshot.control_rows(folder))
    guided = run.sample.guidance != 1
    settings = {"guided": run} if guided else {}
    settings["unguided"] = _with(run, guidance=1.0, control_guidance=1.0)
    if cfg.features == "none":
        settings = dict(list(settings.items())[:1])
    total = count * (len(settings) + (len(cfg.sweep) if sweeping else 0))
    space = generate.opened_space(run)
    counter = Counter(tick, total, cond, generate.guide_of(folder, run), space)
    real = real_pictures(space, images, run)

    made = {name: counter.generate(default, setting, count) for name, setting in settings.items()}
    _pictures(folder, run, next(iter(made.values())), real)
    result: dict[str, Any] = {"protocol": protocol(run, nimg, count)}
    if cfg.features == "shapes":
        result |= {name: read_back(run, some, images, labels) for name, some in made.items()}
        result["real"] = read_back(run, real[:count], images, images.labels[:count])
    if cfg.features == "digits":
        score = Scorer(features.load_digit_features(str(device)), run, real, images.labels, labels, device)
        rows = {name: score(some) for name, some in made.items()}
        quick, sweep = _with(run, guidance=cfg.sweep_guidance, control_guidance=1.0, steps=cfg.sweep_steps), []
        for sigma_rel, tensors, fit in zip(cfg.sweep, weights[1:], fits[1:], strict=True):
            some = counter.generate(snapshot.denoiser(tensors, run, device), quick, count)
            told = {"sigma_rel": sigma_rel, "profile_error": fit.error, "initial_weight": fit.initial}
            sweep.append(told | score(some))
        result |= rows.pop("guided") if guided else rows["unguided"]
        result |= rows if guided else {}
        result |= {"floor": score.floor, "real": {"class_agreement": score.real_agreement}}
        how = {"guidance": cfg.sweep_guidance, "sampler": run.sample.sampler, "steps": cfg.sweep_steps}
        result["ema_sweep"] = how | {"rows": sweep}
    files.write_json(folder / "metrics.json", result)
    return result


def number(run: Run, images: Dataset) -> int:
    """How many images are drawn for each score."""
    return min(len(images) // 2, {"digits": len(images), "shapes": DRAWN, "none": ROWS * COLUMNS}[run.eval.features])


def scorer(run: Run, images: Dataset, real: Tensor, labels: Tensor, device: torch.device) -> Score:
    """Scores by name of samples of these labels, with nothing drawn beside them. real: as `real_pictures`."""
    if run.eval.features == "shapes":
        return lambda made: read_back(run, made, images, labels)
    return Scorer(features.load_digit_features(str(device)), run, real, images.labels, labels, device)


def real_pictures(space: Space, images: Dataset, run: Run) -> Tensor:
    """(n, C, H, W) uint8: training images, all of them where that takes no decoding, else the first NEAR.

    Raises UsageError when there are none of the size that is sampled.
    """
    index = images.alike(*run.canvas) if run.data.buckets else torch.arange(len(images))
    if not len(index):
        raise UsageError(f"no image of {run.data.source} has the size {run.canvas} that is sampled: set sample.aspect")
    index = index if images.immediate and not images.latents else index[:NEAR]
    return torch.cat([space.shown(images.pictures(some)) for some in index.split(64)])


def read_back(run: Run, pictures: Tensor, images: Dataset, labels: Tensor) -> dict[str, float]:
    """How often the shapes of pictures are those of their captions or classes."""
    if run.semantic.kind == "text":
        return shapes.agreement(pictures, images.captions[: len(pictures)])
    return shapes.class_agreement(pictures, labels)


def _rates(run: Run, result: dict[str, Any]) -> list[str]:
    """A table of what was read back."""
    rows = {f"guidance {run.sample.guidance:g}": "guided", "unguided": "unguided", "real pictures": "real"}
    lines = ["".join(["what is drawn".ljust(18), *(name.rjust(9) for name in result["real"])])]
    return lines + [
        "".join([title.ljust(18), *(f"{rate:9.1%}" for rate in result[name].values())])
        for title, name in rows.items()
        if name in result
    ]


def conditions_of(run: Run, images: Dataset, count: int, rows: Tensor | None) -> tuple[Cond, Tensor]:
    """What samples 0 to count-1 are to show: labels in turn, or captions of training images; and their labels.

    rows: control variables of training samples, from which theirs are drawn.
    """
    seeds, prompts = range(count), None
    labels = conditions.labels_for(run, None, count)
    if run.semantic.kind == "text":
        prompts = [images.captions[i % len(images)] for i in seeds]
    cond, _ = conditions.build(run, seeds, rows, labels, prompts)
    return cond, images.labels[torch.arange(count) % len(images)] if labels is None else torch.tensor(labels)


WHAT = {
    "digits": "Frechet distance and class agreement in the features of a small digit classifier; not FID",
    "shapes": "share of pictures whose shapes, read back, are as the caption or class says",
    "none": "pictures only",
}


def protocol(run: Run, nimg: int, count: int) -> dict[str, Any]:
    """Everything that decides a number besides the weights."""
    halves = f"{run.eval.splits} random halves of the {run.data.num_images} training images, {count} each; mean and std"
    return {
        "features": features.DigitFeatures.name if run.eval.features == "digits" else run.eval.features,
        "what": WHAT[run.eval.features],
        "images": count,
        **({"reference": halves} if run.eval.features == "digits" else {}),
        "conditions": "captions of training images" if run.semantic.kind == "text" else "labels in turn",
        **run.sample.model_dump(mode="json", exclude={"batch_size"}),
        "nimg": nimg,
        "seeds": f"0 to {count - 1}",
    }


def _with(run: Run, **sample: Any) -> Run:
    return run.model_copy(update={"sample": run.sample.model_copy(update=sample)})


class Counter:
    """Generates under the same conditions with a common count of images done."""

    def __init__(self, tick: Callable[[int, int], None], total: int, cond: Cond, guide: Denoiser | None, space: Space):
        self.tick, self.total, self.done = tick, total, 0
        self.cond, self.guide, self.space = cond, guide, space

    def generate(self, denoiser: Denoiser, run: Run, count: int) -> Tensor:
        """Images of seeds 0 to count-1. (count, C, R, R) uint8."""
        batches = []
        for batch in generate.generate(denoiser, run, range(count), self.cond[:count], self.guide, self.space):
            batches.append(batch)
            self.done += len(batch)
            self.tick(self.done, self.total)
        return torch.cat(batches)


class Scorer:
    """Frechet distance to each of several random halves of the real images, and class agreement.

    `floor` is the distance of each half to its other half: what perfect samples would reach at this
    number of images.
    """

    def __init__(
        self,
        network: features.DigitFeatures,
        run: Run,
        pictures: Tensor,
        classes: Tensor,
        labels: Tensor,
        device: torch.device,
    ):
        self.network, self.device, count = network, device, len(labels)
        real, logits = network.classify(pictures.to(device))
        self.real_agreement = metrics.class_agreement(logits, classes.to(device))
        self.labels = labels.to(device)
        self.halves = []
        distances = []
        for split in range(run.eval.splits):
            order = keyed.words(run.eval.seed, torch.arange(len(pictures)), f"evaluation split {split}", 1)[
                :, 0
            ].argsort(stable=True)
            a, b = (metrics.Moments() for _ in range(2))
            a.update(real[order[:count]])
            b.update(real[order[count : 2 * count]])
            self.halves.append(b)
            distances.append(metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov))
        self.floor = _mean_std(distances)

    def __call__(self, made: Tensor) -> dict[str, float]:
        found, logits = self.network.classify(made.to(self.device))
        moments = metrics.Moments()
        moments.update(found)
        distances = [metrics.frechet_distance(moments.mean, moments.cov, b.mean, b.cov) for b in self.halves]
        return {"class_agreement": metrics.class_agreement(logits, self.labels), **_mean_std(distances)}


def _mean_std(distances: list[float]) -> dict[str, float]:
    values = torch.tensor(distances, dtype=torch.float64)
    return {"frechet_distance": float(values.mean()), "frechet_distance_std": float(values.std(correction=0))}


def _pictures(folder: Path, run: Run, made: Tensor, real: Tensor) -> None:
    """samples/by-class.png, a row for each of the first classes, and samples/nearest.png, the training images nearest to them."""
    classes = run.inputs.num_classes
    if classes:
        chosen = [i for c in range(min(classes, ROWS)) for i in range(c, len(made), classes)[:COLUMNS]]
    else:
        chosen = list(range(min(len(made), ROWS * COLUMNS)))
    shown = made[chosen]
    near = real[metrics.nearest(shown, real)]
    generate.save_png(generate.grid(shown, COLUMNS), folder / "samples" / "by-class.png")
    generate.save_png(generate.grid(near, COLUMNS), folder / "samples" / "nearest.png")
