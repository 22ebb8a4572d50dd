"""Measure the error of EMAs in float16: tracked in float16 with two kinds of rounding, or only stored in it.

    python benchmarks/ema_float16.py            # a minute on a CPU

The weights are a random walk whose steps shrink as an inverse square root, as in training. EMAs of sigma_rel .05 and
.10 are tracked over 20,000 steps with 40 snapshots, from which lengths of .02, .075 and .2 are reconstructed. Errors
are the root mean square of the difference from EMAs in float64, relative to the distance between the EMA and the
weights.
"""

import torch

from gesso import ema
from gesso.ema import PowerProfile

NUM_WEIGHTS, NUM_STEPS, NUM_SNAPSHOTS = 4_000, 20_000, 40
TRACKED, RECONSTRUCTED = (0.05, 0.10), (0.02, 0.075, 0.20)


def round_to_nearest(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest number in float16."""
    return x.half()


def round_stochastically(x: torch.Tensor) -> torch.Tensor:
    """Round to one of the two neighbours in float16, with the probabilities that preserve the mean."""
    nearest = x.half()
    step = (torch.nextafter(nearest, torch.where(x > nearest, torch.inf, -torch.inf).half()) - nearest).float()
    probability = torch.where(step == 0, 0.0, (x - nearest.float()) / step)
    return (nearest.float() + step * (torch.rand_like(x) < probability)).half()


STORAGE = {
    "float32, stored in float32": (lambda x: x, torch.float32),
    "float32, stored in float16": (lambda x: x, torch.float16),
    "float16, to nearest": (round_to_nearest, torch.float16),
    "float16, stochastic": (round_stochastically, torch.float16),
}
"""rounding after every update, dtype of snapshots"""


def random_walk() -> tuple[torch.Tensor, dict, dict]:
    """Return the final weights, the EMAs in float64 by sigma_rel, and the snapshots by storage."""
    torch.manual_seed(0)
    weights = torch.randn(NUM_WEIGHTS, dtype=torch.float64)
    exact = {sigma_rel: weights.clone() for sigma_rel in (*TRACKED, *RECONSTRUCTED)}
    emas = {name: {sigma_rel: weights.float() for sigma_rel in TRACKED} for name in STORAGE}
    snapshots = {name: [] for name in STORAGE}
    for t in range(NUM_STEPS):
        weights += 0.02 * torch.randn(NUM_WEIGHTS, dtype=torch.float64) / max(1, t / 500) ** 0.5
        for sigma_rel, average in exact.items():
            average.lerp_(weights, 1 - PowerProfile(sigma_rel).beta(t, t + 1))
        for name, (round_, dtype) in STORAGE.items():
            for sigma_rel in TRACKED:
                profile = PowerProfile(sigma_rel)
                updated = emas[name][sigma_rel].float().lerp(weights.float(), 1 - profile.beta(t, t + 1))
                emas[name][sigma_rel] = round_(updated)
                if (t + 1) % (NUM_STEPS // NUM_SNAPSHOTS) == 0:
                    snapshots[name].append((t + 1, profile, emas[name][sigma_rel].to(dtype)))
    return weights, exact, snapshots


def main() -> None:
    """Print a table of errors: storage by length."""
    weights, exact, snapshots_by_storage = random_walk()
    print(f"{'':28}" + "".join(f"{sigma_rel:>10}" for sigma_rel in exact))
    for name, snapshots in snapshots_by_storage.items():
        times, profiles, tensors = zip(*snapshots, strict=True)
        errors = []
        for sigma_rel, average in exact.items():
            coefficients = ema.fit_profile(times, profiles, NUM_STEPS, PowerProfile(sigma_rel)).coefficients
            reconstructed = sum(float(c) * tensor.double() for c, tensor in zip(coefficients, tensors, strict=True))
            distance = (average - weights).square().mean().sqrt()
            errors.append(float((reconstructed - average).square().mean().sqrt() / distance))
        print(f"{name:28}" + "".join(f"{error:10.2g}" for error in errors))


if __name__ == "__main__":
    main()
