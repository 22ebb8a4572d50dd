"""Quality against EMA length: `gesso ema --sweep` (EDM2 Figures 5a to 5c and 6).

Every point is an evaluation in metrics.json with the series ema_sweep; a point that is recorded is not evaluated again.
RUN/ema_sweep.png is the plot.
"""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gesso import config, ema, sampling, snapshot
from gesso.config import EDM2Config, EDM2LadderConfig, RunConfig
from gesso.ema import PerTensorProfile, PowerProfile
from gesso.errors import UsageError, install_command
from gesso.evaluation import ema_curves, results, toy_evaluation
from gesso.evaluation.ema_export import parse_image_count, parse_sigma_rel, sweep_warnings
from gesso.evaluation.feature_stats import Progress, ProgressCallback
from gesso.evaluation.metrics import METRIC_OF_VALUE, METRICS, TOY_METRICS, short_label
from gesso.evaluation.networks.toy_networks import CLASS_CHECKS
from gesso.evaluation.results import Evaluation
from gesso.evaluation.run_sampler import with_sample_settings
from gesso.evaluation.toy_evaluation import Point
from gesso.interop import edm2
from gesso.published.edm2 import FIGURE_5B_LAYERS
from gesso.snapshot import TargetProfile

POINT_KEYS = ("sigma_rel", "halflife", "tensors", "rest", "guidance", "repeat", "seeds")
"""Protocol keys in which points of one sweep differ."""


class EmaSweepArgs(NamedTuple):
    """Arguments of `gesso ema --sweep`, as typed."""

    sweep: str
    metric: str | None = None
    guidance: str | None = None
    tensors: Sequence[str] = ()
    sigma_rels: Sequence[float] = ()
    nimg: str | None = None
    num_repeats: int = 1


def parse_sweep(text: str) -> list[float]:
    """Return the lengths of LOW:HIGH:COUNT, at equal ratios, to four decimals."""
    try:
        first, last, number = text.split(":")
        low, high, n = float(first), float(last), int(number)
    except ValueError:
        raise UsageError(f"--sweep {text}: write LOW:HIGH:COUNT, such as .02:.25:12") from None
    if not 0 < low < high < 12**-0.5 or n < 3:
        raise UsageError(f"--sweep {text}: lengths must rise, lie between 0 and {12**-0.5:.4f}, and be 3 or more")
    grid = [round(float(value), 4) for value in np.geomspace(low, high, n)]
    if grid[0] <= 0 or len(set(grid)) < n:
        raise UsageError(f"--sweep {text}: {n} lengths from {low:g} to {high:g} are equal to four decimals: use fewer")
    return grid


def select_metric(run: RunConfig, name: str | None) -> str:
    """Return the name of the number to plot, by default the first of eval.toy_metrics.

    Raises:
        UsageError: eval.toy_metrics has no such number.
    """
    toy_metrics = run.eval.toy_metrics
    known = [label for metric in TOY_METRICS[toy_metrics] for label in METRICS[metric].labels]
    if toy_metrics == "shapes" and run.semantic.kind != "text":
        known = [label for label in known if label in CLASS_CHECKS]
    if not known:
        raise UsageError(f"eval.toy_metrics={toy_metrics} has no metric for --sweep: set it to digits or shapes")
    if name and name not in known:
        raise UsageError(f"--metric {name}: eval.toy_metrics={toy_metrics} has {', '.join(known)}")
    return name or known[0]


def runs_at_guidance(run: RunConfig, text: str | None) -> list[RunConfig]:
    """Return the run at each guidance scale of `1,1.5,2`, or at its own scale for None."""
    try:
        values = [float(part) for part in text.split(",")] if text else [run.sample.guidance]
    except ValueError:
        raise UsageError(f"--guidance {text}: write numbers such as 1,1.5,2") from None
    tree = config.to_dict(run)
    return [config.resolve(tree, [f"sample.guidance={value}"])[0] for value in dict.fromkeys(values)]


def sweep_points(runs: Iterable[RunConfig], args: EmaSweepArgs) -> list[Point]:
    """Return the points of a sweep for runs that differ in guidance.

    They have every length for all tensors; with globs, for the tensors of each glob alone (EDM2 Figure 5b).
    """
    return [
        Point(target, with_sample_settings(run, sigma_rel=sigma_rel, halflife=None), "ema_sweep", repeat, extra)
        for run in runs
        for sigma_rel, target, extra in _sweep_targets(run, args)
        for repeat in range(args.num_repeats)
    ]


def _sweep_targets(run: RunConfig, args: EmaSweepArgs) -> list[tuple[float, TargetProfile, dict[str, Any]]]:
    """Return lengths, weights to reconstruct, and protocol entries that name the varied tensors."""
    grid = parse_sweep(args.sweep)
    if not args.tensors:
        return [(s, PowerProfile(s), {}) for s in grid]
    if any("=" in glob for glob in args.tensors):
        raise UsageError(f"--tensors {args.tensors[0]}: with --sweep write the GLOB alone; the sweep sets its lengths")
    if len(args.sigma_rels) > 1:
        raise UsageError("--sigma-rel is the length of all other tensors: give only one")
    rest = parse_sigma_rel(args.sigma_rels[0]) if args.sigma_rels else ema.sampling_profile(run.sample)
    return [
        (s, PerTensorProfile(rest, ((glob, PowerProfile(s)),)), {"tensors": name, "rest": str(rest)})
        for name, glob in _tensor_globs(run, args.tensors).items()
        for s in grid
    ]


def _tensor_globs(run: RunConfig, requested: Sequence[str]) -> dict[str, str]:
    """Return globs by name: a glob is its own name; an EDM2 U-Net also has layers of Appendix D.6, or all: figure5b."""
    globs: dict[str, str] = {}
    for text in requested:
        net = run.net if isinstance(run.net, EDM2Config | EDM2LadderConfig) else None
        if text == "figure5b" and net is None:
            raise UsageError(
                f"--tensors figure5b: these are layers of EDM2's U-Net; for {run.net.name} write globs such as '*attn*'"
            )
        names = FIGURE_5B_LAYERS if text == "figure5b" else [text]
        layers = {name: edm2.name_of_paper_layer(name, net, run.input_spec) if net else None for name in names}
        globs |= {name: glob for name, glob in layers.items() if glob} or {text: text}
    return globs


def run_ema_sweep(folder: Path, run: RunConfig, args: EmaSweepArgs, progress: ProgressCallback) -> list[str]:
    """Evaluate a run at every length and guidance scale. Returns the lines to print.

    Raises:
        UsageError: A point cannot be evaluated; before any work.
    """
    name, runs = select_metric(run, args.metric), runs_at_guidance(run, args.guidance)
    points = sweep_points(runs, args)
    if args.sigma_rels and not args.tensors:
        raise UsageError(
            "--sigma-rel with --sweep is the length of the tensors that --tensors does not name: set --tensors"
        )
    if args.num_repeats < 1:
        raise UsageError(f"--num-repeats {args.num_repeats}: 1 or more")
    nimg = parse_image_count(args.nimg, "--nimg") if args.nimg else None
    evaluator = toy_evaluation.open_toy_evaluator(folder, run)
    targets = list(dict.fromkeys(point.target for point in points))
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(folder), targets, nimg)
    known = results.read_evaluations(folder)
    due = [point for point in points if toy_evaluation.point_evaluation(evaluator, plan, point).key not in known]
    guide = next((guide for run in runs if (guide := sampling.load_guide(folder, run))), None)
    counter = Progress(progress, len(due) * evaluator.num_samples)
    for _ in toy_evaluation.run_points(folder, evaluator, plan, due, guide, counter):
        pass
    recorded = results.read_evaluations(folder).values()
    evaluations = sweep_of(recorded, toy_evaluation.point_evaluation(evaluator, plan, points[0]))
    return [*sweep_warnings(plan), *_format_report(folder, evaluations, name, len(due))]


def sweep_of(recorded: Iterable[Evaluation], evaluation: Evaluation) -> list[Evaluation]:
    """Return the evaluations that belong to the sweep of one of them: they differ in POINT_KEYS only."""

    def identity(other: Evaluation) -> str:
        common = {key: value for key, value in other.protocol.items() if key not in POINT_KEYS}
        return json.dumps([common, other.weights["snapshots"]], sort_keys=True)

    points = [other for other in recorded if other.protocol.get("series") == "ema_sweep"]
    return [other for other in points if identity(other) == identity(evaluation)]


def _format_report(folder: Path, evaluations: Sequence[Evaluation], name: str, num_new: int) -> list[str]:
    """Return a table and the optimum of every curve, and write the plot."""
    metric, nimg, num_known = METRIC_OF_VALUE[name], evaluations[0].protocol["nimg"], len(evaluations) - num_new
    title, lower_is_better = metric.labels[name], metric.lower_is_better
    curves = ema_curves.build_curves([curve_row(evaluation) for evaluation in evaluations], name)
    lines = [f"{title}, image {nimg:,}" + (f" ({num_known} points evaluated before)" if num_known else "")]
    lines += ema_curves.curve_table(curves, lower_is_better)
    optima = {curve: ema_curves.find_optimum(points, lower_is_better) for curve, points in curves.items()}
    lines += [f"{curve}: {best}" for curve, best in optima.items()]
    files = [str(folder / results.FILE_NAME)]
    try:
        reference = evaluations[0].reference_metrics.get(name)
        path = ema_curves.plot_curves(curves, optima, short_label(name), reference, folder / "ema_sweep.png")
        files.append(str(path))
    except ImportError:
        lines.append(f"no plot: {install_command('plots')}")
    lines.append(f"wrote {', '.join(files)}")
    all_tensors = {float(curve.split()[1]): best for curve, best in optima.items() if "," not in curve}
    if all_tensors:
        sign = 1 if lower_is_better else -1
        guidance, best = min(all_tensors.items(), key=lambda item: sign * item[1].value)
        best_settings = f"sample.guidance={guidance:g} sample.sigma_rel={best.sigma_rel:.3g}"
        lines.append(f"next:\n  gesso sample {shlex.quote(str(folder))} {best_settings}")
    return lines


def curve_row(evaluation: Evaluation) -> Mapping[str, Any]:
    """Return a point as `ema_curves.build_curves` reads it."""
    protocol = evaluation.protocol
    row = {"tensors": None, "rest": None} | {key: protocol[key] for key in POINT_KEYS if key in protocol}
    return row | evaluation.weights | evaluation.best()
