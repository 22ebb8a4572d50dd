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


def head(run_data: Folder) -> str:
    run, data = run_data.run, run_data.run.data
    classes = f"{data.num_classes} classes" if data.num_classes else "no classes"
    cards = [page.card(f"{run_data.seen:,}", "images seen")]
    if run_data.toy.get("protocol", {}).get("toy_metrics") == "digits":
        for title, values in run_data.toy["rows"].items():
            cards += [
                page.card(format_value(name, values[name]), f"{short_label(name)}, {title}")
                for name in ("class_accuracy", "frechet_distance")
            ]
    elif on_the_way := run_data.last("metrics"):
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
    return f'<h1>{page.escape(run_data.label)}</h1><p class="sub">{page.escape(sub)}</p><div class="cards">{"".join(cards)}</div>'


def samples(run_data: Folder) -> str:
    run, cfg = run_data.run, run_data.run.sample
    by_class, near = run_data.path / "samples" / "by_class.png", run_data.path / "samples" / "nearest.png"
    if by_class.is_file():
        rows = "A row for each class. " if run.data.num_classes else ""
        length = f"half-life {cfg.halflife:,}" if cfg.halflife else f"sigma_rel {cfg.sigma_rel:g}"
        caption = f"Samples. {rows}{cfg.sampler}, {cfg.steps} steps, guidance {cfg.guidance:g}, EMA of {length}."
        pictures = [page.image(by_class, caption)]
        if near.is_file():
            copied = "The training image nearest to each sample, in pixels: what it would look like to have copied."
            pictures.append(page.image(near, copied))
        shown = page.row(pictures)
    else:
        shown = f"<p>None measured yet: <code>gesso evaluate {page.escape(str(run_data.path))}</code></p>"
    return page.section("Samples", shown) + page.section("Samples on the way", on_the_way(run_data))


def on_the_way(run_data: Folder) -> str:
    """Grids from the first to the last, evenly."""
    grids = run_data.grids()
    n = min(GRIDS, len(grids))
    chosen = [grids[round(i * (len(grids) - 1) / max(n - 1, 1))] for i in range(n)]
    return page.row((page.image(path, f"image {nimg:,}") for nimg, path in chosen), "few")


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


def measured(evaluations: Sequence[Evaluation]) -> str:
    """A table for each protocol, with the protocol beneath it."""
    parts = []
    varied = [name for name in APART if len({one.protocol.get(name) for one in evaluations} - {None}) > 1]
    for one in evaluations:
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
    return page.section("Quality against EMA length", page.row([page.figure(drawn, text)]))


def training(run_data: Folder) -> str:
    validated = list(run_data.last("validation") or {})
    curves = {"training": run_data.curve("loss")}
    plots = [(figures.lines(curves, "loss"), "Mean training loss between log lines, in the weighting of the recipe.")]
    text = "Loss on images that are not trained on, at levels and with noise that never change; the MSE of the network's own target."
    held = {describe_weights(name): run_data.curve("validation", name) for name in validated}
    plots.append((figures.lines(held, "validation loss"), text))
    norm = figures.lines({"gradient norm": run_data.curve("grad_norm")}, "gradient norm", scale="log")
    plots.append(
        (norm, "Norm of the whole gradient at log lines, after the projection onto the sphere, before clipping.")
    )
    rate = figures.lines({"learning rate": run_data.curve("lr")}, "learning rate", from_zero=True)
    plots.append((rate, "Learning rate."))
    named = list(run_data.last("metrics") or {})
    for name in named:
        if not name.endswith("_std"):
            drawn = figures.lines({name: run_data.curve("metrics", name)}, short_label(name))
            plots.append((drawn, "Measured on the way, with the tracked average next to that of sample.*."))
    skipped: list[tuple[str, str]] = next((line["unreadable"] for line in run_data.lines if "unreadable" in line), [])
    names = ", ".join(name for name, _ in skipped[:20])
    left_out = page.paragraph(f"{len(skipped)} unreadable images were left out: {names}") if skipped else ""
    return page.section("Training", shown(plots), left_out)


def describe_weights(name: str) -> str:
    """Return a description of the weights under a name of `validation` in the log."""
    length = name.removeprefix("ema")
    return "weights as they are" if name == "weights" else f"average, {'sigma_rel ' * length[0].isdigit()}{length}"


def shown(plots: list[tuple[str, str]]) -> str:
    return page.row(page.figure(drawn, caption) for drawn, caption in plots if drawn)


def by_noise(run_data: Folder) -> str:
    trained = {b: run_data.curve("loss_by_noise", b) for b in range(NUM_BINS)}
    newest = list(run_data.last("validation_by_noise") or {})
    text = f"Training loss in {NUM_BINS} equal bins of progress, which are equally full: the draw of noise levels is uniform in it."
    plots = [(figures.by_noise(trained, "loss"), text)]
    if newest:
        name = newest[-1]
        held = {b: run_data.curve("validation_by_noise", name, b) for b in range(NUM_BINS)}
        plots.append(
            (figures.by_noise(held, "validation loss"), f"The same of the held-out images, {describe_weights(name)}.")
        )
    latest = {"training": run_data.late("loss_by_noise")}
    latest |= {describe_weights(name): run_data.last("validation_by_noise", name) for name in newest}
    if run_data.run.loss.weighting == "native" or not newest:
        plots.append(
            (
                figures.over_bins(latest, "loss"),
                "Over the last tenth of the log, and newest. A gap between training and held-out images is memory.",
            )
        )
    return page.section("Loss by noise level", shown(plots))


def magnitudes(run_data: Folder) -> str:
    last = run_data.last("magnitudes")
    if not last:
        return ""
    plots = []
    for what in last:
        label = what.replace("_", " ")
        for i, how in enumerate(("largest", "mean")):
            curves = {bucket: run_data.curve("magnitudes", what, bucket, i) for bucket in last[what]}
            drawn = figures.lines(curves, f"{label}, {how}", from_zero=True)
            plots.append((drawn, f"{label.capitalize()}: the {how} magnitude over the features of a bucket."))
    text = (
        "Magnitudes of features (EDM2 Eq. 3) of the averaged network, by resolution or third of the blocks; 1 is what unit-normal "
        "values have. Activations are what layers put out, the main path what whole blocks do; weights are as they were "
        "averaged, not put back on the sphere."
    )
    return page.section("Magnitudes", page.paragraph(text), shown(plots))


def speed(run_data: Folder) -> str:
    texts = {
        "images_per_second": ("images/s", "All that happened between log lines included."),
        "data_wait_fraction": ("share of time", "Share of time that steps waited for their batch."),
        "mfu": ("model FLOP utilization", "Of what a large matrix product reaches on this device, "
                        f"{run_data.last('matmul_tflops') or 0:g} TFLOP/s."),
        "peak_memory_gb": ("GB", "Most memory that was allocated on the GPU so far."),
    }  # fmt: skip
    plots = [(figures.lines({k: run_data.curve(k)}, label, from_zero=True), text) for k, (label, text) in texts.items()]
    return page.section("Speed", shown(plots))


def recipe(run_data: Folder) -> str:
    settings = f"<pre>{page.escape(config.to_yaml(run_data.run))}</pre>"
    environment = page.section("Made with", page.terms(run_data.run.environment))
    return environment + page.section("Recipe", page.folded("run.yaml", settings, is_open=True))
