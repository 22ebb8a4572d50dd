"""The page that sets several runs beside each other."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gesso import config
from gesso.evaluation.metrics import format_value, short_label
from gesso.evaluation.results import SNAPSHOT_DEPENDENT, Evaluation
from gesso.report import figures, page, single
from gesso.report.folder import Folder, Points, amount

FEW = 30
"""settings that are listed unfolded"""


def sections(runs: Sequence[Folder]) -> Iterator[str]:
    yield head(runs)
    yield scores(runs)
    yield measured(runs)
    yield samples(runs)
    yield training(runs)
    yield magnitudes(runs)
    yield speed(runs)
    yield differences(runs)


def head(runs: Sequence[Folder]) -> str:
    """Names with the strokes of their curves."""
    rows = []
    for i, run_data in enumerate(runs):
        colour, dash = figures.stroke(i)
        gaps = {"-": "", "--": "7 4", "-.": "9 3 2 3", ":": "2 3"}[dash]
        swatch = (
            f'<svg class="swatch" width="30" height="6"><line x1="0" y1="3" x2="30" y2="3" stroke="{colour}" '
            f'stroke-width="3" stroke-dasharray="{gaps}"/></svg>'
        )
        run, loss = run_data.run, run_data.last("loss")
        cells = [
            run.net.name,
            run.process.name,
            f"{run_data.seen:,}",
            number(loss),
            number(held(run_data)),
            number(run_data.last("images_per_second")),
        ]
        body = "".join(f"<td>{page.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><td>{swatch}{page.escape(run_data.label)}</td>{body}</tr>")
    names = ("run", "network", "process", "images seen", "loss", "validation", "images/s")
    top = "".join(f"<th>{name}</th>" for name in names)
    title = page.escape(title_of(runs))
    return f'<h1>{title}</h1><p class="sub">{len(runs)} runs</p><div class="wide"><table><tr>{top}</tr>{"".join(rows)}</table></div>'


def title_of(runs: Sequence[Folder]) -> str:
    names = [run_data.label for run_data in runs]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) < 5 else f"{names[0]} and {len(names) - 1} others"


def held(run_data: Folder) -> float | None:
    """Newest validation loss, of the average that is listed last."""
    newest = run_data.last("validation")
    return list(newest.values())[-1] if newest else None


def number(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def scores(runs: Sequence[Folder]) -> str:
    """Table of toy metrics: a row for each guidance scale and metric."""
    values = [
        {(title, name): value for title, row in run_data.toy.get("rows", {}).items() for name, value in row.items()}
        for run_data in runs
    ]
    keys = list(dict.fromkeys(key for by_key in values for key in by_key if not key[1].endswith("_std")))
    rows = [
        (
            f"{short_label(name)}, {title}",
            *(_cell(name, by_key.get((title, name)), by_key.get((title, f"{name}_std"))) for by_key in values),
        )
        for title, name in keys
    ]
    if not rows:
        return ""
    return page.section("Scores", page.table(("", *(run_data.label for run_data in runs)), rows), unlike(runs))


def _way(one: Evaluation, without: Sequence[str] = ()) -> str:
    return json.dumps({k: value for k, value in one.protocol.items() if k not in without}, sort_keys=True)


def measured(runs: Sequence[Folder]) -> str:
    """One table for each protocol, so that numbers of two protocols are never in one table."""
    ways: dict[str, dict[str, dict[str, float]]] = {}
    run_fields = SNAPSHOT_DEPENDENT
    several = {
        way
        for run_data in runs
        for way, n in Counter(_way(one, run_fields) for one in run_data.evaluations).items()
        if n > 1
    }
    for run_data in runs:
        for one in run_data.evaluations:
            way = _way(one, run_fields)
            ways.setdefault(_way(one) if way in several else way, {})[run_data.label] = one.best()
    parts = []
    for way, by_run in ways.items():
        protocol = {name: value for name, value in json.loads(way).items() if value is not None}
        names = dict.fromkeys(name for values in by_run.values() for name in values)
        rows = [(short_label(name), *(_cell(name, by_run.get(f.label, {}).get(name)) for f in runs)) for name in names]
        lengths = "".join(f", {name} {protocol[name]}" for name in run_fields if name in protocol)
        title = f"{protocol.get('name', 'scores')}: {amount(protocol)}{lengths}"
        parts.append(
            page.table((title, *(run_data.label for run_data in runs)), rows)
            + page.folded("protocol", page.terms(protocol))
        )
    return page.section("Measured", *parts)


def _cell(name: str, value: float | None, spread: float | None = None) -> str:
    return "\u2013" if value is None else format_value(name, value, spread)


def unlike(runs: Sequence[Folder]) -> str:
    """Table of the protocol entries in which the toy evaluations of the runs differ."""
    protocols = [run_data.toy["protocol"] for run_data in runs if "protocol" in run_data.toy]
    keys = dict.fromkeys(key for one in protocols for key in one)
    rows = [
        (key, *(number(run_data.toy.get("protocol", {}).get(key)) for run_data in runs))
        for key in keys
        if len({json.dumps(one.get(key)) for one in protocols}) > 1
    ]
    if not rows:
        return ""
    note = page.paragraph("The scores were not measured alike:")
    return note + page.table(("", *(run_data.label for run_data in runs)), rows, "words")


def samples(runs: Sequence[Folder]) -> str:
    pictures = []
    for run_data in runs:
        by_class, grids = run_data.path / "samples" / "by_class.png", run_data.grids()
        if by_class.is_file():
            nimg = run_data.toy.get("protocol", {}).get("nimg", run_data.seen)
            pictures.append(page.image(by_class, f"{run_data.label}, image {nimg:,}"))
        elif grids:
            pictures.append(page.image(grids[-1][1], f"{run_data.label}, image {grids[-1][0]:,}, on the way"))
    return page.section("Samples", page.row(pictures, "few" if len(pictures) > 2 else "pair"))


def overlaid(runs: Sequence[Folder], of: Callable[[Folder], Points], label: str, **how: Any) -> str:
    styles = {run_data.label: figures.stroke(i) for i, run_data in enumerate(runs)}
    return figures.lines({run_data.label: of(run_data) for run_data in runs}, label, styles=styles, **how)


def training(runs: Sequence[Folder]) -> str:
    def validation(run_data: Folder) -> Points:
        return run_data.curve("validation", list(run_data.last("validation") or [""])[-1])

    weightings = {run_data.run.loss.weighting for run_data in runs}
    targets = {(f.run.process.name, config.flatten(f.run).get("process.prediction")) for f in runs}
    apart = " The runs weight it differently: it cannot be compared." if len(weightings | targets) > 2 else ""
    plots = [(overlaid(runs, lambda f: f.curve("loss"), "loss"), "Training loss between log lines." + apart)]
    text = "Loss on held-out images, of the last of the averages."
    plots.append((overlaid(runs, validation, "validation loss"), text))
    newest = {f.label: f.last("validation_by_noise", list(f.last("validation_by_noise") or [""])[-1]) for f in runs}
    plots.append((figures.over_bins(newest, "validation loss"), "The same by noise level, the last time."))
    latest = {f.label: f.late("loss_by_noise") for f in runs}
    plots.append(
        (figures.over_bins(latest, "loss"), "Training loss by noise level, over the last tenth of the log." + apart)
    )
    summed = {run_data.run.loss.reduction for run_data in runs} == {"mean", "sum"}
    note = " Of a summed loss it is C*H*W times that of a mean: runs of both are here." if summed else ""
    plots.append(
        (
            overlaid(runs, lambda f: f.curve("grad_norm"), "gradient norm", scale="log"),
            f"Gradient norm.{note}",
        )
    )
    for name in dict.fromkeys(n for f in runs for n in f.last("metrics") or {} if not n.endswith("_std")):
        drawn = overlaid(runs, metric_curve(name), short_label(name))
        plots.append((drawn, "Measured on the way."))
    return page.section("Training", single.shown(plots))


def metric_curve(name: str) -> Callable[[Folder], Points]:
    """Return the function that reads a logged metric of a run."""
    return lambda run_data: run_data.curve("metrics", name)


def bucket_curve(kind: str, i: int) -> Callable[[Folder], Points]:
    """Return the function that reads magnitudes of a run, as `over_buckets`."""
    return lambda run_data: over_buckets(run_data, kind, i)


def growth_curve(kind: str, i: int) -> Callable[[Folder], Points]:
    """Return the function that reads the growth of magnitudes of a run, as `growth`."""
    return lambda run_data: growth(run_data, kind, i)


def magnitudes(runs: Sequence[Folder]) -> str:
    plots = []
    for what, title in (("activations", "what layers put out"), ("main_path", "what blocks put out")):
        for i, how in enumerate(("largest", "mean")):
            name = f"{what.replace('_', ' ')}, {how}"
            drawn = overlaid(runs, bucket_curve(what, i), name, from_zero=True)
            plots.append(
                (
                    drawn,
                    f"The {how} magnitude of {title}, over all blocks (EDM2 Eq. 3); 1 is that of unit-normal values.",
                )
            )
    for i, how in enumerate(("largest", "mean")):
        drawn = overlaid(runs, growth_curve("weights", i), f"weights, {how}, first = 1")
        plots.append((drawn, f"Weights: {how} magnitude over all blocks, over its first value."))
    return page.section("Magnitudes", single.shown(plots))


def over_buckets(run_data: Folder, what: str, i: int) -> Points:
    """The largest of the buckets (i = 0), or their mean (i = 1)."""
    lines = [line for line in run_data.lines if what in line.get("magnitudes", {})]
    values = [[pair[i] for pair in line["magnitudes"][what].values()] for line in lines]
    return [line["nimg"] for line in lines], [max(v) if i == 0 else sum(v) / len(v) for v in values]


def growth(run_data: Folder, what: str, i: int) -> Points:
    x, y = over_buckets(run_data, what, i)
    return x, [value / y[0] for value in y]


def speed(runs: Sequence[Folder]) -> str:
    rate = overlaid(runs, lambda f: f.curve("images_per_second"), "images/s", from_zero=True)
    used = overlaid(runs, lambda f: f.curve("mfu"), "model FLOP utilization", from_zero=True)
    return page.section(
        "Speed", single.shown([(rate, "Images/s between log lines."), (used, "Model FLOP utilization.")])
    )


def differences(runs: Sequence[Folder]) -> str:
    """A row for each setting in which any two of the runs differ."""
    paths = dict.fromkeys(path for other in runs[1:] for path, _, _ in config.differences(runs[0].run, other.run))
    values = [config.flatten(run_data.run) for run_data in runs]
    rows = [(path, *(short(one.get(path)) for one in values)) for path in paths]
    if not rows:
        return page.section("Settings that differ", page.paragraph("None."))
    table = page.table(("", *(run_data.label for run_data in runs)), rows, "words")
    return page.section(
        "Settings that differ", table if len(rows) <= FEW else page.folded(f"{len(rows)} settings", table)
    )


def short(value: object) -> str:
    text = "\u2013" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
