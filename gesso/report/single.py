"""Content of the page about one run (templates/single.html)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gesso import config
from gesso.diffusion.loss_bins import NUM_BINS
from gesso.evaluation import ema_sweep
from gesso.evaluation.metrics import format_value, short_label
from gesso.evaluation.results import Evaluation
from gesso.report import plotting
from gesso.report.load import RunData, ToyResults, sample_count_text
from gesso.report.render import Figure, TableData, non_empty

MAX_GRIDS = 4
"""Number of sample grids from the training that are shown."""
DISTINGUISHING_FIELDS = (
    "sigma_rel",
    "halflife",
    "sampler",
    "steps",
    "guidance",
    "control_guidance",
    "guide_run",
    "reference",
    "validation",
)
"""Protocol keys that the heading of an evaluation shows if evaluations differ in them."""
MAGNITUDES_NOTE = (
    "Magnitudes of features (EDM2 Eq. 3) of the averaged network, by resolution or third of the blocks; unit-normal "
    "values have magnitude 1. Activations are outputs of layers, the main path is the output of blocks; averaged "
    "weights are not normalized again."
)


def page_context(run_data: RunData) -> dict[str, Any]:
    """Return the variables of the template."""
    return {
        "path": run_data.path,
        "subtitle": subtitle(run_data),
        "cards": cards(run_data),
        "samples": samples(run_data),
        "training_samples": training_samples(run_data),
        "scores": scores_table(run_data.toy.metrics),
        "toy_protocol": run_data.toy.protocol,
        "evaluations": evaluation_tables(run_data.evaluations),
        "ema_sweep": ema_sweep_figures(run_data.toy),
        "training": training(run_data),
        "unreadable": next((line["unreadable"] for line in run_data.lines if "unreadable" in line), []),
        "loss_by_noise": loss_by_noise(run_data),
        "magnitudes": magnitudes(run_data),
        "magnitudes_note": MAGNITUDES_NOTE,
        "throughput": throughput(run_data),
        "environment": run_data.run.environment,
        "recipe": config.to_yaml(run_data.run),
    }


def subtitle(run_data: RunData) -> str:
    """Return the network, process and data of a run as text."""
    run, data = run_data.run, run_data.run.data
    classes = f"{data.num_classes} classes" if data.num_classes else "no classes"
    validation = f", {data.num_validation:,} of them for validation" if data.num_validation else ""
    size = f"{data.resolution}\u00d7{data.resolution}\u00d7{data.channels}"
    return (
        f"{run.net.name} under {run.process.name}, recipe {run.recipe}: {data.num_images:,} images of {size}, "
        f"{classes}{validation}"
    )


def cards(run_data: RunData) -> list[tuple[str, str]]:
    """Return the most important numbers with their labels."""
    result = [(f"{run_data.images_seen:,}", "images seen")]
    if run_data.toy.protocol.get("toy_metrics") == "digits":
        return result + [
            (format_value(name, values[name]), f"{short_label(name)}, {title}")
            for title, values in run_data.toy.metrics.items()
            for name in ("class_accuracy", "frechet_distance")
        ]
    return result + [
        (format_value(name, value), f"{short_label(name)}, during training")
        for name, value in (run_data.last("metrics") or {}).items()
        if not name.endswith("_std")
    ]


def samples(run_data: RunData) -> list[Figure]:
    """Return the samples of `gesso evaluate` and their nearest training images."""
    sampling = run_data.run.sample
    by_class, nearest = run_data.picture("by_class.png"), run_data.picture("nearest.png")
    if by_class is None:
        return []
    rows = "One row per class. " if run_data.run.data.num_classes else ""
    length = f"half-life {sampling.halflife:,}" if sampling.halflife else f"sigma_rel {sampling.sigma_rel:g}"
    caption = (
        f"Samples. {rows}{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g}, EMA of {length}."
    )
    figures = [Figure(caption, image=by_class)]
    if nearest:
        caption = "The training image nearest to each sample, by pixel distance; copies would look the same."
        figures.append(Figure(caption, image=nearest))
    return figures


def training_samples(run_data: RunData) -> list[Figure]:
    """Return grids of samples from the training, evenly spaced from the first to the last."""
    grids = run_data.sample_grids()
    n = min(MAX_GRIDS, len(grids))
    selection = [grids[round(i * (len(grids) - 1) / max(n - 1, 1))] for i in range(n)]
    return [Figure(f"image {nimg:,}", image=path) for nimg, path in selection]


def scores_table(metrics: Mapping[str, Mapping[str, float]]) -> TableData | None:
    """Return the toy metrics of samples and of training images; None without any."""
    if not metrics:
        return None
    names = [name for name in next(iter(metrics.values())) if not name.endswith("_std")]
    rows = [
        (title, *(format_value(name, values[name], values.get(f"{name}_std")) for name in names))
        for title, values in metrics.items()
    ]
    return TableData(("", *map(short_label, names)), rows)


def evaluation_tables(evaluations: Sequence[Evaluation]) -> list[tuple[TableData, dict[str, Any]]]:
    """Return a table and the protocol of each evaluation."""
    result = []
    varying_keys = [
        name
        for name in DISTINGUISHING_FIELDS
        if len({evaluation.protocol.get(name) for evaluation in evaluations} - {None}) > 1
    ]
    for evaluation in evaluations:
        protocol = {name: value for name, value in evaluation.protocol.items() if value is not None}
        differences = "".join(f", {name} {protocol[name]}" for name in varying_keys if name in protocol)
        name = protocol.get("name", "scores")
        title = f"{name}: {sample_count_text(protocol)}, image {protocol['nimg']:,}{differences}"
        summaries: dict[Literal["best", "mean"], str] = {"mean": ""}
        if protocol["num_repeats"] > 1:
            summaries = {"best": f"best of {protocol['num_repeats']}", "mean": "mean"}
        rows = [
            (short_label(name), *(format_value(name, values[summary]) for summary in summaries))
            for name, values in evaluation.metrics.items()
            if not name.startswith("loss_")
        ]
        by_noise = [f"{values['mean']:.3g}" for name, values in evaluation.metrics.items() if name.startswith("loss_")]
        if by_noise:
            rows.append(("by noise, clean to noise", " ".join(by_noise), *("" for _ in list(summaries)[1:])))
        result.append((TableData((title, *summaries.values()), rows), protocol))
    return result


def ema_sweep_figures(toy: ToyResults) -> list[Figure]:
    """Return the plot of the Frechet distance over the EMA length."""
    if not toy.ema_sweep:
        return []
    first = toy.ema_sweep[0]
    caption = (
        "Each length is reconstructed after training from the stored EMAs (EDM2 Section 3), guidance "
        f"{first.protocol['guidance']:g}, {first.protocol['sampler']}, {first.protocol['steps']} steps; the band is "
        "the standard deviation over halves of the training images."
    )
    rows = [ema_sweep.curve_row(point) for point in toy.ema_sweep]
    return [Figure(caption, plotting.plot_ema_sweep(rows, first.reference_metrics["frechet_distance"]))]


def training(run_data: RunData) -> list[Figure]:
    """Return the curves of losses, gradient norm, learning rate and metrics."""
    validation = {
        describe_weights(name): run_data.curve("validation", name) for name in run_data.last("validation") or ()
    }
    gradient_norm = {"gradient norm": run_data.curve("grad_norm")}
    learning_rate = {"learning rate": run_data.curve("lr")}
    figures = [
        Figure(
            "Mean training loss between log lines, with the loss weighting of the recipe.",
            plotting.plot_curves({"training": run_data.curve("loss")}, "loss"),
        ),
        Figure(
            "Loss of validation images, which are not trained on, with fixed noise levels and noise; the MSE of the "
            "network's training target.",
            plotting.plot_curves(validation, "validation loss"),
        ),
        Figure(
            "Norm of the gradient of all weights at log lines, after the projection onto the sphere and before "
            "clipping.",
            plotting.plot_curves(gradient_norm, "gradient norm", scale="log"),
        ),
        Figure("Learning rate.", plotting.plot_curves(learning_rate, "learning rate", from_zero=True)),
    ]
    caption = "Measured during training with the tracked EMA whose length is nearest to that of sample.*."
    for name in run_data.last("metrics") or ():
        if not name.endswith("_std"):
            svg = plotting.plot_curves({name: run_data.curve("metrics", name)}, short_label(name))
            figures.append(Figure(caption, svg))
    return non_empty(figures)


def describe_weights(name: str) -> str:
    """Return a description of the weights under a name of `validation` in the log."""
    length = name.removeprefix("ema")
    return "raw weights" if name == "weights" else f"EMA, {'sigma_rel ' * length[0].isdigit()}{length}"


def loss_by_noise(run_data: RunData) -> list[Figure]:
    """Return the losses by noise level: over time, and the newest ones."""
    bins = range(NUM_BINS)
    caption = (
        f"Training loss in {NUM_BINS} equal bins of progress. All bins get equally many samples, because noise levels "
        "are drawn uniformly in progress."
    )
    curves = {b: run_data.curve("loss_by_noise", b) for b in bins}
    figures = [Figure(caption, plotting.plot_loss_by_noise(curves, "loss"))]
    names = list(run_data.last("validation_by_noise") or ())
    if names:
        validation = {b: run_data.curve("validation_by_noise", names[-1], b) for b in bins}
        svg = plotting.plot_loss_by_noise(validation, "validation loss")
        figures.append(Figure(f"The same for validation images, {describe_weights(names[-1])}.", svg))
    latest = {"training": run_data.late_mean("loss_by_noise")}
    latest |= {describe_weights(name): run_data.last("validation_by_noise", name) for name in names}
    if run_data.run.loss.weighting == "native" or not names:
        caption = (
            "Training loss, mean over the last tenth of the log, and newest validation loss. A gap between "
            "training and validation images shows memorization."
        )
        figures.append(Figure(caption, plotting.plot_loss_over_noise(latest, "loss")))
    return non_empty(figures)


def magnitudes(run_data: RunData) -> list[Figure]:
    """Return the curves of magnitudes of activations and weights."""
    figures = []
    for kind, buckets in (run_data.last("magnitudes") or {}).items():
        label = kind.replace("_", " ")
        for i, reduction in enumerate(("largest", "mean")):
            curves = {bucket: run_data.curve("magnitudes", kind, bucket, i) for bucket in buckets}
            svg = plotting.plot_curves(curves, f"{label}, {reduction}", from_zero=True)
            caption = f"{label.capitalize()}: the {reduction} magnitude over the features of a bucket."
            figures.append(Figure(caption, svg))
    return non_empty(figures)


def throughput(run_data: RunData) -> list[Figure]:
    """Return the curves of speed and memory."""
    texts = {
        "images_per_second": ("images/s", "Images per second, with everything that happens between log lines."),
        "data_wait_fraction": ("share of time", "Share of time in which steps waited for their batch."),
        "mfu": (
            "model FLOP utilization",
            "Share of the speed of a large matrix product on this device, "
            f"{run_data.last('matmul_tflops') or 0:g} TFLOP/s.",
        ),
        "peak_memory_gb": ("GB", "Peak of the memory allocated on the GPU."),
    }
    return non_empty(
        Figure(caption, plotting.plot_curves({key: run_data.curve(key)}, label, from_zero=True))
        for key, (label, caption) in texts.items()
    )
