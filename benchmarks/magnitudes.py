"""Plot the growth of activations and weights over training (EDM2 Eq. 3, Figures 3 and 15) from finished runs.

    gesso train digits-dit monitor.magnitude_every=2k    # and digits-mp-dit; or any run with snapshots
    python benchmarks/magnitudes.py runs/digits-dit runs/digits-mp-dit [--out docs/images/telemetry.png]

Magnitudes are read from the log of a run. Without them in the log, the snapshots of its shortest EMA are measured on
1,024 training samples at the noise levels of training.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from gesso import config, ema, rng, snapshot
from gesso.config import RunConfig
from gesso.data.base import Dataset
from gesso.data.batching import Batcher
from gesso.data.factory import open_dataset
from gesso.training.logging import read_log
from gesso.training.magnitudes import Magnitudes

NUM_SAMPLES, BATCH_SIZE = 1024, 128
PANELS = (
    ("weights", 1, "weights, mean, first = 1"),
    ("activations", 1, "activations, mean"),
    ("main_path", 1, "main path, mean"),
)
"""(key, index in [largest, mean], title)"""


def magnitude_history(folder: Path) -> dict[int, dict[str, Any]]:
    """Return {nimg: {kind: {group of blocks: [largest, mean]}}} of a run."""
    history = {line["nimg"]: line["magnitudes"] for line in read_log(folder / "log.jsonl") if "magnitudes" in line}
    if history:
        return history
    run = config.load_config(folder / "run.yaml")
    dataset = open_dataset(run.data, run.latent, run.train.seed)
    shortest = ema.tracked_profiles(run.ema)[0]
    return {
        s.nimg: measure_snapshot(run, dataset, s.path) for s in snapshot.list_snapshots(folder) if s.profile == shortest
    }


@torch.no_grad()
def measure_snapshot(run: RunConfig, dataset: Dataset, path: Path) -> dict[str, Any]:
    """Return the magnitudes of a snapshot on training samples."""
    tensors, _, _ = snapshot.read(path)
    denoiser = snapshot.denoiser_from_weights(tensors, run)
    batches = Batcher(dataset, run, denoiser.process.sigma_data, torch.device("cpu"))
    with Magnitudes(denoiser.net, run.input_spec.resolution) as magnitudes:
        for index in torch.arange(NUM_SAMPLES).split(BATCH_SIZE):
            x0, cond = batches(index)
            s = denoiser.process.icdf(rng.uniform(0, index, "noise level")[:, 0]).to(x0)
            level, eps = s[:, None, None, None], rng.normal(0, index, "noise", x0.shape[1:], x0.dtype)
            denoiser(denoiser.process.alpha(level) * x0 + level * eps, s, cond)
    return {
        "activations": magnitudes.activations(),
        "main_path": magnitudes.main_path(),
        "weights": magnitudes.weights(tensors),
    }


def main() -> None:
    """Print the first and last magnitudes of every run, and plot them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    histories = {folder.name: magnitude_history(folder) for folder in args.runs}
    for name, history in histories.items():
        for nimg in (min(history), max(history)):
            means = {
                kind: sum(mean for _, mean in groups.values()) / len(groups) for kind, groups in history[nimg].items()
            }
            print(f"{name} at image {nimg:,}: " + ", ".join(f"{kind} {mean:.4g}" for kind, mean in means.items()))
    if args.out:
        plot(histories, args.out)


def plot(histories: dict[str, dict[int, dict[str, Any]]], out: Path) -> None:
    """Plot a panel for each kind of magnitude, a colour for each run, a line for each group of blocks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    colors, styles = ("#b4532a", "#2f5d7c", "#7a9a3a"), ("-", "--", "-.")
    for axes, (kind, i, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for (name, history), color, style in zip(histories.items(), colors, styles, strict=False):
            times = sorted(history)
            for g, group in enumerate(history[times[0]][kind]):
                values = [history[t][kind][group][i] for t in times]
                scale = values[0] if kind == "weights" else 1
                x, y, label = [t / 1000 for t in times], [v / scale for v in values], name if g == 0 else None
                axes.plot(x, y, style, color=color, lw=1.4, label=label)
        axes.set(title=title, xlabel="thousand images")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e0d4", lw=0.8)
        if kind != "weights":
            axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
