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

from gesso import config, ema, files, generate, snapshot
from gesso.config import EDM2, EDM2Ladder, Run
from gesso.data.dataset import open_dataset
from gesso.data.samples import Dataset
from gesso.ema import PerTensor, Power
from gesso.errors import RunError, UsageError
from gesso.evaluate import curves, features, score
from gesso.evaluate.averages import count as images_of
from gesso.evaluate.averages import length
from gesso.interop import edm2
from gesso.recipes.edm2 import FIGURE_5B
from gesso.snapshot import Target

MEMORY = 4e9
"""bytes of averages that are held at once"""
FORMAT = "gesso sweep 1"
Row = dict[str, Any]
POINT = ("sigma_rel", "tensors", "rest", "guidance", "repeat")
"""what tells one row of a protocol from another"""


class Metric(NamedTuple):
    """One number of a row. name: as --metric says it; falls: the least is best."""

    name: str
    key: str
    title: str
    falls: bool = False


METRICS = {
    "digits": (
        Metric("fd", "frechet_distance", "Frechet distance in digit features", falls=True),
        Metric("agreement", "class_agreement", "class agreement"),
    ),
    "shapes": tuple(
        Metric(name, name, f"share of pictures: {name}") for name in ("all", "kind", "colour", "place", "pair")
    ),
}


class Asked(NamedTuple):
    """What a user of `gesso ema --sweep` says, as typed."""

    sweep: str
    metric: str | None = None
    guidance: str | None = None
    tensors: Sequence[str] = ()
    rest: Sequence[float] = ()
    nimg: str | None = None
    repeats: int = 1


def lengths(text: str) -> list[float]:
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


def metric_of(run: Run, name: str | None) -> Metric:
    """Raises UsageError for one that eval.features does not measure."""
    known = METRICS.get(run.eval.features)
    if not known:
        raise UsageError(
            f"eval.features={run.eval.features} measures nothing: there is no quality to plot against length"
        )
    if run.eval.features == "shapes" and run.semantic.kind != "text":
        known = known[:2]
    found = {metric.name: metric for metric in known}
    if name and name not in found:
        raise UsageError(f"--metric {name}: eval.features={run.eval.features} measures {', '.join(found)}")
    return found[name] if name else known[0]


def guidances(run: Run, text: str | None) -> dict[float, Run]:
    """The run at each guidance strength of 1,1.5,2; at its own when None. Raises UsageError for what it cannot have."""
    try:
        values = [float(part) for part in text.split(",")] if text else [run.sample.guidance]
    except ValueError:
        raise UsageError(f"--guidance {text}: write numbers such as 1,1.5,2") from None
    tree = config.as_tree(run)
    return {value: config.resolve(tree, [f"sample.guidance={value}"])[0] for value in values}


class Point(NamedTuple):
    """One average to be measured, and what a row says of it."""

    target: Target
    row: Row

    def same(self, row: Row) -> bool:
        return all(row[name] == value for name, value in self.row.items())


def points(run: Run, asked: Asked) -> list[Point]:
    """Every length for all tensors; with globs, for those that each names, the others staying at the best (Figure 5b)."""
    grid = lengths(asked.sweep)
    if not asked.tensors:
        return [Point(Power(s), {"sigma_rel": s, "tensors": None, "rest": None}) for s in grid]
    if any("=" in glob for glob in asked.tensors):
        raise UsageError(
            f"--tensors {asked.tensors[0]}: with --sweep write the GLOB alone; the sweep gives its lengths"
        )
    if len(asked.rest) > 1:
        raise UsageError("--sigma-rel is the length of all other tensors: say one")
    rest = length(asked.rest[0]) if asked.rest else ema.chosen(run.sample)
    return [
        Point(PerTensor(rest, ((glob, Power(s)),)), {"sigma_rel": s, "tensors": name, "rest": str(rest)})
        for name, glob in _layers(run, asked.tensors).items()
        for s in grid
    ]


def _layers(run: Run, said: Sequence[str]) -> dict[str, str]:
    """Globs by what is said: globs themselves; of EDM2's U-Net a layer as Appendix D.6 calls it, or figure5b: all of those."""
    found = {}
    for text in said:
        of_edm2 = isinstance(run.net, EDM2 | EDM2Ladder)
        if text == "figure5b" and not of_edm2:
            raise UsageError(
                f"--tensors figure5b: layers of EDM2's U-Net; of {run.net.name} write GLOBs such as '*attn*'"
            )
        names = FIGURE_5B if text == "figure5b" else [text]
        layers = {name: edm2.layer(name, run.net, run.inputs) if of_edm2 else None for name in names}
        found |= {name: glob for name, glob in layers.items() if glob} or {text: text}
    return found


def sweep(folder: Path, run: Run, asked: Asked, tick: Callable[[int, int], None]) -> list[str]:
    """Measure a run at every length and guidance strength; returns the lines to show.

    tick(done, total) counts generated images. Raises UsageError for what cannot be measured, before any work.
    """
    metric, settings, wanted = metric_of(run, asked.metric), guidances(run, asked.guidance), points(run, asked)
    if asked.rest and not asked.tensors:
        raise UsageError("--sigma-rel beside --sweep is the length of the tensors that --tensors does not name")
    if asked.repeats < 1:
        raise UsageError(f"--repeats {asked.repeats}: 1 or more")
    nimg = images_of(asked.nimg, "--nimg") if asked.nimg else None
    bench = Bench(folder, run, settings)
    how = snapshot.plan(snapshot.stored(folder), [point.target for point in wanted], nimg)
    record = Record(folder / "ema_sweep.json", bench.protocol(how))
    repeats = [(value, repeat) for value in settings for repeat in range(asked.repeats)]
    due = [(point, value, r) for point in wanted for value, r in repeats if not record.has(point, value, r)]
    done, total = 0, len(due) * bench.count
    for point, weights in _weights(how, [p for p in wanted if any(p is d[0] for d in due)], bench.device):
        denoiser = snapshot.denoiser(weights, run, bench.device)
        for value, repeat in (d[1:] for d in due if d[0] is point):
            made = []
            for batch in bench.pictures(denoiser, settings[value], repeat):
                made.append(batch)
                done += len(batch)
                tick(done, total)
            fit = how.fit(point.target)
            told = {"guidance": value, "repeat": repeat, "profile_error": fit.error, "initial_weight": fit.initial}
            record.add(point.row | told | bench.scores(torch.cat(made)))
    return _report(folder, record, metric, bench.floor(metric), len(due))


def _weights(
    how: snapshot.Plan, wanted: list[Point], device: torch.device
) -> Iterator[tuple[Point, dict[str, Tensor]]]:
    """Averages, as many in one pass over the files as MEMORY holds."""
    size = how.used[-1].path.stat().st_size
    some = max(1, int(MEMORY / size))
    for first in range(0, len(wanted), some):
        part = wanted[first : first + some]
        yield from zip(part, snapshot.made(how._replace(targets=[p.target for p in part]), device), strict=True)


class Bench:
    """What pictures are drawn for a run, under which conditions, and what is measured on them."""

    def __init__(self, folder: Path, run: Run, settings: dict[float, Run]):
        self.images = open_dataset(run.data, run.latent, run.train.seed)
        if self.images.fingerprint() != run.data.fingerprint:
            raise UsageError(f"the images in {run.data.source} are not those that {folder} was trained on")
        generate.check(run)
        self.run, self.device = run, generate.device_of(run)
        half = len(self.images) // 2
        self.count = min(half, score.DRAWN) if run.eval.features == "shapes" else half
        self.guide = next((g for one in settings.values() if (g := generate.guide_of(folder, one))), None)
        self.cond, self.labels = score.conditions_of(run, self.images, self.count, snapshot.control_rows(folder))
        self.space = generate.opened_space(run)
        self.scorer = _scorer(
            run, self.images, score.real_pictures(self.space, self.images, run), self.labels, self.device
        )

    def protocol(self, how: snapshot.Plan) -> dict[str, Any]:
        """Everything that decides a number besides length, guidance strength and repetition."""
        told = score.protocol(self.run, how.nimg, self.count)
        told = {k: v for k, v in told.items() if k not in ("sigma_rel", "halflife", "guidance", "seeds")}
        of = json.dumps([[s.path.name, s.path.stat().st_size] for s in how.used] + [how.used[-1].run], sort_keys=True)
        return told | {
            "seeds": f"{self.count} for each repetition",
            "snapshots": hashlib.sha256(of.encode()).hexdigest()[:16],
        }

    def pictures(self, denoiser: torch.nn.Module, run: Run, repeat: int) -> Iterator[Tensor]:
        """Batches (n, C, H, W) uint8; other seeds under the same conditions in every repetition."""
        seeds = range(repeat * self.count, (repeat + 1) * self.count)
        guide = self.guide if run.sample.guidance != 1 else None
        return generate.generate(denoiser, run, seeds, self.cond, guide, self.space)

    def scores(self, pictures: Tensor) -> dict[str, float]:
        if self.scorer is None:
            return score.read_back(self.run, pictures, self.images, self.labels)
        return self.scorer(pictures)

    def floor(self, metric: Metric) -> float | None:
        """What real pictures reach."""
        if self.scorer is None:
            return None
        return self.scorer.floor.get(metric.key, self.scorer.real_agreement)


def _scorer(run: Run, images: Dataset, real: Tensor, labels: Tensor, device: torch.device) -> score.Scorer | None:
    if run.eval.features != "digits":
        return None
    return score.Scorer(features.load_digit_features(str(device)), run, real, images.labels, labels, device)


class Record:
    """Rows of one protocol, among those of others, in a file that several sweeps may add to at once."""

    def __init__(self, path: Path, protocol: dict[str, Any]):
        self.path, self.protocol = path, protocol
        self._read()

    def _read(self) -> None:
        self.all: list[dict[str, Any]] = []
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text())
                known = content["format"] == FORMAT
                self.all = content["sweeps"] if known else []
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise RunError(f"{self.path} was not written by gesso as a sweep; move it away")
        same = [one for one in self.all if one["protocol"] == self.protocol]
        if not same:
            same = [{"protocol": self.protocol, "rows": [], "optima": []}]
            self.all += same
        self.mine = same[0]

    @property
    def rows(self) -> list[Row]:
        return self.mine["rows"]

    def has(self, point: Point, guidance: float, repeat: int) -> bool:
        return any(point.same(row) and (row["guidance"], row["repeat"]) == (guidance, repeat) for row in self.rows)

    def add(self, row: Row) -> None:
        """Unless another sweep was first."""
        with self._changing():
            if not any(all(row[key] == other[key] for key in POINT) for other in self.rows):
                self.rows.append(row)

    def conclude(self, metric: Metric, optima: Mapping[str, curves.Optimum]) -> None:
        with self._changing():
            others = [one for one in self.mine["optima"] if one["metric"] != metric.name]
            self.mine["optima"] = others + [
                {"metric": metric.name, "curve": n} | o._asdict() for n, o in optima.items()
            ]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with files.in_turn(self.path):
            self._read()  # what others wrote in the meantime
            yield
            files.write_json(self.path, {"format": FORMAT, "sweeps": self.all})


def _report(folder: Path, record: Record, metric: Metric, floor: float | None, new: int) -> list[str]:
    """A table, the optimum of every curve, the plot."""
    found = curves.curves(record.rows, metric.key)
    kept = len(record.rows) - new
    lines = [
        f"{metric.title}, image {record.mine['protocol']['nimg']:,}"
        + (f" ({kept} points measured before)" if kept else "")
    ]
    lines += curves.table(found, metric.falls)
    optima = {name: curves.optimum(curve, metric.falls) for name, curve in found.items()}
    lines += [f"{name}: {best}" for name, best in optima.items()]
    record.conclude(metric, optima)
    wrote = [str(record.path)]
    try:
        wrote.append(str(curves.plot(found, optima, metric.title, floor, folder / "ema_sweep.png")))
    except ImportError:
        lines.append("no plot: pip install 'gesso[plots]'")
    lines.append(f"wrote {', '.join(wrote)}")
    whole = {float(name.split()[1]): best for name, best in optima.items() if "," not in name}
    if whole:
        guidance, best = min(whole.items(), key=lambda item: item[1].value if metric.falls else -item[1].value)
        lines.append(
            f"next:\n  gesso sample {folder} sample.guidance={guidance:g} sample.sigma_rel={best.sigma_rel:.3g}"
        )
    return lines
