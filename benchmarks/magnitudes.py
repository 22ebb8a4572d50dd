"""How large activations and weights grow over training (EDM2 Eq. 3, Figures 3 and 15), from the folders of finished runs.

    gesso train digits-dit monitor.magnitude_every=2k    # and digits-mp-dit; or any run that has snapshots
    python benchmarks/magnitudes.py runs/digits-dit runs/digits-mp-dit [--out docs/images/telemetry.png]

What the log of a run has is taken from there. Without it the snapshots of its shortest average are measured, on 1,024
training samples at the noise levels of training.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from gesso import config, ema, rng, snapshot
from gesso.data.batching import Batcher
from gesso.data.factory import open_dataset
from gesso.training.logging import read_log
from gesso.training.magnitudes import Magnitudes

SAMPLES, PASS = 1024, 128
SHOWN = (
    ("weights", 1, "weights, mean, first = 1"),
    ("activations", 1, "activations, mean"),
    ("main_path", 1, "main path, mean"),
)


def trace(folder: Path) -> dict[int, dict[str, Any]]:
    """[largest, mean] of activations and weights by bucket, by time."""
    logged = {line["nimg"]: line["magnitudes"] for line in read_log(folder / "log.jsonl") if "magnitudes" in line}
    if logged:
        return logged
    run = config.load_config(folder / "run.yaml")
    dataset = open_dataset(run.data, run.latent, run.train.seed)
    shortest = ema.tracked_profiles(run.ema)[0]
    return {s.nimg: measured(run, dataset, s.path) for s in snapshot.list_snapshots(folder) if s.profile == shortest}


@torch.no_grad()
def measured(run, dataset, path: Path) -> dict[str, Any]:
    tensors, _, _ = snapshot.read(path)
    denoiser = snapshot.denoiser_from_weights(tensors, run)
    batches = Batcher(dataset, run, denoiser.process.sigma_data, torch.device("cpu"))
    with Magnitudes(denoiser.net, run.inputs.resolution) as actual:
        for counter in torch.arange(SAMPLES).split(PASS):
            x0, cond = batches(counter)
            s = denoiser.process.icdf(rng.uniform(0, counter, "noise level")[:, 0]).to(x0)
            level, eps = s[:, None, None, None], rng.normal(0, counter, "noise", x0.shape[1:], x0.dtype)
            denoiser(denoiser.process.alpha(level) * x0 + level * eps, s, cond)
    return {"activations": actual.activations(), "main_path": actual.main_path(), "weights": actual.weights(tensors)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    traces = {run.name: trace(run) for run in options.runs}
    for name, rows in traces.items():
        for nimg in (min(rows), max(rows)):
            means = {
                what: sum(pair[1] for pair in actual.values()) / len(actual) for what, actual in rows[nimg].items()
            }
            print(f"{name} at image {nimg:,}: " + ", ".join(f"{what} {mean:.4g}" for what, mean in means.items()))
    if options.out:
        plot(traces, options.out)


def plot(traces: dict[str, dict[int, dict[str, Any]]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    for axes, (what, i, title) in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for (name, rows), colour, dash in zip(
            traces.items(), ("#b4532a", "#2f5d7c", "#7a9a3a"), ("-", "--", "-."), strict=False
        ):
            times = sorted(rows)
            for b, bucket in enumerate(rows[times[0]][what]):
                values = [rows[t][what][bucket][i] for t in times]
                first = values[0] if what == "weights" else 1
                label = name if b == 0 else None
                axes.plot(
                    [t / 1000 for t in times], [v / first for v in values], dash, color=colour, lw=1.4, label=label
                )
        axes.set(title=title, xlabel="thousand images")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e0d4", lw=0.8)
        if what != "weights":
            axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
