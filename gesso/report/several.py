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
    for i, found in enumerate(runs):
        colour, dash = figures.stroke(i)
        gaps = {"-": "", "--": "7 4", "-.": "9 3 2 3", ":": "2 3"}[dash]
        swatch = (
            f'<svg class="swatch" width="30" height="6"><line x1="0" y1="3" x2="30" y2="3" stroke="{colour}" '
            f'stroke-width="3" stroke-dasharray="{gaps}"/></svg>'
        )
        run, loss = found.run, found.last("loss")
        cells = [
            run.net.name,
            run.process.name,
            f"{found.seen:,}",
            number(loss),
            number(held(found)),
            number(found.last("images_per_second")),
        ]
        body = "".join(f"<td>{page.escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><td>{swatch}{page.escape(found.label)}</td>{body}</tr>")
    names = ("run", "network", "process", "images seen", "loss", "validation", "images/s")
    top = "".join(f"<th>{name}</th>" for name in names)
    title = page.escape(title_of(runs))
    return f'<h1>{title}</h1><p class="sub">{len(runs)} runs</p><div class="wide"><table><tr>{top}</tr>{"".join(rows)}</table></div>'


def title_of(runs: Sequence[Folder]) -> str:
    names = [found.label for found in runs]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) < 5 else f"{names[0]} and {len(names) - 1} others"


def held(found: Folder) -> float | None:
    """Newest validation loss, of the average that is listed last."""
    newest = found.last("validation")
    return list(newest.values())[-1] if newest else None


def number(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def scores(runs: Sequence[Folder]) -> str:
    """Table of toy metrics: a row for each guidance scale and metric."""
    values = [
        {(title, name): value for title, row in found.toy.get("rows", {}).items() for name, value in row.items()}
        for found in runs
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
    return page.section("Scores", page.table(("", *(found.label for found in runs)), rows), unlike(runs))


def _way(one: Evaluation, without: Sequence[str] = ()) -> str:
    return json.dumps({k: value for k, value in one.protocol.items() if k not in without}, sort_keys=True)


def measured(runs: Sequence[Folder]) -> str:
    """One table for each protocol, so that numbers of two protocols are never in one table."""
    ways: dict[str, dict[str, dict[str, float]]] = {}
    own = SNAPSHOT_DEPENDENT
    several = {
        way for found in runs for way, n in Counter(_way(one, own) for one in found.evaluations).items() if n > 1
    }
    for found in runs:
        for one in found.evaluations:
            way = _way(one, own)
            ways.setdefault(_way(one) if way in several else way, {})[found.label] = one.best()
    parts = []
    for way, by_run in ways.items():
        protocol = {name: value for name, value in json.loads(way).items() if value is not None}
        names = dict.fromkeys(name for values in by_run.values() for name in values)
        rows = [(short_label(name), *(_cell(name, by_run.get(f.label, {}).get(name)) for f in runs)) for name in names]
        lengths = "".join(f", {name} {protocol[name]}" for name in own if name in protocol)
        title = f"{protocol.get('name', 'scores')}: {amount(protocol)}{lengths}"
        parts.append(
            page.table((title, *(found.label for found in runs)), rows) + page.folded("protocol", page.terms(protocol))
        )
    return page.section("Measured", *parts)


def _cell(name: str, value: float | None, spread: float | None = None) -> str:
    return "\u2013" if value is None else format_value(name, value, spread)


def unlike(runs: Sequence[Folder]) -> str:
    """Table of the protocol entries in which the toy evaluations of the runs differ."""
    protocols = [found.toy["protocol"] for found in runs if "protocol" in found.toy]
    keys = dict.fromkeys(key for one in protocols for key in one)
    rows = [
        (key, *(number(found.toy.get("protocol", {}).get(key)) for found in runs))
        for key in keys
        if len({json.dumps(one.get(key)) for one in protocols}) > 1
    ]
    if not rows:
        return ""
    note = page.paragraph("The scores were not measured alike:")
    return note + page.table(("", *(found.label for found in runs)), rows, "words")


def samples(runs: Sequence[Folder]) -> str:
    pictures = []
    for found in runs:
        made, grids = found.path / "samples" / "by_class.png", found.grids()
        if made.is_file():
            nimg = found.toy.get("protocol", {}).get("nimg", found.seen)
            pictures.append(page.image(made, f"{found.label}, image {nimg:,}"))
        elif grids:
            pictures.append(page.image(grids[-1][1], f"{found.label}, image {grids[-1][0]:,}, on the way"))
    return page.section("Samples", page.beside(pictures, "few" if len(pictures) > 2 else "pair"))


def overlaid(runs: Sequence[Folder], of: Callable[[Folder], Points], label: str, **how: Any) -> str:
    styles = {found.label: figures.stroke(i) for i, found in enumerate(runs)}
    return figures.lines({found.label: of(found) for found in runs}, label, styles=styles, **how)


def training(runs: Sequence[Folder]) -> str:
    def validation(found: Folder) -> Points:
        return found.curve("validation", list(found.last("validation") or [""])[-1])

    weightings = {found.run.loss.weighting for found in runs}
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
    summed = {found.run.loss.reduction for found in runs} == {"mean", "sum"}
    note = " Of a summed loss it is C*H*W times that of a mean: runs of both are here." if summed else ""
    plots.append(
        (
            overlaid(runs, lambda f: f.curve("grad_norm"), "gradient norm", scale="log"),
            f"Gradient norm.{note}",
        )
    )
    for name in dict.fromkeys(n for f in runs for n in f.last("metrics") or {} if not n.endswith("_std")):
        drawn = overlaid(runs, lambda f, name=name: f.curve("metrics", name), short_label(name))
        plots.append((drawn, "Measured on the way."))
    return page.section("Training", single.shown(plots))


def magnitudes(runs: Sequence[Folder]) -> str:
    plots = []
    for what, said in (("activations", "what layers put out"), ("main_path", "what blocks put out")):
        for i, how in enumerate(("largest", "mean")):
            name = f"{what.replace('_', ' ')}, {how}"
            drawn = overlaid(runs, lambda f, what=what, i=i: over_buckets(f, what, i), name, from_zero=True)
            plots.append(
                (
                    drawn,
                    f"The {how} magnitude of {said}, over all blocks (EDM2 Eq. 3); 1 is that of unit-normal values.",
                )
            )
    for i, how in enumerate(("largest", "mean")):
        drawn = overlaid(runs, lambda f, i=i: growth(f, "weights", i), f"weights, {how}, first = 1")
        plots.append((drawn, f"Weights: {how} magnitude over all blocks, over its first value."))
    return page.section("Magnitudes", single.shown(plots))


def over_buckets(found: Folder, what: str, i: int) -> Points:
    """The largest of the buckets (i = 0), or their mean (i = 1)."""
    lines = [line for line in found.lines if what in line.get("magnitudes", {})]
    values = [[pair[i] for pair in line["magnitudes"][what].values()] for line in lines]
    return [line["nimg"] for line in lines], [max(v) if i == 0 else sum(v) / len(v) for v in values]


def growth(found: Folder, what: str, i: int) -> Points:
    x, y = over_buckets(found, what, i)
    return x, [value / y[0] for value in y]


def speed(runs: Sequence[Folder]) -> str:
    rate = overlaid(runs, lambda f: f.curve("images_per_second"), "images/s", from_zero=True)
    used = overlaid(runs, lambda f: f.curve("utilisation"), "model FLOP utilisation", from_zero=True)
    return page.section(
        "Speed", single.shown([(rate, "Images/s between log lines."), (used, "Model FLOP utilisation.")])
    )


def differences(runs: Sequence[Folder]) -> str:
    """A row for each setting in which any two of the runs differ."""
    paths = dict.fromkeys(path for other in runs[1:] for path, _, _ in config.differences(runs[0].run, other.run))
    values = [config.flatten(found.run) for found in runs]
    rows = [(path, *(short(one.get(path)) for one in values)) for path in paths]
    if not rows:
        return page.section("Settings that differ", page.paragraph("None."))
    table = page.table(("", *(found.label for found in runs)), rows, "words")
    return page.section(
        "Settings that differ", table if len(rows) <= FEW else page.folded(f"{len(rows)} settings", table)
    )


def short(value: object) -> str:
    text = "\u2013" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
