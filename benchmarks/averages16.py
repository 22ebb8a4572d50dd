"""What 16 bits do to running averages of weights: kept in float16 by rounding to nearest or at random, and only stored so.

    python benchmarks/averages16.py            a minute on a CPU

Weights are a random walk whose steps shrink as an inverse square root, as those of training; an average is that of
sigma_rel .05 and .10 over 20,000 steps with 40 snapshots, from which .02, .075 and .2 are made afterwards. Errors are the
root mean square of the difference from averages kept in float64, relative to how far the average is from the weights.
"""

import torch

from gesso import ema
from gesso.ema import PowerProfile

N, STEPS, SNAPSHOTS = 4_000, 20_000, 40
TRACKED, RECONSTRUCTED = (0.05, 0.10), (0.02, 0.075, 0.20)


def to_nearest(x: torch.Tensor) -> torch.Tensor:
    return x.half()


def at_random(x: torch.Tensor) -> torch.Tensor:
    """One of the two neighbours in float16, with the chances that keep the mean."""
    near = x.half()
    step = (torch.nextafter(near, torch.where(x > near, torch.inf, -torch.inf).half()) - near).float()
    chance = torch.where(step == 0, 0.0, (x - near.float()) / step)
    return (near.float() + step * (torch.rand_like(x) < chance)).half()


WAYS = {
    "float32, stored in float32": (lambda x: x, torch.float32),
    "float32, stored in float16": (lambda x: x, torch.float16),
    "float16, to nearest": (to_nearest, torch.float16),
    "float16, at random": (at_random, torch.float16),
}


def walk() -> tuple[torch.Tensor, dict, dict]:
    """Final weights, averages by float64, and snapshots of each way."""
    torch.manual_seed(0)
    weights = torch.randn(N, dtype=torch.float64)
    exact = {s: weights.clone() for s in (*TRACKED, *RECONSTRUCTED)}
    remaining = {way: {s: weights.float() for s in TRACKED} for way in WAYS}
    stored = {way: [] for way in WAYS}
    for t in range(STEPS):
        weights += 0.02 * torch.randn(N, dtype=torch.float64) / max(1, t / 500) ** 0.5
        for s, average in exact.items():
            average.lerp_(weights, 1 - PowerProfile(s).beta(t, t + 1))
        for way, averages in remaining.items():
            for s in TRACKED:
                moved = averages[s].float().lerp(weights.float(), 1 - PowerProfile(s).beta(t, t + 1))
                averages[s] = WAYS[way][0](moved)
        if (t + 1) % (STEPS // SNAPSHOTS) == 0:
            for way, averages in remaining.items():
                stored[way] += [(t + 1, PowerProfile(s), averages[s].to(WAYS[way][1])) for s in TRACKED]
    return weights, exact, stored


def main() -> None:
    weights, exact, stored = walk()
    print(f"{'':28}" + "".join(f"{s:>10}" for s in (*TRACKED, *RECONSTRUCTED)))
    for way, snapshots in stored.items():
        errors = []
        for s in (*TRACKED, *RECONSTRUCTED):
            times, profiles = [t for t, _, _ in snapshots], [p for _, p, _ in snapshots]
            x = ema.fit_profile(times, profiles, STEPS, PowerProfile(s)).coefficients
            created = sum(float(c) * tensor.double() for c, (_, _, tensor) in zip(x, snapshots, strict=True))
            apart = (exact[s] - weights).square().mean().sqrt()
            errors.append(float((created - exact[s]).square().mean().sqrt() / apart))
        print(f"{way:28}" + "".join(f"{e:10.2g}" for e in errors))


if __name__ == "__main__":
    main()
