"""Use post-hoc EMA in any PyTorch training loop: choose the EMA length after training.

    python examples/any_trainer.py            # writes runs/any_trainer and prints a table

A small classifier of scikit-learn's digits is trained in plain PyTorch; only lines with `ema` use gesso. EMA weights
classify better than the last weights, and the EMA length matters.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from gesso import ema as profiles
from gesso import snapshot
from gesso.snapshot import PostHocEMA

BATCH_SIZE, NUM_STEPS, NUM_SNAPSHOTS = 32, 1600, 32


def noisy_digits() -> tuple[torch.Tensor, ...]:
    """Return training images, their labels with a tenth of them wrong, test images and their correct labels."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].float() / 8 - 1, y[order]
    noisy_y = y[:1000].clone()
    noisy_y[::10] = (noisy_y[::10] + 1) % 10
    return x[:1000], noisy_y, x[1000:], y[1000:]


def main(folder: Path) -> None:
    """Train, save snapshots, and print the test error at several EMA lengths."""
    torch.manual_seed(0)
    x, y, test_x, test_y = noisy_digits()
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.15, momentum=0.9)

    ema = PostHocEMA(module)
    for step in range(1, NUM_STEPS + 1):
        batch = torch.randint(len(x), (BATCH_SIZE,))
        loss = nn.functional.cross_entropy(module(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:  # after every step or every few steps
            ema.update(step * BATCH_SIZE)
        if step % (NUM_STEPS // NUM_SNAPSHOTS) == 0:
            ema.save(folder)

    def test_error() -> float:
        with torch.no_grad():
            return float((module(test_x).argmax(1) != test_y).double().mean())

    print(f"last weights      {test_error():6.2%} test error")
    lengths = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25]
    # For one length use PostHocEMA.reconstruct(folder, 0.15). Several lengths in one pass, with predicted errors:
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(folder), [profiles.PowerProfile(s) for s in lengths])
    for target, weights in zip(plan.targets, snapshot.reconstruct(plan), strict=True):
        module.load_state_dict(weights)
        print(f"{target!s:16}  {test_error():6.2%} test error   ({plan.worst_fit(target)})")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/any_trainer"))
