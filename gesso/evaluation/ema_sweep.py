"""Quality against EMA length: measured, kept, plotted (EDM2 Figures 5a to 5c and 6).

Writes ema_sweep.json after every point, and ema_sweep.png. A point that was measured under the same protocol is kept.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gesso import atomic_io, config, ema, sampling, snapshot
from gesso.config import EDM2Config, EDM2LadderConfig, RunConfig
from gesso.data.base import Dataset
from gesso.data.factory import open_dataset
from gesso.ema import PerTensorProfile, PowerProfile
from gesso.errors import RunError, UsageError
from gesso.evaluation import ema_curves, toy_evaluation
from gesso.evaluation.ema_export import parse_image_count as images_of
from gesso.evaluation.ema_export import parse_sigma_rel
from gesso.evaluation.networks import toy_networks
from gesso.interop import edm2
from gesso.published.edm2 import FIGURE_5B_LAYERS
from gesso.snapshot import TargetProfile

MAX_WEIGHTS_BYTES = 4e9
"""bytes of averages that are held at once"""
FORMAT = "gesso sweep 1"
SweepRow = dict[str, Any]
ROW_KEY = ("sigma_rel", "tensors", "rest", "guidance", "repeat")
"""what tells one row of a protocol from another"""


class SweepMetric(NamedTuple):
    """One number of a row. name: as --metric says it; falls: the least is best."""

    name: str
    key: str
    title: str
    lower_is_better: bool = False


SWEEP_METRICS = {
    "digits": (
        SweepMetric("fd", "frechet_distance", "Frechet distance in digit features", lower_is_better=True),
        SweepMetric("agreement", "class_agreement", "class agreement"),
    ),
    "shapes": tuple(
        SweepMetric(name, name, f"share of pictures: {name}") for name in ("all", "kind", "colour", "place", "pair")
    ),
}


class EmaSweepArgs(NamedTuple):
    """What a user of `gesso ema --sweep` says, as typed."""

    sweep: str
    metric: str | None = None
    guidance: str | None = None
    tensors: Sequence[str] = ()
    sigma_rels: Sequence[float] = ()
    nimg: str | None = None
    num_repeats: int = 1


def parse_sweep(text: str) -> list[float]:
    """.02:.25:12 as lengths at equal ratios, to four decimals."""
    try:
        first, last, number = text.split(":")
        low, high, n = float(first), float(last), int(number)
    except ValueError:
        raise UsageError(f"--sweep {text}: write LOW:HIGH:COUNT, such as .02:.25:12") from None
    if not 0 < low < high < 12**-0.5 or n < 3:
        raise UsageError(f"--sweep {text}: lengths rise, between 0 and {12**-0.5:.4f}, and are 3 or more")
    grid = [round(float(value), 4) for value in np.geomspace(low, high, n)]
    if grid[0] <= 0 or len(set(grid)) < n:
        raise UsageError(f"--sweep {text}: {n} lengths from {low:g} to {high:g} are not all different to four decimals")
    return grid


def select_metric(run: RunConfig, name: str | None) -> SweepMetric:
    """Raises UsageError for one that eval.toy_metrics does not measure."""
    known = SWEEP_METRICS.get(run.eval.toy_metrics)
    if not known:
        raise UsageError(
            f"eval.toy_metrics={run.eval.toy_metrics} measures nothing: there is no quality to plot against length"
        )
    if run.eval.toy_metrics == "shapes" and run.semantic.kind != "text":
        known = known[:2]
    found = {metric.name: metric for metric in known}
    if name and name not in found:
        raise UsageError(f"--metric {name}: eval.toy_metrics={run.eval.toy_metrics} measures {', '.join(found)}")
    return found[name] if name else known[0]


def runs_by_guidance(run: RunConfig, text: str | None) -> dict[float, RunConfig]:
    """The run at each guidance strength of 1,1.5,2; at its own when None. Raises UsageError for what it cannot have."""
    try:
        values = [float(part) for part in text.split(",")] if text else [run.sample.guidance]
    except ValueError:
        raise UsageError(f"--guidance {text}: write numbers such as 1,1.5,2") from None
    tree = config.to_dict(run)
    return {value: config.resolve(tree, [f"sample.guidance={value}"])[0] for value in values}


class SweepPoint(NamedTuple):
    """One average to be measured, and what a row says of it."""

    target: TargetProfile
    row: SweepRow

    def matches(self, row: SweepRow) -> bool:
        return all(row[name] == value for name, value in self.row.items())


def sweep_points(run: RunConfig, args: EmaSweepArgs) -> list[SweepPoint]:
    """Every length for all tensors; with globs, for those that each names, the others staying at the best (Figure 5b)."""
    grid = parse_sweep(args.sweep)
    if not args.tensors:
        return [SweepPoint(PowerProfile(s), {"sigma_rel": s, "tensors": None, "rest": None}) for s in grid]
    if any("=" in glob for glob in args.tensors):
        raise UsageError(f"--tensors {args.tensors[0]}: with --sweep write the GLOB alone; the sweep gives its lengths")
    if len(args.sigma_rels) > 1:
        raise UsageError("--sigma-rel is the length of all other tensors: say one")
    rest = parse_sigma_rel(args.sigma_rels[0]) if args.sigma_rels else ema.sampling_profile(run.sample)
    return [
        SweepPoint(
            PerTensorProfile(rest, ((glob, PowerProfile(s)),)), {"sigma_rel": s, "tensors": name, "rest": str(rest)}
        )
        for name, glob in _tensor_globs(run, args.tensors).items()
        for s in grid
    ]


def _tensor_globs(run: RunConfig, requested: Sequence[str]) -> dict[str, str]:
    """Globs by what is said: globs themselves; of EDM2's U-Net a layer as Appendix D.6 calls it, or figure5b: all of those."""
    found = {}
    for text in requested:
        of_edm2 = isinstance(run.net, EDM2Config | EDM2LadderConfig)
        if text == "figure5b" and not of_edm2:
            raise UsageError(
                f"--tensors figure5b: layers of EDM2's U-Net; of {run.net.name} write GLOBs such as '*attn*'"
            )
        names = FIGURE_5B_LAYERS if text == "figure5b" else [text]
        layers = {name: edm2.name_of_paper_layer(name, run.net, run.input_spec) if of_edm2 else None for name in names}
        found |= {name: glob for name, glob in layers.items() if glob} or {text: text}
    return found


def run_ema_sweep(folder: Path, run: RunConfig, args: EmaSweepArgs, progress: Callable[[int, int], None]) -> list[str]:
    """Measure a run at every length and guidance strength; returns the lines to show.

    tick(done, total) counts generated images. Raises UsageError for what cannot be measured, before any work.
    """
    metric, settings, wanted = (
        select_metric(run, args.metric),
        runs_by_guidance(run, args.guidance),
        sweep_points(run, args),
    )
    if args.sigma_rels and not args.tensors:
        raise UsageError("--sigma-rel beside --sweep is the length of the tensors that --tensors does not name")
    if args.num_repeats < 1:
        raise UsageError(f"--num-repeats {args.num_repeats}: 1 or more")
    nimg = images_of(args.nimg, "--nimg") if args.nimg else None
    bench = SweepRunner(folder, run, settings)
    how = snapshot.plan_reconstruction(snapshot.list_snapshots(folder), [point.target for point in wanted], nimg)
    record = SweepRecord(folder / "ema_sweep.json", bench.protocol(how))
    repeats = [(value, repeat) for value in settings for repeat in range(args.num_repeats)]
    due = [(point, value, r) for point in wanted for value, r in repeats if not record.contains(point, value, r)]
    done, total = 0, len(due) * bench.num_samples
    for point, weights in _reconstruct_weights(how, [p for p in wanted if any(p is d[0] for d in due)], bench.device):
        denoiser = snapshot.denoiser_from_weights(weights, run, bench.device)
        for value, repeat in (d[1:] for d in due if d[0] is point):
            made = []
            for batch in bench.generate_batches(denoiser, settings[value], repeat):
                made.append(batch)
                done += len(batch)
                progress(done, total)
            fit = how.worst_fit(point.target)
            told = {
                "guidance": value,
                "repeat": repeat,
                "profile_error": fit.squared_error,
                "initial_weight": fit.initial_weight,
            }
            record.add(point.row | told | bench.compute_metrics(torch.cat(made)))
    return _format_report(folder, record, metric, bench.reference_value(metric), len(due))


def _reconstruct_weights(
    plan: snapshot.ReconstructionPlan, points: list[SweepPoint], device: torch.device
) -> Iterator[tuple[SweepPoint, dict[str, Tensor]]]:
    """Averages, as many in one pass over the files as MEMORY holds."""
    size = plan.sources[-1].path.stat().st_size
    some = max(1, int(MAX_WEIGHTS_BYTES / size))
    for first in range(0, len(points), some):
        part = points[first : first + some]
        yield from zip(part, snapshot.reconstruct(plan._replace(targets=[p.target for p in part]), device), strict=True)


class SweepRunner:
    """What pictures are drawn for a run, under which conditions, and what is measured on them."""

    def __init__(self, folder: Path, run: RunConfig, settings: dict[float, RunConfig]):
        self.dataset = open_dataset(run.data, run.latent, run.train.seed)
        if self.dataset.fingerprint() != run.data.fingerprint:
            raise UsageError(f"the images in {run.data.source} are not those that {folder} was trained on")
        sampling.check_sampling(run)
        self.run, self.device = run, sampling.run_device(run)
        half = len(self.dataset) // 2
        self.num_samples = min(half, toy_evaluation.NUM_SHAPE_SAMPLES) if run.eval.toy_metrics == "shapes" else half
        self.guide = next((g for one in settings.values() if (g := sampling.load_guide(folder, one))), None)
        self.cond, self.labels = toy_evaluation.sample_conditions(
            run, self.dataset, self.num_samples, snapshot.load_control_rows(folder)
        )
        self.normalizer = sampling.open_decoder(run)
        self.digit_metrics = _build_digit_metrics(
            run,
            self.dataset,
            toy_evaluation.reference_images(self.normalizer, self.dataset, run),
            self.labels,
            self.device,
        )

    def protocol(self, plan: snapshot.ReconstructionPlan) -> dict[str, Any]:
        """Everything that decides a number besides length, guidance strength and repetition."""
        told = toy_evaluation.describe_protocol(self.run, plan.nimg, self.num_samples)
        told = {k: v for k, v in told.items() if k not in ("sigma_rel", "halflife", "guidance", "seeds")}
        of = json.dumps(
            [[s.path.name, s.path.stat().st_size] for s in plan.sources] + [plan.sources[-1].config_dict],
            sort_keys=True,
        )
        return told | {
            "seeds": f"{self.num_samples} for each repetition",
            "snapshots": hashlib.sha256(of.encode()).hexdigest()[:16],
        }

    def generate_batches(self, denoiser: torch.nn.Module, run: RunConfig, repeat: int) -> Iterator[Tensor]:
        """Batches (n, C, H, W) uint8; other seeds under the same conditions in every repetition."""
        seeds = range(repeat * self.num_samples, (repeat + 1) * self.num_samples)
        guide = self.guide if run.sample.guidance != 1 else None
        return sampling.generate(denoiser, run, seeds, self.cond, guide, self.normalizer)

    def compute_metrics(self, samples: Tensor) -> dict[str, float]:
        if self.digit_metrics is None:
            return toy_evaluation.shape_accuracy(self.run, samples, self.dataset, self.labels)
        return self.digit_metrics(samples)

    def reference_value(self, metric: SweepMetric) -> float | None:
        """What real pictures reach."""
        if self.digit_metrics is None:
            return None
        return self.digit_metrics.floor.get(metric.key, self.digit_metrics.real_accuracy)


def _build_digit_metrics(
    run: RunConfig, dataset: Dataset, real: Tensor, labels: Tensor, device: torch.device
) -> toy_evaluation.DigitMetrics | None:
    if run.eval.toy_metrics != "digits":
        return None
    return toy_evaluation.DigitMetrics(
        toy_networks.load_digit_features(str(device)), run, real, dataset.labels, labels, device
    )


class SweepRecord:
    """Rows of one protocol, among those of others, in a file that several sweeps may add to at once."""

    def __init__(self, path: Path, protocol: dict[str, Any]):
        self.path, self.protocol = path, protocol
        self._load()

    def _load(self) -> None:
        self.sweeps: list[dict[str, Any]] = []
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text())
                known = content["format"] == FORMAT
                self.sweeps = content["sweeps"] if known else []
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise RunError(f"{self.path} was not written by gesso as a sweep; move it away")
        same = [one for one in self.sweeps if one["protocol"] == self.protocol]
        if not same:
            same = [{"protocol": self.protocol, "rows": [], "optima": []}]
            self.sweeps += same
        self.current = same[0]

    @property
    def rows(self) -> list[SweepRow]:
        return self.current["rows"]

    def contains(self, point: SweepPoint, guidance: float, repeat: int) -> bool:
        return any(point.matches(row) and (row["guidance"], row["repeat"]) == (guidance, repeat) for row in self.rows)

    def add(self, row: SweepRow) -> None:
        """Unless another sweep was first."""
        with self._locked_update():
            if not any(all(row[key] == other[key] for key in ROW_KEY) for other in self.rows):
                self.rows.append(row)

    def set_optima(self, metric: SweepMetric, optima: Mapping[str, ema_curves.Optimum]) -> None:
        with self._locked_update():
            others = [one for one in self.current["optima"] if one["metric"] != metric.name]
            self.current["optima"] = others + [
                {"metric": metric.name, "curve": n} | o._asdict() for n, o in optima.items()
            ]

    @contextlib.contextmanager
    def _locked_update(self) -> Iterator[None]:
        with atomic_io.lock(self.path):
            self._load()  # what others wrote in the meantime
            yield
            atomic_io.write_json(self.path, {"format": FORMAT, "sweeps": self.sweeps})


def _format_report(
    folder: Path, record: SweepRecord, metric: SweepMetric, floor: float | None, num_new: int
) -> list[str]:
    """A table, the optimum of every curve, the plot."""
    found = ema_curves.build_curves(record.rows, metric.key)
    kept = len(record.rows) - num_new
    lines = [
        f"{metric.title}, image {record.current['protocol']['nimg']:,}"
        + (f" ({kept} points measured before)" if kept else "")
    ]
    lines += ema_curves.curve_table(found, metric.lower_is_better)
    optima = {name: ema_curves.find_optimum(curve, metric.lower_is_better) for name, curve in found.items()}
    lines += [f"{name}: {best}" for name, best in optima.items()]
    record.set_optima(metric, optima)
    wrote = [str(record.path)]
    try:
        wrote.append(str(ema_curves.plot_curves(found, optima, metric.title, floor, folder / "ema_sweep.png")))
    except ImportError:
        lines.append("no plot: pip install 'gesso[plots]'")
    lines.append(f"wrote {', '.join(wrote)}")
    whole = {float(name.split()[1]): best for name, best in optima.items() if "," not in name}
    if whole:
        guidance, best = min(
            whole.items(), key=lambda item: item[1].value if metric.lower_is_better else -item[1].value
        )
        lines.append(
            f"next:\n  gesso sample {folder} sample.guidance={guidance:g} sample.sigma_rel={best.sigma_rel:.3g}"
        )
    return lines
