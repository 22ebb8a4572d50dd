"""Scores of a run over any number of samples, drawn and read a part at a time: `gesso evaluate RUN eval.metrics=fid,is`.

RUN/evaluation/KEY/     what networks found in parts of the samples (parts.py), until all are there
RUN/scores.json         every measurement, by KEY, with its protocol

A sample depends on its seed alone, and so does its part: any number of ranks share the parts, and after any stop the
same command goes on with those that are not there. KEY stands for the weights and for all that decides a sample.

Legend: N samples, D features.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gesso import atomic_io, ema, sampling, snapshot, torchrun
from gesso.config import RunConfig
from gesso.data.cache.format import is_cache, open_manifest
from gesso.data.factory import open_dataset
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import UsageError
from gesso.evaluation import feature_stats, image_sets, run_sampler, validation
from gesso.evaluation.feature_stats import CachedReference, FeatureStats, Progress, ProgressCallback
from gesso.evaluation.image_source import ImageSet, open_image_set
from gesso.evaluation.metrics import functional, toy_metrics
from gesso.evaluation.networks import lpips, toy_networks
from gesso.evaluation.networks.toy_networks import load_digit_features
from gesso.evaluation.run_sampler import DIVERSITY_SIZES, RunSampler
from gesso.evaluation.tasks import EvalContext, ShardedTask, Timing, load_features, run_task
from gesso.evaluation.validation import ValidationLoss

REFERENCE_PART_SIZE = 20_000
"""pictures of a reference whose moments make a file"""
REFERENCE_BATCH_SIZE = 64
"""of them that a network reads at once"""


def evaluate_metrics_of_run(folder: Path, run: RunConfig, progress: ProgressCallback) -> list[str]:
    """Measure run.eval.scores of a run folder, with the other processes of one torchrun where there are any."""
    rank, world, local, _ = torchrun.rank_from_env()
    device = sampling.run_device(run)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)  # of all that is put on "cuda": guides, VAEs
    averages = [run, *(_with_halflife(run, halflife) for halflife in run.eval.halflives)]
    if len(averages) == 1:
        return evaluate_metrics(EvalContext(folder, run, device, rank, world), progress)[1]
    lines: list[str] = []
    for each in averages:
        found = evaluate_metrics(EvalContext(folder, each, device, rank, world), progress)[1]
        lines += [f"average: {ema.sampling_profile(each.sample)}", *found] if found else []
    return lines


def _with_halflife(run: RunConfig, halflife: int) -> RunConfig:
    """Return the run as it is sampled with its traditional average of that half-life."""
    return run.model_copy(update={"sample": run.sample.model_copy(update={"halflife": halflife})})


def evaluate_metrics(context: EvalContext, progress: ProgressCallback) -> tuple[dict[str, Any], list[str]]:
    """Measure run.eval.metrics; return the entry of scores.json and the lines to show, on rank 0 only.

    Raises:
        UsageError: before any sample is generated, if the run or this machine lacks something that a metric needs.
    """
    run, cfg = context.run, context.run.eval
    judges = _metric_groups(context)
    reference = _open_reference(run) if any(judge.needs_reference for judge in judges) else None
    if reference:
        image_sets.check_kid_subset(
            cfg.metrics, cfg.kid_subset, [cfg.num_samples, reference.num_images], "eval.kid_subset"
        )
    validated = _open_validation(context) if "loss" in cfg.metrics else None
    target = context.ema_target or ema.sampling_profile(run.sample)
    weights, _, nimg, fits = snapshot.reconstruct_from_run(context.folder, [target], cfg.nimg)
    protocol = _protocol(context, nimg, judges, reference, validated)
    place = context.folder / "evaluation" / _protocol_key(context, protocol)
    denoiser = snapshot.denoiser_from_weights(weights[0], run, context.device)
    drawn, steps, notes = {}, {}, image_sets.kid_subset_note(protocol)
    if judges:
        draws = run_sampler.open_run_sampler(context.folder, run, denoiser, context.device)
        drawn, notes = _sample_tasks(draws, judges), [*notes, *_repeated_caption_note(run, draws.prompts)]
    if validated:
        compute_losses = functools.partial(_validation_losses, validated, denoiser)
        steps["loss"] = ShardedTask(("loss",), cfg.validation_pairs, compute_losses)
    beside = (
        {j.name: _reference_task(reference, j, context.device) for j in judges if j.needs_reference}
        if reference
        else {}
    )
    steps |= {f"reference of {name}": each.task for name, each in beside.items() if each.task}
    total = sum(step.count * (step.num_repeats - step.first_repeat) for step in (drawn | steps).values())
    seen = Progress(progress, total // context.world_size)
    spent = sum((run_task(context, step, place, seen) for step in drawn.values()), Timing())
    for step in steps.values():
        run_task(context, step, place, seen)
    if context.rank:
        return {}, []
    found: dict[str, list[float]] = {}
    for judge in judges:
        y = beside[judge.name].load_stats(place) if judge.name in beside else None
        found |= _compute_metrics(judge, run, drawn, y, place)
    if validated:
        found |= _loss_metrics(validated, steps["loss"], place)
    result = {
        "scores": {what: _summarize_repeats(what, found) for what in found},
        "protocol": protocol,
        "speed": spent.throughput(),
    }
    if context.ema_target is None:
        _write_result(context.folder / "scores.json", place.name, result)
    atomic_io.remove_dir(place)
    poor = fits[0].squared_error > sampling.MAX_PROFILE_ERROR**2
    warnings = [f"warning: the stored snapshots cannot reconstruct {target} accurately: {fits[0]}"] * poor
    return result, [
        *warnings,
        *_format_result(result),
        *notes,
        *image_sets.few_samples_note(cfg.num_samples, cfg.metrics, {j.name: j.network for j in judges}),
    ]


def _repeated_caption_note(run: RunConfig, prompts: Sequence[run_sampler.Prompt] | None) -> list[str]:
    """A note where a protocol draws more samples than there are captions: those on COCO have one sample for each."""
    if run.eval.protocol is None or prompts is None or run.eval.num_samples <= len(prompts):
        return []
    return [
        f"note: {run.eval.num_samples:,} samples of {len(prompts):,} captions, so some are drawn for more than once; "
        f"eval.num_samples={len(prompts)} draws for each once"
    ]


class MetricGroup(NamedTuple):
    """A network, and those of eval.metrics that are made of what it makes of samples."""

    name: str
    network: nn.Module
    metrics: tuple[str, ...]

    @property
    def task_name(self) -> str:
        """Which samples: of those told different sizes its own."""
        return self.name if self.name in DIVERSITY_SIZES else "samples"

    def num_repeats(self, run: RunConfig) -> int:
        """How often samples are drawn for it."""
        return max(num_repeats_of(score, run) for score in self.metrics)

    @property
    def needs_reference(self) -> bool:
        """With a reference."""
        return not set(self.metrics) <= set(image_sets.NO_REFERENCE)


def num_repeats_of(metric: str, run: RunConfig) -> int:
    """How often a score is measured, each time on other seeds."""
    cfg = run.eval
    return cfg.num_repeats if not cfg.repeated or metric in cfg.repeated else 1


def _metric_groups(context: EvalContext) -> list[MetricGroup]:
    run, cfg = context.run, context.run.eval
    asked = image_sets.ImageEvalArgs(
        str(context.folder),
        weights_dir=Path(cfg.weights_dir) if cfg.weights_dir else None,
        inception=cfg.inception,
        lpips=cfg.lpips,
        dinov2=cfg.dinov2,
        clip=cfg.clip,
    )
    if "clip" in cfg.metrics and run.semantic.kind != "text":
        raise UsageError("eval.metrics=clip needs a run with words; this one has none")
    by: dict[str, list[str]] = {}
    for score in cfg.metrics:
        if score != "loss":
            by.setdefault(image_sets.METRIC_NETWORKS[score], []).append(score)
    judges = [
        MetricGroup(name, _load_network(name, asked, run, context.device), tuple(scores)) for name, scores in by.items()
    ]
    for name in DIVERSITY_SIZES.keys() & by.keys():
        _check_diversity(run, name)
    return judges


def _sample_tasks(sampler: RunSampler, groups: Sequence[MetricGroup]) -> dict[str, ShardedTask]:
    """What is made of samples, by Judge.step."""
    cfg = sampler.run.eval
    of_samples = [judge for judge in groups if judge.name not in DIVERSITY_SIZES]
    networks = {judge.name: judge.network for judge in of_samples}
    again = {judge.name: judge.network for judge in of_samples if judge.num_repeats(sampler.run) > 1}
    found = {
        judge.task_name: ShardedTask((judge.name,), cfg.diversity_prompts, functools.partial(run_sampler.diversity_distances, sampler, judge.name, judge.network))
        for judge in groups
        if judge.name in DIVERSITY_SIZES
    }  # fmt: skip
    if networks:
        made = functools.partial(run_sampler.sample_features, sampler, networks)
        found["samples"] = ShardedTask(
            tuple(networks), cfg.num_samples, made, cfg.num_repeats if again == networks else 1
        )
    if again and again != networks:
        made = functools.partial(run_sampler.sample_features, sampler, again)
        found["repeats"] = ShardedTask(tuple(again), cfg.num_samples, made, cfg.num_repeats, first_repeat=1)
    return found


class ReferenceTask(NamedTuple):
    """What the scores of a judge compare with: kept from another time, or read first."""

    cached: CachedReference
    task: ShardedTask | None

    def load_stats(self, parts_dir: Path) -> FeatureStats:
        if self.task is None:
            return feature_stats.load_stats(self.cached.path)
        found = feature_stats.merge_stats(
            map(feature_stats.load_stats, self.task.part_files(parts_dir, *self.task.names))
        )
        self.cached.write(found)
        return found


def _reference_task(reference: ImageSet, group: MetricGroup, device: torch.device) -> ReferenceTask:
    rows = image_sets.needs_reference_features(group.metrics)
    kept, name = feature_stats.cached_reference(reference, group.network, rows), f"reference-{group.name}"

    def made(some: range) -> dict[str, dict[str, Tensor]]:
        part = feature_stats.compute_stats(
            reference, group.network, REFERENCE_BATCH_SIZE, rows, device, lambda n: None, some
        )
        return {name: part.to_tensors()}

    # Caches of several machines may differ: the first rank makes what the others see no need to.
    step = ShardedTask((name,), reference.num_images, made, part_size=REFERENCE_PART_SIZE, work_stealing=True)
    return ReferenceTask(kept, None if kept.path.is_file() else step)


def _compute_metrics(
    group: MetricGroup, run: RunConfig, tasks: dict[str, ShardedTask], reference: FeatureStats | None, parts_dir: Path
) -> dict[str, list[float]]:
    """Numbers of one judge by name, each over its repeats."""
    found: dict[str, list[float]] = {}
    first = tasks[group.task_name]
    for repeat in range(1 if group.name in DIVERSITY_SIZES else group.num_repeats(run)):
        step = first if repeat < first.num_repeats else tasks["repeats"]
        x = load_features(step.part_files(parts_dir, group.name, repeat))
        for score in group.metrics:
            if repeat < num_repeats_of(score, run):
                for what, value in image_sets.compute_metric(
                    score, x, reference, group.network, run.eval.kid_subset
                ).items():
                    found.setdefault(what, []).append(value)
    return found


def _open_validation(context: EvalContext) -> ValidationLoss:
    """Of eval.validation_source, else of what the run was validated on. Raises UsageError where it has nothing."""
    run, setting = (
        context.run,
        "eval.validation_source" if context.run.eval.validation_source else "monitor.validation_source",
    )
    dataset = open_dataset(run.data, run.latent, run.train.seed)
    held = validation.open_validation_set(run, dataset, setting)
    if held is None:
        raise UsageError(
            "eval.metrics=loss needs images that were not trained on: name them by eval.validation_source=DIR (or train with "
            "data.num_validation=N)"
        )
    return ValidationLoss(run, *held, context.device, run.eval.validation_pairs)


def _validation_losses(
    validation_loss: ValidationLoss, denoiser: Denoiser, pairs: range
) -> dict[str, dict[str, Tensor]]:
    passes = map(validation_loss.load_batch, validation_loss.split(torch.tensor(pairs)))
    return {"loss": {"rows": validation_loss.losses(denoiser, passes)[pairs.start : pairs.stop, None]}}


def _loss_metrics(validation_loss: ValidationLoss, task: ShardedTask, parts_dir: Path) -> dict[str, list[float]]:
    """The mean, and by tenths of the training draw from clean to noise: loss_0_10, ..., loss_90_100."""
    mean, by_level = validation_loss.mean_losses(load_features(task.part_files(parts_dir, "loss")).features[:, 0])
    width = 100 // len(by_level)
    named = {f"loss_{width * i}_{width * (i + 1)}": value for i, value in enumerate(by_level)}
    return {name: [value] for name, value in ({"loss": mean} | named).items() if value is not None}


def _open_reference(run: RunConfig) -> ImageSet:
    """Open the pictures that samples are compared with: eval.reference, else those that the run was trained on.

    Those of a cache are read from its source and prepared as it was: the same filter, faces blurred where it has them blurred.
    """
    height, width = run.sample_size
    if height != width:
        raise UsageError(f"eval.metrics are of squares, and {width}x{height} is sampled: set sample.aspect=null")
    where, resize, blur = run.eval.reference or run.data.source, run.data.resize, False
    if is_cache(where):
        plan = open_manifest(where).plan
        where, resize, blur = plan.data.source, plan.data.resize, plan.blur_faces
    return open_image_set(where, height, resize=run.eval.resize or resize, blur_faces=blur)


def _check_diversity(run: RunConfig, name: str) -> None:
    """Raise UsageError where the run cannot be told sizes, or draws too small for LPIPS."""
    if "size" not in run.control.variables:
        said = next(score for score, network in image_sets.METRIC_NETWORKS.items() if network == name)
        raise UsageError(
            f"eval.metrics={said} compares samples told different sizes; this run has no control variable size"
        )
    if name == "lpips" and min(run.sample_size) < lpips.MIN_SIZE:
        raise UsageError(
            f"eval.metrics=lpips needs {lpips.MIN_SIZE}x{lpips.MIN_SIZE} and more; this run draws {run.sample_size[1]}x{run.sample_size[0]}"
        )


def _load_network(name: str, args: image_sets.ImageEvalArgs, run: RunConfig, device: torch.device) -> nn.Module:
    """A network, or a judge that knows what the samples of this run were told."""
    if name == "agreement":
        if not run.input_spec.num_classes and run.semantic.kind != "text":
            raise UsageError("eval.metrics=agreement needs a run with classes or words; this one has neither")
        is_fashion = run.sample_size == (toy_networks.FashionFeatures.resolution,) * 2
        load = toy_networks.load_fashion_features if is_fashion else load_digit_features
        return toy_metrics.ClassAccuracy(load(str(device)))
    if name == "told":
        return toy_metrics.FeatureDistance(load_digit_features(str(device)))
    return (
        toy_metrics.ShapeAccuracy(run.semantic.kind == "text")
        if name == "drawn"
        else image_sets.load_network(name, args, device)
    )


def _protocol(
    context: EvalContext,
    nimg: int,
    groups: Sequence[MetricGroup],
    reference: ImageSet | None,
    validation_loss: ValidationLoss | None,
) -> dict[str, Any]:
    """All that decides a number."""
    run, cfg = context.run, context.run.eval
    told: dict[str, Any] = {
        "name": cfg.protocol,
        "networks": {judge.name: judge.network.name for judge in groups},
        "nimg": nimg,
    }
    told |= run.sample.model_dump(mode="json", exclude={"batch_size"})
    told |= {
        "images": cfg.num_samples, "diversity_seeds": cfg.diversity_prompts, "repeats": cfg.num_repeats, "first_seed": 0,
        "labels": cfg.labels if run.input_spec.num_classes else None,
        "prompts": (cfg.prompts or run.data.source) if run.semantic.kind == "text" else None,
        "reference": reference.uri if reference else None, "reference_images": reference.num_images if reference else None,
        "reference_pictures": reference.fingerprint if reference else None,
        "reference_resized": reference.resize_description if reference else None,
    }  # fmt: skip
    if cfg.num_repeats > 1 and cfg.repeated:
        told["repeated"] = list(cfg.repeated)
    if cfg.kid_subset != functional.KID_SUBSET_SIZE and {"kid", "kd_dinov2"} & set(cfg.metrics):
        told["kid_subset"] = cfg.kid_subset
    if reference and reference.blur_faces:
        told["reference_faces"] = "blurred"
    if validation_loss:
        told |= {
            "validation": cfg.validation_source or run.monitor.validation_source or f"{run.data.source}, held out",
            "validation_pictures": validation_loss.dataset.fingerprint(),
            "loss_pairs": cfg.validation_pairs,
        }
    return told | ({"average": str(context.ema_target)} if context.ema_target else {})


def _protocol_key(context: EvalContext, protocol: dict[str, Any]) -> str:
    """Of the weights and of all that decides a sample; how many are drawn apart."""
    used = [
        (s.path.name, s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in snapshot.list_snapshots(context.folder)
    ]
    return hashlib.sha256(json.dumps([protocol, used], sort_keys=True).encode()).hexdigest()[:12]


def _summarize_repeats(name: str, values_by_name: dict[str, list[float]]) -> dict[str, float | list[float]]:
    """Return all values of a score, the best in its own direction, and their mean; of a spread that of the best value."""
    values = values_by_name[name]
    ranked = values_by_name.get(name.removesuffix("_std"), values)
    choose = min if image_sets.lower_is_better(name) else max
    best = choose(range(len(values)), key=lambda repeat: ranked[repeat])
    return {"values": values, "best": values[best], "mean": sum(values) / len(values)}


def _write_result(path: Path, key: str, result: dict[str, Any]) -> None:
    with atomic_io.lock(path):
        known = json.loads(path.read_text()) if path.is_file() else {}
        atomic_io.write_json(path, known | {key: result})


def _format_result(result: dict[str, Any]) -> list[str]:
    protocol, lines = result["protocol"], []
    by_noise = [found["mean"] for name, found in result["scores"].items() if name.startswith("loss_")]
    for name, found in result["scores"].items():
        if name.endswith("_std") or name.startswith("loss_"):
            continue
        each = ", ".join(f"{value:.4f}" for value in found["values"])
        best = f"   best of {len(found['values'])}: {found['best']:.4f}" if len(found["values"]) > 1 else ""
        lines.append(f"{name:20}{each}{best}")
    if by_noise:
        lines.append(
            f"{'  by noise':20}{' '.join(f'{value:.3g}' for value in by_noise)}   (tenths of the training draw, clean to noise)"
        )
        lines.append(f"{protocol['loss_pairs']:,} pairs of an image of {protocol['validation']} and a noise level")
    reference = f" beside {protocol['reference_images']:,} of {protocol['reference']}" if protocol["reference"] else ""
    said = f" by the protocol {protocol['name']}" if protocol["name"] else ""
    if protocol["networks"]:
        lines.append(f"{protocol['images']:,} samples{reference}{said}; {', '.join(protocol['networks'].values())}")
    if speed := result["speed"]:
        energy = f", {speed['milliwatt_hours']:.3g} mWh each" if "milliwatt_hours" in speed else ""
        lines.append(f"{speed['images_per_second']:.3g} samples a second, drawn and read{energy}")
    return lines
