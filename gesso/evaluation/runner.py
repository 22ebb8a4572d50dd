"""The runner of evaluations: `gesso evaluate` on a run and on sets of images.

RUN/evaluation/KEY/     features of parts of the samples (tasks.py), until the evaluation is complete
RUN/metrics.json        all evaluations with their protocols (results.py)

A sample depends on its seed only, and so does its part: any number of ranks share the parts, and after a stop the same
command computes those that are missing.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from gesso import atomic_io, config, devices, ema, sampling, snapshot
from gesso.config import EvalConfig, Resize, RunConfig
from gesso.data.cache.format import is_cache, open_manifest
from gesso.data.factory import check_replaced_source, open_dataset
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import GessoError, UsageError
from gesso.evaluation import feature_stats, results, run_sampler, toy_evaluation, validation
from gesso.evaluation.feature_stats import FeatureStats, Moments, Progress, ProgressCallback
from gesso.evaluation.image_sets import ImageSet, open_image_set, read_npz_arrays
from gesso.evaluation.metrics import kernel_distance, select_metrics
from gesso.evaluation.metrics.base import Metric, MetricInputs
from gesso.evaluation.networks import load_networks, lpips
from gesso.evaluation.networks.base import FeatureNetwork
from gesso.evaluation.networks.downloads import INCEPTION_FILES, local_path
from gesso.evaluation.results import Evaluation
from gesso.evaluation.run_sampler import RunSampler
from gesso.evaluation.tasks import EvalContext, ShardedTask, Timing, load_features, run_task
from gesso.evaluation.validation import ValidationLoss

REFERENCE_PART_SIZE = 20_000
"""Reference images whose statistics make one file."""
COVARIANCE_TOLERANCE = 1e-4
"""Largest asymmetry and negative eigenvalue of a stored covariance, relative to its largest value."""
REFERENCE_BATCH_SIZE = 64
"""Reference images in a batch of a feature network."""
DEFAULT_NUM_SAMPLES = 1000
"""Maximum number of samples and of validation pairs of the default metrics."""


def evaluate_run(
    folder: Path, run: RunConfig, progress: ProgressCallback, log: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Evaluate a run: eval.metrics, or eval.toy_metrics if there are none. Returns the lines to print.

    If there are neither, the metrics are those of `default_metrics`. Under torchrun all ranks share the work of
    eval.metrics, and the first one returns lines.

    Args:
        folder: Run folder.
        run: Settings of the run.
        progress: Called with the number of finished and of all items.
        log: Prints a line before the work starts.

    Raises:
        UsageError: The run or this machine lacks something that a metric needs.
    """
    if run.eval.metrics:
        return _evaluate_metrics_of_run(folder, run, progress)
    if run.eval.toy_metrics != "none":
        return toy_evaluation.evaluate(folder, run, progress)
    run, note = default_metrics(run)
    log(note)
    lines = toy_evaluation.evaluate(folder, run, progress)
    more = _evaluate_metrics_of_run(folder, run, progress) if run.eval.metrics else []
    return [*lines, *(line for line in more if line not in lines)]


def default_metrics(run: RunConfig) -> tuple[RunConfig, str]:
    """Return a run without metrics with those that need nothing else, and a note on them.

    They are the validation loss if there are validation images, and kid if the weights of Inception are on this
    machine, on at most DEFAULT_NUM_SAMPLES samples.
    """
    cfg, metrics, missing = run.eval, list[str](), list[str]()
    if run.data.num_validation or run.monitor.validation_source or cfg.validation_source:
        metrics.append("loss")
    else:
        missing.append("eval.validation_source=PATH, or data.num_validation=N in training, for a validation loss")
    weights = INCEPTION_FILES[cfg.inception]
    reference = None
    if local_path(weights, Path(cfg.weights_dir) if cfg.weights_dir else None).is_file():
        with contextlib.suppress(GessoError):
            reference = _open_reference(run)
    else:
        missing.append("eval.metrics=kid, which downloads Inception")
    changes: dict[str, object] = {"validation_pairs": min(cfg.validation_pairs, DEFAULT_NUM_SAMPLES)}
    if reference and reference.num_images > 1:
        metrics.append("kid")
        changes["num_samples"] = count = min(cfg.num_samples, reference.num_images, DEFAULT_NUM_SAMPLES)
        changes["kid_subset"] = min(cfg.kid_subset, count)
    run = run.model_copy(update={"eval": cfg.model_copy(update={"metrics": tuple(metrics), **changes})})
    measured = ", ".join([*metrics, "sheets of samples and nearest training images"])
    cure = f"; for more, set {'; '.join(missing)}" if missing else ""
    return run, f"no eval.metrics are set, so this makes: {measured}{cure}"


def _evaluate_metrics_of_run(folder: Path, run: RunConfig, progress: ProgressCallback) -> list[str]:
    rank, world_size, local_rank, _ = devices.rank_from_env()
    device = sampling.run_device(run)
    if device.type == "cuda" and world_size > 1:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # for everything that is put on "cuda": guides and VAEs
    lines: list[str] = []
    for halflife in (None, *run.eval.halflives):
        at_ema = run if halflife is None else run_sampler.with_sample_settings(run, halflife=halflife)
        evaluation = evaluate_metrics(EvalContext(folder, at_ema, device, rank, world_size), progress)
        if evaluation and run.eval.halflives:
            lines.append(f"EMA: {ema.sampling_profile(at_ema.sample)}")
        lines += results.format_evaluation(evaluation) if evaluation else []
    return [*lines, f"wrote {folder / results.FILE_NAME}"]


def evaluate_metrics(context: EvalContext, progress: ProgressCallback) -> Evaluation | None:
    """Compute run.eval.metrics, and record them unless `context.ema_target` is set. Returns None on ranks above 0.

    Raises:
        UsageError: The run or this machine lacks something that a metric needs; before any sample is generated.
    """
    run, cfg = context.run, context.run.eval
    atomic_io.check_run_folder(context.folder, "evaluation")
    metrics, _ = select_metrics(cfg.metrics), select_metrics(cfg.repeated)
    _check_run(run, metrics)
    check_replaced_source(run, config.load_config(context.folder / "run.yaml"))
    networks = load_networks((metric.network for metric in metrics), cfg, context.device, run.sample_size)
    reference = _open_reference(run) if any(metric.needs_reference for metric in metrics) else None
    if reference:
        kernel_distance.check_subset_size(metrics, cfg, [cfg.num_samples, reference.num_images])
    validation_loss = _open_validation(context) if any("validation" in metric.needs for metric in metrics) else None
    target = context.ema_target or ema.sampling_profile(run.sample)
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(context.folder), [target], cfg.nimg)
    denoiser = snapshot.denoiser_from_weights(snapshot.reconstruct(plan)[0], run, context.device)
    protocol = _protocol(context, plan.nimg, metrics, networks, reference, validation_loss)
    evaluation = Evaluation(protocol, results.describe_weights(plan, target))
    parts_dir = context.folder / "evaluation" / evaluation.key

    recorded = results.read_evaluations(context.folder).get(evaluation.key)
    # Only one command computes an evaluation; an equal one waits for it and returns its result.
    with atomic_io.lock(parts_dir, "computes") if context.rank == 0 else contextlib.nullcontext(False) as has_waited:
        current = results.read_evaluations(context.folder).get(evaluation.key) if has_waited else None
        if current and current != recorded:
            return current
        inputs = EvalInputs(metrics, networks, reference, validation_loss, denoiser)
        computed = _compute_evaluation(context, evaluation, inputs, parts_dir, progress)
    if computed is None:
        return None
    notes = list(computed.notes)
    fit = plan.worst_fit(target)
    if fit.squared_error > sampling.MAX_PROFILE_ERROR**2:
        notes.append(f"warning: the stored snapshots cannot reconstruct {target} accurately: {fit}")
    notes += _few_samples_note(cfg.num_samples, metrics, networks)
    return computed._replace(notes=(*notes, *(reference.notes() if reference else ())))


class EvalInputs(NamedTuple):
    """Metrics of an evaluation, and everything opened for them."""

    metrics: Sequence[Metric]
    networks: Mapping[str, FeatureNetwork]
    reference: ImageSet | None
    validation_loss: ValidationLoss | None
    denoiser: Denoiser


def _compute_evaluation(
    context: EvalContext, evaluation: Evaluation, inputs: EvalInputs, parts_dir: Path, progress: ProgressCallback
) -> Evaluation | None:
    """Run the tasks of an evaluation, compute its values and record them. Returns None on ranks above 0."""
    run, cfg = context.run, context.run.eval
    metrics, networks, reference, validation_loss, denoiser = inputs
    notes = kernel_distance.subset_size_note(metrics, cfg)
    tasks: dict[str, ShardedTask] = {}
    if networks:
        sampler = run_sampler.open_run_sampler(context.folder, run, denoiser, context.device)
        tasks = _sample_tasks(sampler, metrics, networks)
        notes += _repeated_caption_note(run, sampler.prompts)
    sample_tasks = list({id(task): task for task in tasks.values()}.values())  # networks share tasks
    if validation_loss:
        compute = functools.partial(validation_loss.features, denoiser)
        tasks["validation"] = ShardedTask({"validation": 1}, cfg.validation_pairs, compute)
    paths, reference_tasks = _reference_tasks(reference, metrics, networks, context.device) if reference else ({}, {})
    other_tasks = [*reference_tasks.values(), *(tasks[name] for name in ("validation",) if name in tasks)]
    total = sum(task.total_items for task in (*sample_tasks, *other_tasks))
    counter, timing = Progress(progress, total // context.world_size), Timing()
    for task in sample_tasks:
        timing = timing.add(run_task(context, task, parts_dir, counter))
    for task in other_tasks:
        run_task(context, task, parts_dir, counter)
    if context.rank:
        return None

    for name, task in reference_tasks.items():
        parts = map(feature_stats.load_stats, task.part_files(parts_dir, f"reference-{name}"))
        feature_stats.save_stats(paths[name], feature_stats.merge_stats(parts))
    values = _compute_values(run, metrics, networks, tasks, paths, parts_dir)
    evaluation = evaluation._replace(metrics=values, throughput=timing.throughput())
    if context.ema_target is None:
        results.record_evaluation(context.folder, evaluation)
    atomic_io.remove_dir(parts_dir)
    return evaluation._replace(notes=tuple(notes))


class ImageSetArgs(NamedTuple):
    """Arguments of `gesso evaluate --images`. config: metrics, reference and feature networks."""

    images: str
    config: EvalConfig
    resolution: int | None = None
    num_images: int | None = None
    device: str = "auto"
    out: Path | None = None
    batch_size: int = 64


def parse_image_args(settings: Sequence[str], flags: Mapping[str, Any]) -> ImageSetArgs:
    """Return the arguments of `gesso evaluate --images` from its flags. Raises UsageError if they are invalid."""
    if "images" not in flags:
        raise UsageError("nothing to evaluate: gesso evaluate RUN, or gesso evaluate --images DIR --ref DIR")
    if settings:
        raise UsageError(
            f"{settings[0]} is a setting of a run; with --images use flags such as --resolution, --metrics"
        )
    names = {"ref": "reference"} | {name: name for name in EvalConfig.model_fields}
    fields = {names[flag]: value for flag, value in flags.items() if flag in names}
    fields.setdefault("metrics", "fid")
    try:
        cfg = EvalConfig(**{name: str(value) if isinstance(value, Path) else value for name, value in fields.items()})
    except ValidationError as error:
        lines = [f"--{'.'.join(map(str, e['loc'])).replace('_', '-')} {e['input']}: {e['msg']}" for e in error.errors()]
        raise UsageError("\n  ".join(lines)) from None
    return ImageSetArgs(config=cfg, **{flag: value for flag, value in flags.items() if flag not in names})


def evaluate_images(args: ImageSetArgs, progress: ProgressCallback) -> tuple[Evaluation, list[str]]:
    """Evaluate a set of images, and write the result as JSON to `args.out`. Returns the lines to print too.

    Raises:
        UsageError: A metric needs something that is missing, or the sets do not compare.
        RunError: An image is unreadable.
    """
    cfg, device = args.config, devices.resolve_device(args.device, "--device ")
    metrics = select_metrics(cfg.metrics)
    for metric in metrics:
        if metric.needs_run:
            raise UsageError(f"{metric.name} is a metric of runs: gesso evaluate RUN eval.metrics={metric.name}")
        if metric.needs_reference and cfg.reference is None:
            raise UsageError(f"{metric.name} needs reference images: name them with --ref DIR")
    resize = cfg.resize or "lanczos"
    samples = _open_named_images("--images", args.images, args.resolution, args.num_images, resize)
    reference = _open_image_reference(args, samples, metrics)
    networks = load_networks((metric.network for metric in metrics), cfg, device, samples.size)
    sets = [images for images in (samples, reference) if isinstance(images, ImageSet)]
    kernel_distance.check_subset_size(metrics, cfg, [images.num_images for images in sets])
    counter = Progress(progress, sum(images.num_images for images in sets) * len(networks))
    values: dict[str, results.MetricValues] = {}
    for name, network in networks.items():
        group = [metric for metric in metrics if metric.network == name]
        compute = functools.partial(
            feature_stats.compute_stats, network=network, batch_size=args.batch_size, device=device, progress=counter
        )
        x = compute(samples, keep_features=any(metric.needs_features for metric in group))
        y = reference if isinstance(reference, FeatureStats) else FeatureStats(Moments())
        if isinstance(reference, ImageSet) and any(metric.needs_reference for metric in group):
            y = feature_stats.reference_stats(
                reference,
                network,
                any(m.needs_reference and m.needs_features for m in group),
                args.batch_size,
                device,
                counter,
            )
        for metric in group:
            values |= results.single_values(metric.compute(metric.name, MetricInputs(x, cfg, y, network)))
    protocol: dict[str, Any] = {
        "images": samples.uri, "num_samples": samples.num_images, "reference": cfg.reference,
        "reference_images": reference.num_images if isinstance(reference, ImageSet) else None,
        "size": list(samples.size), "resized": samples.resize_description,
        "networks": {name: network.name for name, network in networks.items()},
    }  # fmt: skip
    if kernel_distance.subset_size_note(metrics, cfg):
        protocol["kid_subset"] = cfg.kid_subset
    notes = [*kernel_distance.subset_size_note(metrics, cfg), *_few_samples_note(samples.num_images, metrics, networks)]
    notes += [note for images in sets for note in images.notes()]
    evaluation = Evaluation(protocol, metrics=values, notes=tuple(notes))
    lines = results.format_evaluation(evaluation)
    if args.out:
        atomic_io.write_json(args.out, evaluation.to_json())
        lines.append(f"wrote {args.out}")
    return evaluation, lines


def _check_run(run: RunConfig, metrics: Sequence[Metric]) -> None:
    """Raise UsageError if the run lacks a condition that a metric needs, or samples images that it cannot compare."""
    has_text = run.semantic.kind == "text"
    for metric in metrics:
        prefix = f"eval.metrics={metric.name}"
        if "captions" in metric.needs and not has_text:
            raise UsageError(f"{prefix} needs a run with text; this one has none")
        if "labels" in metric.needs and not has_text and not run.input_spec.num_classes:
            raise UsageError(f"{prefix} needs a run with classes or text; this one has neither")
        if metric.sizes and "size" not in run.control.variables:
            raise UsageError(
                f"{prefix} compares samples conditioned on different sizes; this run has no control variable size"
            )
        if metric.network == "lpips" and min(run.sample_size) < lpips.MIN_SIZE:
            raise UsageError(
                f"{prefix} needs images of {lpips.MIN_SIZE}x{lpips.MIN_SIZE} or more; this run samples "
                f"{run.sample_size[1]}x{run.sample_size[0]}"
            )


def metric_num_repeats(metric: Metric, cfg: EvalConfig) -> int:
    """Return how often a metric is computed, each time on other seeds."""
    repeatable = not metric.sizes and "validation" not in metric.needs
    return cfg.num_repeats if repeatable and (not cfg.repeated or metric.name in cfg.repeated) else 1


def _sample_tasks(
    sampler: RunSampler, metrics: Sequence[Metric], networks: Mapping[str, FeatureNetwork]
) -> dict[str, ShardedTask]:
    """Return the tasks that compute features of samples, by network. Networks without sizes share one task."""
    cfg, tasks = sampler.run.eval, {}
    num_repeats: dict[str, int] = {}
    for metric in metrics:
        if metric.sizes:
            compute = functools.partial(run_sampler.diversity_distances, sampler, metric, networks[metric.network])
            tasks[metric.network] = ShardedTask({metric.network: 1}, cfg.diversity_prompts, compute)
        elif metric.network in networks:
            repeats = metric_num_repeats(metric, cfg)
            num_repeats[metric.network] = max(repeats, num_repeats.get(metric.network, 0))
    if num_repeats:
        compute = functools.partial(run_sampler.sample_features, sampler, networks)
        tasks |= dict.fromkeys(num_repeats, ShardedTask(num_repeats, cfg.num_samples, compute))
    return tasks


def _compute_values(
    run: RunConfig,
    metrics: Sequence[Metric],
    networks: Mapping[str, FeatureNetwork],
    tasks: Mapping[str, ShardedTask],
    reference_paths: Mapping[str, Path],
    parts_dir: Path,
) -> dict[str, results.MetricValues]:
    """Return the values of all metrics over their repeats, from the parts of complete tasks."""
    values: dict[str, dict[str, list[float]]] = {metric.name: {} for metric in metrics}
    for name, task in tasks.items():
        group = [metric for metric in metrics if metric.network == name]
        path = reference_paths.get(name)
        y = feature_stats.load_stats(path) if path else FeatureStats(Moments())
        for repeat in range(task.num_repeats[name]):
            x = load_features(task.part_files(parts_dir, name, repeat))
            inputs = MetricInputs(x, run.eval, y, networks.get(name))
            for metric in group:
                if repeat < metric_num_repeats(metric, run.eval):
                    for key, value in metric.compute(metric.name, inputs).items():
                        values[metric.name].setdefault(key, []).append(value)
    summaries = [results.summarize(metric, values[metric.name]) for metric in metrics]
    return {key: entry for summary in summaries for key, entry in summary.items()}


# References.


def _open_reference(run: RunConfig) -> ImageSet:
    """Open the reference images: eval.reference, or the training images.

    The images of a cache are read from its source, and prepared as the cache was: with its filter and blurred faces.
    """
    height, width = run.sample_size
    if height != width:
        raise UsageError(f"eval.metrics need square images, but samples are {width}x{height}: set sample.aspect=null")
    uri, resize, blur_faces = run.eval.reference or run.data.source, run.data.resize, False
    max_unreadable = 0.0 if run.eval.reference else run.data.max_unreadable
    if is_cache(uri):
        plan = open_manifest(uri).plan
        uri, resize, blur_faces = plan.data.source, plan.data.resize, plan.blur_faces
    resize = run.eval.resize or resize
    return open_image_set(uri, height, resize=resize, blur_faces=blur_faces, max_unreadable=max_unreadable)


def _reference_tasks(
    reference: ImageSet, metrics: Sequence[Metric], networks: Mapping[str, FeatureNetwork], device: torch.device
) -> tuple[dict[str, Path], dict[str, ShardedTask]]:
    """Return the cache file of the reference under each network, and the tasks that compute those that are missing."""
    paths, tasks = {}, {}
    for name, network in networks.items():
        group = [metric for metric in metrics if metric.network == name and metric.needs_reference]
        if not group:
            continue
        needs_features = any(metric.needs_features for metric in group)
        paths[name] = feature_stats.reference_cache_path(reference, network, needs_features)
        if not paths[name].is_file():
            compute = functools.partial(_reference_part, reference, network, needs_features, device)
            # Caches of several machines may differ: the first rank computes what the others do not need.
            repeats = {f"reference-{name}": 1}
            tasks[name] = ShardedTask(repeats, reference.num_images, compute, REFERENCE_PART_SIZE, work_stealing=True)
    return paths, tasks


def _reference_part(
    reference: ImageSet,
    network: FeatureNetwork,
    needs_features: bool,
    device: torch.device,
    indices: range,
    names: Sequence[str],
) -> dict[str, dict[str, Tensor]]:
    stats = feature_stats.compute_stats(
        reference, network, REFERENCE_BATCH_SIZE, needs_features, device, lambda n: None, indices
    )
    return {name: stats.to_tensors() for name in names}


def _open_named_images(option: str, uri: str, resolution: int | None, limit: int | None, resize: Resize) -> ImageSet:
    """Open the images of an option of the command line, which errors name in place of data.source."""
    try:
        return open_image_set(uri, resolution, limit, resize)
    except UsageError as error:
        raise UsageError(str(error).replace(f"data.source={uri}", f"{option} {uri}")) from None


def _open_image_reference(
    args: ImageSetArgs, samples: ImageSet, metrics: Sequence[Metric]
) -> ImageSet | FeatureStats | None:
    """Return the reference of a set of images: images, or the statistics `mu` and `sigma` of an .npz file."""
    uri = args.config.reference
    if uri is None:
        return None
    if uri.endswith(".npz"):
        arrays = read_npz_arrays(uri, ("mu", "sigma"))
        if arrays:
            return _stats_from_npz(uri, metrics, *arrays)
    reference = _open_named_images("--ref", uri, args.resolution, None, args.config.resize or "lanczos")
    if reference.size != samples.size:
        raise UsageError(
            f"{args.images} is {samples.size[0]}x{samples.size[1]}, {uri} {reference.size[0]}x{reference.size[1]}: set "
            "--resolution to resize both"
        )
    return reference


def _stats_from_npz(uri: str, metrics: Sequence[Metric], mean: np.ndarray, cov: np.ndarray) -> FeatureStats:
    if names := [metric.name for metric in metrics if metric.needs_features]:
        raise UsageError(f"{uri} has a mean and a covariance only, but {names[0]} needs the images: set --ref to them")
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UsageError(f"{uri}: the shapes of mu {mean.shape} and sigma {cov.shape} do not match")
    if not len(mean) or mean.dtype.kind not in "fiu" or cov.dtype.kind not in "fiu":
        raise UsageError(f"{uri}: mu is {mean.dtype}, sigma {cov.dtype}; both must be real numbers")
    mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UsageError(f"{uri}: mu or sigma has NaN or infinity")
    scale = np.abs(cov).max()
    if np.abs(cov - cov.T).max() > COVARIANCE_TOLERANCE * scale:
        raise UsageError(f"{uri}: sigma is not symmetric, so it is no covariance")
    if np.linalg.eigvalsh((cov + cov.T) / 2)[0] < -COVARIANCE_TOLERANCE * scale:
        raise UsageError(f"{uri}: sigma has negative eigenvalues, so it is no covariance")
    return FeatureStats(Moments.from_mean_cov(torch.from_numpy(mean), torch.from_numpy(cov)))


def _open_validation(context: EvalContext) -> ValidationLoss:
    """Return the validation loss on eval.validation_source, or on the validation images of the run."""
    run = context.run
    setting = "eval.validation_source" if run.eval.validation_source else "monitor.validation_source"
    validation_set = validation.open_validation_set(run, open_dataset(run.data, run.latent, run.train.seed), setting)
    if validation_set is None:
        raise UsageError(
            "eval.metrics=loss needs images that were not trained on: name them with eval.validation_source=DIR, or "
            "train with data.num_validation=N"
        )
    return ValidationLoss(run, *validation_set, context.device, run.eval.validation_pairs)


# Protocol and notes.


def _protocol(
    context: EvalContext,
    nimg: int,
    metrics: Sequence[Metric],
    networks: Mapping[str, FeatureNetwork],
    reference: ImageSet | None,
    validation_loss: ValidationLoss | None,
) -> dict[str, Any]:
    """Return everything that decides a number besides the training."""
    run, cfg = context.run, context.run.eval
    protocol = results.base_protocol(run, nimg, networks)
    protocol |= {
        "num_samples": cfg.num_samples, "diversity_prompts": cfg.diversity_prompts, "num_repeats": cfg.num_repeats,
        "first_seed": 0,
        "labels": cfg.labels if run.input_spec.num_classes else None,
        "prompts": (cfg.prompts or run.data.source) if run.semantic.kind == "text" else None,
        "reference": reference.uri if reference else None,
        "reference_images": reference.num_images if reference else None,
        "reference_fingerprint": reference.fingerprint if reference else None,
        "reference_resized": reference.resize_description if reference else None,
    }  # fmt: skip
    if cfg.num_repeats > 1 and cfg.repeated:
        protocol["repeated"] = list(cfg.repeated)
    if kernel_distance.subset_size_note(metrics, cfg):
        protocol["kid_subset"] = cfg.kid_subset
    if reference and reference.blur_faces:
        protocol["reference_faces"] = "blurred"
    if validation_loss:
        source = cfg.validation_source or run.monitor.validation_source or f"{run.data.source}, held out"
        fingerprint = validation_loss.dataset.fingerprint()
        protocol |= {
            "validation": source, "validation_fingerprint": fingerprint, "validation_pairs": cfg.validation_pairs
        }  # fmt: skip
    return protocol | ({"ema_target": str(context.ema_target)} if context.ema_target else {})


def _repeated_caption_note(run: RunConfig, prompts: Sequence[run_sampler.Prompt] | None) -> list[str]:
    """Return a note if a protocol has more samples than captions; published ones on COCO have one sample for each."""
    if run.eval.protocol is None or prompts is None or run.eval.num_samples <= len(prompts):
        return []
    return [
        f"note: {run.eval.num_samples:,} samples of {len(prompts):,} captions, so some captions have several; "
        f"eval.num_samples={len(prompts)} has one sample for each"
    ]


def _few_samples_note(num_samples: int, metrics: Sequence[Metric], networks: Mapping[str, FeatureNetwork]) -> list[str]:
    """Return a note if a Frechet distance has no more samples than features."""
    widths = [networks[metric.network].num_features for metric in metrics if metric.compares_moments]
    width = max(widths, default=0)
    if num_samples > width:
        return []
    return [
        f"note: {num_samples:,} samples do not determine a covariance of {width:,} features: Frechet distances of so "
        "few are far too large, and compare only at equal numbers of samples"
    ]
