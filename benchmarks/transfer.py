"""Measure each improvement of transfer to a higher resolution on shapes (Berrada et al. 2024, Section 2.2, Figure 8).

    python benchmarks/transfer.py [--before 20000] [--after 5000] [--seeds 1] [--out runs/figure8]

A network is trained at 16 pixels for `before` images, then at 32 pixels for `after` images, with one improvement off
at a time. The table has the loss of the EMA of sigma_rel .1 on held-out images at fixed noise, over images seen at 32
pixels; 0 is the network before any step at 32 pixels. The loss has its native weight and two sets of noise levels,
the same for all rows: `rescaled` are those of the rescaled noise distribution, `original` those of 16 pixels. A row
with init.noise_levels=keep was trained on `original`, the others on `rescaled`; compare each in the column it was
trained on. The noise of the recipe is tuned at 32 pixels, so that training at 16 has process.resolution_scale=0.5.
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
NUM_TRAIN, NUM_HELD_OUT, NUM_LEVELS = 1000, 64, 12
COMMON = [
    f"data.source=shapes-class:{NUM_TRAIN}", "eval.toy_metrics=none", "net.hidden_size=96", "net.depth=3",
    "net.num_heads=3", "train.batch_size=32", "train.num_threads=1", "sample.guidance=1", "sample.sigma_rel=0.1",
]  # fmt: skip
SMALL = ["data.resolution=16", "process.resolution_scale=0.5"]
CASES: dict[str, tuple[str, list[str]]] = {
    "from scratch": ("", []),
    "all on": ("full", []),
    "positions extrapolated": ("full", ["init.pos_embed=extrapolated"]),
    "noise levels kept": ("full", ["init.noise_levels=keep"]),
    "both off": ("full", ["init.pos_embed=extrapolated", "init.noise_levels=keep"]),
    "all on, trained on local crops": ("local", []),
}
"""row of the table: training at 16 pixels (empty for none), settings"""


class HeldOutLoss:
    """Loss on held-out images at fixed noise."""

    def __init__(self, run: RunConfig):
        dataset = open_dataset(run.data.model_copy(update={"source": f"shapes-class:{NUM_TRAIN + NUM_HELD_OUT}"}))
        index = torch.arange(NUM_TRAIN, NUM_TRAIN + NUM_HELD_OUT)
        samples = dataset.get(index, index)
        self.x0 = Normalizer(run.data, run.latent, 0.5, "cpu").to_x0(samples.x, 0, index)
        self.cond = Cond(label=samples.labels)
        u = (torch.arange(NUM_LEVELS) + 0.5) / NUM_LEVELS
        sigma = torch.exp(run.process.P_mean + run.process.P_std * torch.special.ndtri(u.double())).float()
        self.levels = {"rescaled": sigma, "original": sigma / 2}
        self.eps = [rng.normal(1, index, f"level {i}", self.x0.shape[1:]) for i in range(NUM_LEVELS)]

    @torch.no_grad()
    def __call__(self, denoiser: diffusion.Denoiser) -> tuple[float, ...]:
        """Return the mean loss at the rescaled and at the original noise levels."""
        return tuple(
            float(np.mean([self.loss(denoiser, s, eps) for s, eps in zip(levels, self.eps, strict=True)]))
            for levels in self.levels.values()
        )

    def loss(self, denoiser: diffusion.Denoiser, s: Tensor, eps: Tensor) -> float:
        """Return the mean loss at noise level s."""
        losses = diffusion.loss(denoiser, denoiser.process, self.x0, s.expand(len(self.x0)), eps, self.cond)
        return float(losses.mean())


def train_run(out: Path, seed: int, total_images: int, *settings: str) -> RunConfig:
    """Train shapes-class with the settings of COMMON, or resume; return the run."""
    training = [
        f"train.total_images={total_images}",
        f"train.snapshot_every={max(total_images // 4, 32)}",
        f"train.checkpoint_every={total_images}",
        f"train.seed={seed}",
    ]
    run = recipes.resolve("shapes-class", [*COMMON, *training, *settings])[0]
    return start_training(run, out, False, QUIET, lambda text: None)


def measure_row(
    case: str, folder: Path, seed: int, images_after: int, held_out_loss: HeldOutLoss
) -> list[tuple[float, ...]]:
    """Return the losses (rescaled, original) after 0, a quarter and all of `images_after` images at 32 pixels."""
    source, settings = CASES[case]
    settings = [*settings, f"init={folder / f'{source}-{seed}'}"] if source else settings
    losses = [(float("nan"),) * 2]
    if source:
        run, _ = open_dataset_for_run(recipes.resolve("shapes-class", [*COMMON, *settings])[0], QUIET)
        run, denoiser, _ = transfer.init_from_source(run, init_source.open_init_source(run))
        losses = [held_out_loss(denoiser.eval())]
    out = folder / f"{case.replace(' ', '-').replace(',', '')}-{seed}"
    run = train_run(out, seed, images_after, *settings)
    for nimg in (images_after // 4, images_after):
        nearest = min((s.nimg for s in snapshot.list_snapshots(out)), key=lambda n, target=nimg: abs(n - target))
        weights, _, _, _ = snapshot.reconstruct_from_run(out, [ema.PowerProfile(0.1)], nearest)
        losses.append(held_out_loss(snapshot.denoiser_from_weights(weights[0], run)))
    return losses


def main() -> None:
    """Train all cases and print the table of losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=int, default=20_000)
    parser.add_argument("--after", type=int, default=5_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.out or Path(tempfile.mkdtemp())
    for seed in range(args.seeds):
        train_run(folder / f"full-{seed}", seed, args.before, *SMALL)
        train_run(folder / f"local-{seed}", seed, args.before, *SMALL, "data.crop_scale=0.4,0.6")
    held_out_loss = HeldOutLoss(open_dataset_for_run(recipes.resolve("shapes-class", COMMON)[0], QUIET)[0])
    print(f"{'images at 32 pixels':32}" + "".join(f"{n:>20,}" for n in (0, args.after // 4, args.after)))
    print(f"{'':32}" + f"{'rescaled':>10}{'original':>10}" * 3)
    for case in CASES:
        rows = [measure_row(case, folder, seed, args.after, held_out_loss) for seed in range(args.seeds)]
        print(f"{case:32}" + "".join(f"{v:10.4f}" for pair in np.mean(rows, axis=0) for v in pair), flush=True)


if __name__ == "__main__":
    main()
