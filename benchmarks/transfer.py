"""Figure 8 in small: drawn shapes at 16 pixels, then at 32, with each improvement of Berrada et al. Section 2.2 off in turn.

    python benchmarks/transfer.py [--before 20000] [--after 5000] [--seeds 1] [--out runs/figure8]

Loss of averages (sigma_rel .1) on drawings that no run has seen, at fixed noise, over images seen at 32 pixels; 0 is the
network as it was moved. Native weight, the same levels for all rows: `scaled` those that the rescaled noise draws, `kept`
those of 16 pixels. A row with kept noise has trained on the levels of `kept`, the others on those of `scaled`: each is at
home in its own column. The recipe's noise is tuned at 32 pixels, so that at 16 it has process.resolution_scale=0.5.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from gesso import ema, recipes, rng, snapshot
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.data.factory import open_dataset
from gesso.data.normalization import Normalizer
from gesso.diffusion import denoiser as diffusion
from gesso.training import init_source, transfer
from gesso.training.run_folder import open_dataset_for_run, start_training

QUIET = Console(quiet=True)
SEEN, UNSEEN, LEVELS = 1000, 64, 12
COMMON = [
    f"data.source=shapes-class:{SEEN}", "eval.toy_metrics=none", "net.hidden_size=96", "net.depth=3", "net.num_heads=3", "train.batch_size=32",
    "train.num_threads=1", "sample.guidance=1", "sample.sigma_rel=0.1",
]  # fmt: skip
SMALL = ["data.resolution=16", "process.resolution_scale=0.5"]
ROWS: dict[str, tuple[str, list[str]]] = {
    "from nothing": ("", []),
    "all on": ("whole", []),
    "positions extrapolated": ("whole", ["init.pos_embed=extrapolated"]),
    "noise kept": ("whole", ["init.noise_levels=keep"]),
    "both off": ("whole", ["init.pos_embed=extrapolated", "init.noise_levels=keep"]),
    "all on, local crops before": ("local", []),
}


class Measure:
    """Loss on unseen drawings."""

    def __init__(self, run: RunConfig):
        full = open_dataset(run.data.model_copy(update={"source": f"shapes-class:{SEEN + UNSEEN}"}))
        index = torch.arange(SEEN, SEEN + UNSEEN)
        samples = full.get(index, index)
        self.x0 = Normalizer(run.data, run.latent, 0.5, "cpu").to_x0(samples.x, 0, index)
        self.cond = Cond(label=samples.labels)
        u = (torch.arange(LEVELS) + 0.5) / LEVELS
        sigma = torch.exp(run.process.P_mean + run.process.P_std * torch.special.ndtri(u.double())).float()
        self.levels = {"scaled": sigma, "kept": sigma / 2}
        self.eps = [rng.normal(1, index, f"level {i}", self.x0.shape[1:]) for i in range(LEVELS)]

    @torch.no_grad()
    def losses(self, denoiser: diffusion.Denoiser) -> dict[str, float]:
        return {name: float(np.mean([self.loss(denoiser, s, eps) for s, eps in zip(levels, self.eps, strict=True)]))
                for name, levels in self.levels.items()}  # fmt: skip

    def loss(self, denoiser: diffusion.Denoiser, s: Tensor, eps: Tensor) -> float:
        return float(diffusion.loss(denoiser, denoiser.process, self.x0, s.expand(len(self.x0)), eps, self.cond).mean())


def trained(out: Path, seed: int, total: int, *settings: str) -> RunConfig:
    every = max(total // 4, 32)
    times = [
        f"train.total_images={total}",
        f"train.snapshot_every={every}",
        f"train.checkpoint_every={total}",
        f"train.seed={seed}",
    ]
    return start_training(
        recipes.resolve("shapes-class", [*COMMON, *times, *settings])[0], out, False, QUIET, lambda text: None
    )


def row(name: str, folder: Path, seed: int, after: int, measure: Measure) -> list[tuple[float, ...]]:
    """(scaled, kept) at 0, a quarter and all of `after` images."""
    before, settings = ROWS[name]
    settings = [*settings, f"init={folder / f'{before}-{seed}'}"] if before else settings
    actual = []
    if before:
        run, _ = open_dataset_for_run(recipes.resolve("shapes-class", [*COMMON, *settings])[0], QUIET)
        run, denoiser, _ = transfer.init_from_source(run, init_source.open_init_source(run))
        actual.append(tuple(measure.losses(denoiser.eval()).values()))
    out = folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    run = trained(out, seed, after, *settings)
    for nimg in (after // 4, after):
        at = min((s.nimg for s in snapshot.list_snapshots(out)), key=lambda n: abs(n - nimg))
        weights, _, _, _ = snapshot.reconstruct_from_run(out, [ema.PowerProfile(0.1)], at)
        actual.append(tuple(measure.losses(snapshot.denoiser_from_weights(weights[0], run)).values()))
    return actual if before else [(float("nan"),) * 2, *actual]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=int, default=20_000)
    parser.add_argument("--after", type=int, default=5_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp())
    for seed in range(options.seeds):
        trained(folder / f"whole-{seed}", seed, options.before, *SMALL)
        trained(folder / f"local-{seed}", seed, options.before, *SMALL, "data.crop_scale=0.4,0.6")
    measure = Measure(open_dataset_for_run(recipes.resolve("shapes-class", COMMON)[0], QUIET)[0])
    times = (0, options.after // 4, options.after)
    print(f"{'images at 32 pixels':28}" + "".join(f"{n:>18,}" for n in times))
    print(f"{'':28}" + "".join(f"{what:>9}" for _ in times for what in ("scaled", "kept")))
    for name in ROWS:
        values = np.mean([row(name, folder, seed, options.after, measure) for seed in range(options.seeds)], axis=0)
        print(f"{name:28}" + "".join(f"{v:9.4f}" for pair in values for v in pair), flush=True)


if __name__ == "__main__":
    main()
