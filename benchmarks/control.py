"""Control conditioning on the digits, of which every second was shrunk to 4x4: Table 2a and Figure 7 in small.

    for a in 1 2 4 8; do gesso train digits --out runs/cos$a data.source=digits-mixed-resolution control.variables=size control.alpha=$a; done
    python benchmarks/control.py size runs/cos1 runs/cos2 runs/cos4 runs/cos8
    python benchmarks/control.py strength runs/cos8 runs/cos8-s1 runs/cos8-s2 [--out docs/images/control.png]

size: the same seeds and classes told size 4x4 and 8x8. `content` is the distance of the two images shrunk to 4x4,
where they should agree, `features` that of the classifier's features; both in units of the distance between two
samples of one class. `detail` is what the size should change: the rms of image minus its 4x4 version told 8x8 over
that told 4x4 (in the data: 8x8 over 4x4 originals). Quality is measured with sizes drawn from training.
strength: Frechet distance and class agreement over control guidance beta, several seeds, guidance as in the run.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gesso import build_conditions, config, ema, rng, sampling, snapshot
from gesso.data.factory import open_dataset
from gesso.evaluation.feature_stats import Moments
from gesso.evaluation.metrics.frechet import frechet_distance
from gesso.evaluation.networks import toy_networks

BETAS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.375, 1.5, 2.0, 3.0)
COUNT = 898


class Tested:
    """A finished run, its denoiser, and the images it learned."""

    def __init__(self, folder: Path):
        self.run = config.load_config(folder / "run.yaml")
        weights, _, _, _ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(self.run.sample)])
        self.denoiser, self.rows = (
            snapshot.denoiser_from_weights(weights[0], self.run),
            snapshot.load_control_rows(folder),
        )
        self.network, self.images = toy_networks.load_digit_features(), open_dataset(self.run.data)

    def made(self, count: int = COUNT, first: int = 0, sample: dict | None = None, **control: str) -> Tensor:
        run = self.run.model_copy(update={"sample": self.run.sample.model_copy(update=sample or {})})
        seeds, labels = range(first, first + count), [i % 10 for i in range(count)]
        cond, _ = build_conditions.build_cond(run, seeds, self.rows, labels, None, control)
        return torch.cat(list(sampling.generate(self.denoiser, run, seeds, cond)))

    def quality(self, made: Tensor) -> dict[str, float]:
        """Frechet distance to a random half of the data, and class agreement."""
        half = rng.random_bits(0, torch.arange(len(self.images)), "half", 1)[:, 0].argsort(stable=True)[:COUNT]
        real, fake = Moments(), Moments()
        real.update(self.network.classify(self.images.pixels[half])[0])
        found, logits = self.network.classify(made)
        fake.update(found)
        agreement = float((logits.argmax(dim=1) == torch.arange(len(made)) % 10).double().mean())
        return {
            "frechet": frechet_distance(fake.mean, fake.cov, real.mean, real.cov),
            "agreement": agreement,
        }


def coarse(images: Tensor) -> Tensor:
    return F.avg_pool2d(images.double(), 2)


def detail(images: Tensor) -> float:
    """rms of what shrinking to 4x4 and back takes away."""
    back = F.interpolate(coarse(images), scale_factor=2, mode="bilinear")
    return float((images.double() - back).square().mean().sqrt())


def size(folder: Path) -> dict[str, float]:
    tested = Tested(folder)
    small, large = tested.made(size_conditioning="4x4"), tested.made(size_conditioning="8x8")
    other = tested.made(first=COUNT + 2, size_conditioning="8x8")  # the same classes, other seeds
    apart = {}
    for name, of in (
        ("content", lambda x: coarse(x).flatten(1)),
        ("features", lambda x: tested.network.classify(x)[0]),
    ):
        distance = [(of(large) - of(x)).norm(dim=1).mean() for x in (small, other)]
        apart[name] = float(distance[0] / distance[1])
    return apart | {"detail": detail(large) / detail(small)} | tested.quality(tested.made())


def strength(folder: Path) -> list[dict[str, float]]:
    tested = Tested(folder)
    return [{"beta": b} | tested.quality(tested.made(sample={"control_guidance": b})) for b in BETAS]


def plot(results: dict[str, list[dict[str, float]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.2))
    values = torch.tensor([[row["frechet"] for row in rows] for rows in results.values()])
    axes.errorbar(
        BETAS, values.mean(0), values.std(0) if len(values) > 1 else None, marker="o", capsize=3, color="#333"
    )
    axes.set(xlabel="control guidance beta", ylabel="Frechet distance", title=f"{len(values)} seeds")
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["size", "strength"])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = {}
    for folder in options.runs:
        results[folder.name] = size(folder) if options.what == "size" else strength(folder)
        print(folder.name, json.dumps(results[folder.name]), flush=True)
    if options.out and options.what == "strength":
        plot(results, options.out)


if __name__ == "__main__":
    main()
