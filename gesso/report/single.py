"""The page on one run."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from gesso import config
from gesso.diffusion.loss_bins import NUM_BINS
from gesso.evaluation import ema_sweep
from gesso.evaluation.metrics import format_value, short_label
from gesso.evaluation.results import Evaluation
from gesso.report import figures, page
from gesso.report.folder import Folder, amount

GRIDS = 4
"""pictures of samples on the way that are shown"""


def sections(run: Folder) -> Iterator[str]:
    yield head(run)
    yield samples(run)
    yield scores(run.toy)
    yield measured(run.evaluations)
    yield lengths(run.toy)
    yield training(run)
    yield by_noise(run)
    yield magnitudes(run)
    yield speed(run)
    yield recipe(run)


def head(found: Folder) -> str:
    run, data = found.run, found.run.data
    classes = f"{data.num_classes} classes" if data.num_classes else "no classes"
    cards = [page.card(f"{found.seen:,}", "images seen")]
    if found.toy.get("protocol", {}).get("toy_metrics") == "digits":
        for title, values in found.toy["rows"].items():
            cards += [
                page.card(format_value(name, values[name]), f"{short_label(name)}, {title}")
                for name in ("class_accuracy", "frechet_distance")
            ]
    elif on_the_way := found.last("metrics"):
        cards += [
            page.card(format_value(k, v), f"{short_label(k)}, on the way")
            for k, v in on_the_way.items()
            if not k.endswith("_std")
        ]
    held = f", {data.num_validation:,} of them held out" if data.num_validation else ""
    sub = (
        f"{run.net.name} under {run.process.name}, recipe {run.recipe}: {data.num_images:,} images of "
        f"{data.resolution}\u00d7{data.resolution}\u00d7{data.channels}, {classes}{held}"
    )
    return f'<h1>{page.escape(found.label)}</h1><p class="sub">{page.escape(sub)}</p><div class="cards">{"".join(cards)}</div>'


def samples(found: Folder) -> str:
    run, cfg = found.run, found.run.sample
    made, near = found.path / "samples" / "by_class.png", found.path / "samples" / "nearest.png"
    if made.is_file():
        rows = "A row for each class. " if run.data.num_classes else ""
        length = f"half-life {cfg.halflife:,}" if cfg.halflife else f"sigma_rel {cfg.sigma_rel:g}"
        caption = f"Samples. {rows}{cfg.sampler}, {cfg.steps} steps, guidance {cfg.guidance:g}, EMA of {length}."
        pictures = [page.image(made, caption)]
        if near.is_file():
            copied = "The training image nearest to each sample, in pixels: what it would look like to have copied."
            pictures.append(page.image(near, copied))
        shown = page.beside(pictures)
    else:
        shown = f"<p>None measured yet: <code>gesso evaluate {page.escape(str(found.path))}</code></p>"
    return page.section("Samples", shown) + page.section("Samples on the way", on_the_way(found))


def on_the_way(found: Folder) -> str:
    """Grids from the first to the last, evenly."""
    grids = found.grids()
    n = min(GRIDS, len(grids))
    chosen = [grids[round(i * (len(grids) - 1) / max(n - 1, 1))] for i in range(n)]
    return page.beside((page.image(path, f"image {nimg:,}") for nimg, path in chosen), "few")


def scores(toy: dict[str, Any]) -> str:
    """Table of the toy metrics of samples and of training images."""
    if "rows" not in toy:
        return ""
    names = [name for name in next(iter(toy["rows"].values())) if not name.endswith("_std")]
    rows = [
        (title, *(format_value(name, row[name], row.get(f"{name}_std")) for name in names))
        for title, row in toy["rows"].items()
    ]
    table = page.table(("", *map(short_label, names)), rows)
    return page.section("Scores", table) + page.section("Protocol", page.terms(toy["protocol"]))


APART = (
    "sigma_rel",
    "halflife",
    "sampler",
    "steps",
    "guidance",
    "control_guidance",
    "guide",
    "reference",
    "validation",
)
"""what a protocol is told by in its heading, where several differ in it"""


def measured(found: Sequence[Evaluation]) -> str:
    """A table for each protocol, with the protocol beneath it."""
    parts = []
    varied = [name for name in APART if len({one.protocol.get(name) for one in found} - {None}) > 1]
    for one in found:
        protocol = {name: value for name, value in one.protocol.items() if value is not None}
        apart = "".join(f", {name} {protocol[name]}" for name in varied if name in protocol)
        title = f"{protocol.get('name', 'scores')}: {amount(protocol)}, image {protocol['nimg']:,}{apart}"
        kinds: dict[Literal["best", "mean"], str] = {"mean": ""}
        if protocol["num_repeats"] > 1:
            kinds = {"best": f"best of {protocol['num_repeats']}", "mean": "mean"}
        rows = [
            (short_label(name), *(format_value(name, value[kind]) for kind in kinds))
            for name, value in one.metrics.items()
            if not name.startswith("loss_")
        ]
        if by_noise := [f"{value['mean']:.3g}" for name, value in one.metrics.items() if name.startswith("loss_")]:
            rows.append(("by noise, clean to noise", " ".join(by_noise), *("" for _ in list(kinds)[1:])))
        table = page.table((title, *kinds.values()), rows)
        parts.append(table + page.folded("protocol", page.terms(protocol)))
    return page.section("Measured", *parts)


def lengths(toy: dict[str, Any]) -> str:
    """Plot of the Frechet distance over EMA length."""
    sweep = toy.get("ema_sweep")
    if not sweep:
        return ""
    protocol, rows = sweep[0].protocol, [ema_sweep.curve_row(point) for point in sweep]
    text = (
        f"Each length reconstructed after training from the stored EMAs (EDM2 Section 3), guidance "
        f"{protocol['guidance']:g}, {protocol['sampler']}, {protocol['steps']} steps; the band is the spread over halves "
        "of the training images."
    )
    drawn = figures.lengths(rows, sweep[0].reference_metrics["frechet_distance"])
    return page.section("Quality against EMA length", page.beside([page.figure(drawn, text)]))


def training(found: Folder) -> str:
    validated = list(found.last("validation") or {})
    curves = {"training": found.curve("loss")}
    plots = [(figures.lines(curves, "loss"), "Mean training loss between log lines, in the weighting of the recipe.")]
    text = "Loss on images that are not trained on, at levels and with noise that never change; the MSE of the network's own target."
    held = {said_of(name): found.curve("validation", name) for name in validated}
    plots.append((figures.lines(held, "validation loss"), text))
    norm = figures.lines({"gradient norm": found.curve("grad_norm")}, "gradient norm", scale="log")
    plots.append(
        (norm, "Norm of the whole gradient at log lines, after the projection onto the sphere, before clipping.")
    )
    rate = figures.lines({"learning rate": found.curve("lr")}, "learning rate", from_zero=True)
    plots.append((rate, "Learning rate."))
    named = list(found.last("metrics") or {})
    for name in named:
        if not name.endswith("_std"):
            drawn = figures.lines({name: found.curve("metrics", name)}, short_label(name))
            plots.append((drawn, "Measured on the way, with the tracked average next to that of sample.*."))
    skipped = next((line["unreadable"] for line in found.lines if "unreadable" in line), [])
    names = ", ".join(name for name, _ in skipped[:20])
    left_out = page.paragraph(f"{len(skipped)} unreadable images were left out: {names}") if skipped else ""
    return page.section("Training", shown(plots), left_out)


def said_of(name: str) -> str:
    """Of a name under `validation` in the log."""
    length = name.removeprefix("ema")
    return "weights as they are" if name == "weights" else f"average, {'sigma_rel ' * length[0].isdigit()}{length}"


def shown(plots: list[tuple[str, str]]) -> str:
    return page.beside(page.figure(drawn, caption) for drawn, caption in plots if drawn)


def by_noise(found: Folder) -> str:
    trained = {b: found.curve("loss_by_noise", b) for b in range(NUM_BINS)}
    newest = list(found.last("validation_by_noise") or {})
    text = f"Training loss in {NUM_BINS} equal bins of progress, which are equally full: the draw of noise levels is uniform in it."
    plots = [(figures.by_noise(trained, "loss"), text)]
    if newest:
        name = newest[-1]
        held = {b: found.curve("validation_by_noise", name, b) for b in range(NUM_BINS)}
        plots.append((figures.by_noise(held, "validation loss"), f"The same of the held-out images, {said_of(name)}."))
    latest = {"training": found.late("loss_by_noise")}
    latest |= {said_of(name): found.last("validation_by_noise", name) for name in newest}
    if found.run.loss.weighting == "native" or not newest:
        plots.append(
            (
                figures.over_bins(latest, "loss"),
                "Over the last tenth of the log, and newest. A gap between training and held-out images is memory.",
            )
        )
    return page.section("Loss by noise level", shown(plots))


def magnitudes(found: Folder) -> str:
    last = found.last("magnitudes")
    if not last:
        return ""
    plots = []
    for what in last:
        said = what.replace("_", " ")
        for i, how in enumerate(("largest", "mean")):
            curves = {bucket: found.curve("magnitudes", what, bucket, i) for bucket in last[what]}
            drawn = figures.lines(curves, f"{said}, {how}", from_zero=True)
            plots.append((drawn, f"{said.capitalize()}: the {how} magnitude over the features of a bucket."))
    text = (
        "Magnitudes of features (EDM2 Eq. 3) of the averaged network, by resolution or third of the blocks; 1 is what unit-normal "
        "values have. Activations are what layers put out, the main path what whole blocks do; weights are as they were "
        "averaged, not put back on the sphere."
    )
    return page.section("Magnitudes", page.paragraph(text), shown(plots))


def speed(found: Folder) -> str:
    texts = {
        "images_per_second": ("images/s", "All that happened between log lines included."),
        "waiting": ("share of time", "Share of time that steps waited for their batch."),
        "utilisation": ("model FLOP utilisation", "Of what a large matrix product reaches on this device, "
                        f"{found.last('product_teraflops') or 0:g} TFLOP/s."),
        "peak_gigabytes": ("GB", "Most memory that was allocated on the GPU so far."),
    }  # fmt: skip
    plots = [(figures.lines({k: found.curve(k)}, label, from_zero=True), text) for k, (label, text) in texts.items()]
    return page.section("Speed", shown(plots))


def recipe(found: Folder) -> str:
    settings = f"<pre>{page.escape(config.to_yaml(found.run))}</pre>"
    made = page.section("Made with", page.terms(found.run.environment))
    return made + page.section("Recipe", page.folded("run.yaml", settings, is_open=True))
