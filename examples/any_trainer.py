"""Post-hoc EMA in a training loop that knows nothing of gesso: any length of averaging, chosen afterwards.

    python examples/any_trainer.py            writes runs/any_trainer and prints a table

A small classifier of scikit-learn's digits is trained by plain PyTorch. The lines with `ema` are all that gesso adds.
Averages of the last weights classify better than the weights themselves, and how long they are matters.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from gesso import ema as profiles
from gesso import snapshot
from gesso.snapshot import PostHocEMA

BATCH, STEPS, SAVES = 32, 1600, 32


def data() -> tuple[torch.Tensor, ...]:
    """Training images and labels, with a tenth of the labels wrong, and clean ones to test on."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].float() / 8 - 1, y[order]
    train_y = y[:1000].clone()
    train_y[::10] = (train_y[::10] + 1) % 10
    return x[:1000], train_y, x[1000:], y[1000:]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    x, y, test_x, test_y = data()
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.15, momentum=0.9)

    ema = PostHocEMA(module)
    for step in range(1, STEPS + 1):
        some = torch.randint(len(x), (BATCH,))
        loss = nn.functional.cross_entropy(module(x[some]), y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:  # after each step, or every few
            ema.update(step * BATCH)
        if step % (STEPS // SAVES) == 0:
            ema.save(folder)

    def wrong() -> float:
        with torch.no_grad():
            return float((module(test_x).argmax(1) != test_y).double().mean())

    print(f"last weights      {wrong():6.2%} wrong")
    lengths = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25]
    # One length: PostHocEMA.synthesize(folder, 0.15). Several in one pass over the files, with their predicted errors:
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(folder), [profiles.PowerProfile(s) for s in lengths])
    for target, weights in zip(plan.targets, snapshot.reconstruct(plan), strict=True):
        module.load_state_dict(weights)
        print(f"{target!s:16}  {wrong():6.2%} wrong   ({plan.worst_fit(target)})")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/any_trainer"))
