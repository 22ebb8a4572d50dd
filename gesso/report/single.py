"""The page on one run."""

from collections.abc import Iterator, Sequence
from typing import Any

from gesso import config
from gesso.diffusion.loss_bins import NUM_BINS
from gesso.report import figures, page
from gesso.report.folder import Folder, amount

GRIDS = 4
"""pictures of samples on the way that are shown"""


def sections(run: Folder) -> Iterator[str]:
    yield head(run)
    yield samples(run)
    yield scores(run.metrics)
    yield measured(run.measured)
    yield lengths(run.metrics)
    yield training(run)
    yield by_noise(run)
    yield magnitudes(run)
    yield speed(run)
    yield recipe(run)


def head(run_data: Folder) -> str:
    run, metrics, data = run_data.run, run_data.metrics, run_data.run.data
    classes = f"{data.num_classes} classes" if data.num_classes else "no classes"
    cards = [page.card(f"{run_data.seen:,}", "images seen")]
    if "class_agreement" in metrics:
        guided = f"guidance {run.sample.guidance:g}"
        cards.append(page.card(f"{metrics['class_agreement']:.1%}", f"class agreement, {guided}"))
        if "unguided" in metrics:
            cards.append(page.card(f"{metrics['unguided']['class_agreement']:.1%}", "class agreement, unguided"))
            cards.append(page.card(f"{metrics['unguided']['frechet_distance']:.2f}", "Frechet distance, unguided"))
        cards.append(page.card(f"{metrics['frechet_distance']:.2f}", f"Frechet distance, {guided}"))
        cards.append(page.card(f"{metrics['floor']['frechet_distance']:.2f}", "its floor, real against real"))
    elif on_the_way := run_data.last("metrics"):
        cards += [
            page.card(f"{v:.4g}", k.replace("_", " ") + ", on the way")
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


def distance(row: dict[str, float]) -> str:
    return f"{row['frechet_distance']:.3f} \u00b1 {row['frechet_distance_std']:.3f}"


def scores(metrics: dict[str, Any]) -> str:
    protocol = metrics.get("protocol", {})
    if protocol.get("features") == "shapes":
        return page.section("What is drawn", read_back(metrics)) + page.section("Protocol", page.terms(protocol))
    if "class_agreement" not in metrics:
        return ""
    rows = {f"guidance {protocol['guidance']:g}": metrics}
    if "unguided" in metrics:
        rows["unguided"] = metrics["unguided"]
    cells = [(name, f"{row['class_agreement']:.1%}", distance(row)) for name, row in rows.items()]
    cells.append(("real against real (floor)", f"{metrics['real']['class_agreement']:.1%}", distance(metrics["floor"])))
    table = page.table(("", "class agreement", "Frechet distance"), cells)
    return page.section("Scores", table) + page.section("Protocol", page.terms(protocol))


def read_back(metrics: dict[str, Any]) -> str:
    """Shares of pictures whose shapes are as their caption or class says."""
    guided = f"guidance {metrics['protocol']['guidance']:g}"
    titles = {"guided": guided, "unguided": "unguided", "real": "real pictures"}
    rows = [
        (title, *(f"{rate:.1%}" for rate in metrics[name].values()))
        for name, title in titles.items()
        if name in metrics
    ]
    return page.table(("", *metrics["real"]), rows)


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


def measured(evaluations: Sequence[dict[str, Any]]) -> str:
    """A table for each way of measuring, its protocol beneath: numbers of two protocols never share a column."""
    parts, protocols = [], [one["protocol"] for one in evaluations]
    varied = [name for name in APART if len({protocol.get(name) for protocol in protocols} - {None}) > 1]
    for one in evaluations:
        protocol = {name: value for name, value in one["protocol"].items() if value is not None}
        apart = "".join(f", {name} {protocol[name]}" for name in varied if name in protocol)
        title = f"{protocol.get('name', 'scores')}: {amount(protocol)}, image {protocol['nimg']:,}{apart}"
        kinds = {"best": f"best of {protocol['repeats']}", "mean": "mean"} if protocol["repeats"] > 1 else {"mean": ""}
        rows = [
            (name, *(f"{value[kind]:.4g}" for kind in kinds))
            for name, value in one["scores"].items()
            if not name.startswith("loss_")
        ]
        if by_noise := [f"{value['mean']:.3g}" for name, value in one["scores"].items() if name.startswith("loss_")]:
            rows.append(("by noise, clean to noise", " ".join(by_noise), *("" for _ in list(kinds)[1:])))
        table = page.table((title, *kinds.values()), rows)
        parts.append(table + page.folded("protocol", page.terms(protocol)))
    return page.section("Measured", *parts)


def lengths(metrics: dict[str, Any]) -> str:
    sweep = metrics.get("ema_sweep")
    if not sweep:
        return ""
    how = f"guidance {sweep['guidance']:g}, {sweep['sampler']}, {sweep['steps']} steps"
    text = (
        f"Each length rebuilt after training from the stored averages (EDM2 Section 3), {how}; "
        "the band is the spread over halves of the real images."
    )
    drawn = figures.lengths(sweep["rows"], metrics["floor"]["frechet_distance"])
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
            drawn = figures.lines({name: run_data.curve("metrics", name)}, name.replace("_", " "))
            plots.append((drawn, "Measured on the way, with the tracked average next to that of sample.*."))
    skipped = next((line["unreadable"] for line in run_data.lines if "unreadable" in line), [])
    names = ", ".join(name for name, _ in skipped[:20])
    left_out = page.paragraph(f"{len(skipped)} unreadable images were left out: {names}") if skipped else ""
    return page.section("Training", shown(plots), left_out)


def describe_weights(name: str) -> str:
    """Of a name under `validation` in the log."""
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
        "Magnitudes of features (EDM2 Eq. 3) of the averaged network, by resolution or third of the blocks; 1 is what "
        "unit-normal "
        "values have. Activations are what layers put out, the main path what whole blocks do; weights are as they "
        "were "
        "averaged, not put back on the sphere."
    )
    return page.section("Magnitudes", page.paragraph(text), shown(plots))


def speed(run_data: Folder) -> str:
    texts = {
        "images_per_second": ("images/s", "All that happened between log lines included."),
        "waiting": ("share of time", "Share of time that steps waited for their batch."),
        "utilisation": ("model FLOP utilisation", "Of what a large matrix product reaches on this device, "
                        f"{run_data.last('product_teraflops') or 0:g} TFLOP/s."),
        "peak_gigabytes": ("GB", "Most memory that was allocated on the GPU so far."),
    }  # fmt: skip
    plots = [(figures.lines({k: run_data.curve(k)}, label, from_zero=True), text) for k, (label, text) in texts.items()]
    return page.section("Speed", shown(plots))


def recipe(run_data: Folder) -> str:
    settings = f"<pre>{page.escape(config.to_yaml(run_data.run))}</pre>"
    environment = page.section("Made with", page.terms(run_data.run.environment))
    return environment + page.section("Recipe", page.folded("run.yaml", settings, is_open=True))
