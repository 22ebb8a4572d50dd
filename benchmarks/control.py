"""Measure control conditioning on digits, every second of which was shrunk to 4x4 (Table 2a and Figure 7).

    for a in 1 2 4 8; do
        gesso train digits --out runs/cos$a data.source=digits-mixed-resolution control.variables=size control.alpha=$a
    done
    python benchmarks/control.py size runs/cos1 runs/cos2 runs/cos4 runs/cos8
    python benchmarks/control.py guidance runs/cos8 runs/cos8-s1 runs/cos8-s2 [--out docs/images/control.png]

size: samples of the same seeds and classes, conditioned on size 4x4 and on 8x8. `content` is the distance between the
two images after shrinking to 4x4, where they should agree, `features` the distance between their classifier features;
both in units of the distance between two samples of one class. `detail` is what the size should change: the rms of
image minus its 4x4 version at 8x8, divided by the same at 4x4. Quality uses sizes sampled from the training data.
guidance: Frechet distance and class accuracy over control guidance beta for several seeds, guidance as in the run.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso import config, ema, rng, sampling, snapshot
from gesso.data.factory import open_dataset
from gesso.evaluation.feature_stats import Moments
from gesso.evaluation.metrics.frechet import frechet_distance
from gesso.evaluation.networks import toy_networks

BETAS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.375, 1.5, 2.0, 3.0)
NUM_SAMPLES = 898


class TrainedRun:
    """A finished run, its denoiser and its training images."""

    def __init__(self, folder: Path):
        self.run = config.load_config(folder / "run.yaml")
        weights, _, _, _ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(self.run.sample)])
        self.denoiser = snapshot.denoiser_from_weights(weights[0], self.run)
        self.control_rows = snapshot.load_control_rows(folder)
        self.network, self.images = toy_networks.load_digit_features(), open_dataset(self.run.data)

    def sample(self, first_seed: int = 0, sample_settings: dict | None = None, **control: str) -> Tensor:
        """Return NUM_SAMPLES images of all classes in turn, uint8 (N, 1, 8, 8)."""
        run = self.run.model_copy(update={"sample": self.run.sample.model_copy(update=sample_settings or {})})
        seeds, labels = range(first_seed, first_seed + NUM_SAMPLES), [i % 10 for i in range(NUM_SAMPLES)]
        cond, _ = sampling.build_cond(run, seeds, self.control_rows, labels, None, control)
        return torch.cat(list(sampling.generate(self.denoiser, run, seeds, cond)))

    def quality(self, images: Tensor) -> dict[str, float]:
        """Return the Frechet distance to a random half of the data, and the class accuracy."""
        half = rng.random_bits(0, torch.arange(len(self.images)), "half", 1)[:, 0].argsort(stable=True)[:NUM_SAMPLES]
        real, fake = Moments(), Moments()
        real.update(self.network.classify(self.images.pixels[half])[0])
        features, logits = self.network.classify(images)
        fake.update(features)
        return {
            "frechet": frechet_distance(fake.mean, fake.cov, real.mean, real.cov),
            "class_accuracy": float((logits.argmax(dim=1) == torch.arange(len(images)) % 10).double().mean()),
        }


def downsample(images: Tensor) -> Tensor:
    """Shrink images by 2."""
    return F.avg_pool2d(images.double(), 2)


def detail_rms(images: Tensor) -> float:
    """Return the rms of the detail that is lost by shrinking to 4x4 and back."""
    upsampled = F.interpolate(downsample(images), scale_factor=2, mode="bilinear")
    return float((images.double() - upsampled).square().mean().sqrt())


def size_disentanglement(folder: Path) -> dict[str, float]:
    """Return what the size changes in samples of the same seeds: content, features, detail; and the quality."""
    trained = TrainedRun(folder)
    small, large = trained.sample(size="4x4"), trained.sample(size="8x8")
    # The same classes with other seeds.
    unrelated = trained.sample(first_seed=NUM_SAMPLES + 2, size="8x8")
    metrics = {}
    for name, embed in (
        ("content", lambda x: downsample(x).flatten(1)),
        ("features", lambda x: trained.network.classify(x)[0]),
    ):
        distance = [(embed(large) - embed(x)).norm(dim=1).mean() for x in (small, unrelated)]
        metrics[name] = float(distance[0] / distance[1])
    return metrics | {"detail": detail_rms(large) / detail_rms(small)} | trained.quality(trained.sample())


def guidance_sweep(folder: Path) -> list[dict[str, float]]:
    """Return the quality at every control guidance of BETAS."""
    trained = TrainedRun(folder)
    return [
        {"beta": beta} | trained.quality(trained.sample(sample_settings={"control_guidance": beta})) for beta in BETAS
    ]


def plot(results: dict[str, list[dict[str, float]]], out: Path) -> None:
    """Plot the Frechet distance over control guidance, mean and standard deviation over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2))
    values = torch.tensor([[row["frechet"] for row in rows] for rows in results.values()])
    std = values.std(0) if len(values) > 1 else None
    axes.errorbar(BETAS, values.mean(0), std, marker="o", capsize=3, color="#333")
    axes.set(xlabel="control guidance beta", ylabel="Frechet distance", title=f"{len(values)} seeds")
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def main() -> None:
    """Print the measurements of every run as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measurements = {"size": size_disentanglement, "guidance": guidance_sweep}
    parser.add_argument("measurement", choices=list(measurements))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {}
    for folder in args.runs:
        results[folder.name] = measurements[args.measurement](folder)
        print(folder.name, json.dumps(results[folder.name]), flush=True)
    if args.out and args.measurement == "guidance":
        plot(results, args.out)


if __name__ == "__main__":
    main()
