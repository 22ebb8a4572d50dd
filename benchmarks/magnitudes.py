"""How large activations and weights grow over training, block by block, from the snapshots of finished runs.

    python benchmarks/magnitudes.py runs/dit runs/mp-dit [--out docs/images/magnitudes.png]

For each stored time: the rms of every block's output (EDM2 Eq. 3, mean over blocks and their largest) on 256
training images at the noise levels of training, and the mean rms of the matrices, of the average with
sigma_rel .05 (weights as averaged, not put back on the sphere).
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from gesso import config, keyed, snapshot
from gesso.data.batches import Batches
from gesso.data.dataset import open_dataset
from gesso.ema import Power


def block_rms(denoiser, x: Tensor, s: Tensor, cond) -> list[float]:
    """rms of each block's image tokens."""
    found: list[float] = []

    def note(module, inputs, out) -> None:
        tokens = out[0] if isinstance(out, tuple) else out
        found.append(float(tokens.square().mean().sqrt()))

    handles = [block.register_forward_hook(note) for block in denoiser.net.blocks]
    with torch.no_grad():
        denoiser(x, s, cond)
    for handle in handles:
        handle.remove()
    return found


def trace(folder: Path) -> list[dict[str, float]]:
    """One row per stored time."""
    run = config.read(folder / "run.yaml")
    loaded = open_dataset(run.data)
    rows = []
    for stored in snapshot.stored(folder):
        if stored.profile != Power(0.05):
            continue
        tensors, _, _ = snapshot.read(stored.path)
        denoiser = snapshot.denoiser(tensors, run)
        counter = torch.arange(256)
        x0, cond = Batches(loaded, run, denoiser.process.sd, torch.device("cpu"))(counter)
        s = denoiser.process.quantile(keyed.uniform(0, counter, "noise level")[:, 0]).float()
        x = x0 + s[:, None, None, None] * keyed.normal(0, counter, "noise", x0.shape[1:])
        activations = block_rms(denoiser, x, s, cond)
        matrices = [float(t.square().mean().sqrt()) for t in tensors.values() if t.ndim > 1]
        rows.append(
            {
                "nimg": stored.nimg,
                "activations mean": sum(activations) / len(activations),
                "activations max": max(activations),
                "weights mean": sum(matrices) / len(matrices),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    traces = {run.name: trace(run) for run in options.runs}
    for name, rows in traces.items():
        for row in (rows[0], rows[-1]):
            print(name, {k: round(v, 3) for k, v in row.items()})
    if options.out:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.2), layout="constrained")
        for axes, key in zip(figure.subplots(1, 3), list(rows[0])[1:], strict=True):
            for name, rows in traces.items():
                style = {"color": "#b4532a" if name.startswith("mp") else "#2f5d7c", "label": name}
                axes.plot([r["nimg"] / 1000 for r in rows], [r[key] for r in rows], **style)
            axes.set(title=key, xlabel="thousand images")
            axes.set_ylim(bottom=0)
        handles = {h.get_label().split("-s")[0]: h for h in axes.get_lines()}
        axes.legend(handles.values(), handles.keys(), frameon=False)
        figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
