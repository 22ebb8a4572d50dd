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


def head(found: Folder) -> str:
    run, metrics, data = found.run, found.metrics, found.run.data
    classes = f"{data.num_classes} classes" if data.num_classes else "no classes"
    cards = [page.card(f"{found.seen:,}", "images seen")]
    if "class_accuracy" in metrics:
        guided = f"guidance {run.sample.guidance:g}"
        cards.append(page.card(f"{metrics['class_accuracy']:.1%}", f"class agreement, {guided}"))
        if "unguided" in metrics:
            cards.append(page.card(f"{metrics['unguided']['class_accuracy']:.1%}", "class agreement, unguided"))
            cards.append(page.card(f"{metrics['unguided']['frechet_distance']:.2f}", "Frechet distance, unguided"))
        cards.append(page.card(f"{metrics['frechet_distance']:.2f}", f"Frechet distance, {guided}"))
        cards.append(page.card(f"{metrics['floor']['frechet_distance']:.2f}", "its floor, real against real"))
    elif on_the_way := found.last("metrics"):
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


def distance(row: dict[str, float]) -> str:
    return f"{row['frechet_distance']:.3f} \u00b1 {row['frechet_distance_std']:.3f}"


def scores(metrics: dict[str, Any]) -> str:
    protocol = metrics.get("protocol", {})
    if protocol.get("features") == "shapes":
        return page.section("What is drawn", read_back(metrics)) + page.section("Protocol", page.terms(protocol))
    if "class_accuracy" not in metrics:
        return ""
    rows = {f"guidance {protocol['guidance']:g}": metrics}
    if "unguided" in metrics:
        rows["unguided"] = metrics["unguided"]
    cells = [(name, f"{row['class_accuracy']:.1%}", distance(row)) for name, row in rows.items()]
    cells.append(("real against real (floor)", f"{metrics['real']['class_accuracy']:.1%}", distance(metrics["floor"])))
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


def measured(found: Sequence[dict[str, Any]]) -> str:
    """A table for each way of measuring, its protocol beneath: numbers of two protocols never share a column."""
    parts, told = [], [one["protocol"] for one in found]
    varied = [name for name in APART if len({protocol.get(name) for protocol in told} - {None}) > 1]
    for one in found:
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
            drawn = figures.lines({name: found.curve("metrics", name)}, name.replace("_", " "))
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
