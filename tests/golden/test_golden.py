"""Golden losses: 30 steps of each network family on the digits in float64 on one thread.

A refactor does not change them. After a change of mathematics, `python tests/golden/test_golden.py` writes them again
(and docs/decisions.md says why).
"""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gesso import recipes
from gesso.training import loop
from gesso.training.run_folder import open_dataset_for_run

GOLDEN = Path(__file__).with_name("golden.json")
# name: recipe, its settings. One recipe for each network family; of EDM2's ladder CONFIG B, with dropout.
RUNS: dict[str, tuple[str, list[str]]] = {
    **{recipe: (recipe, []) for recipe in recipes.digits.RECIPES},
    "edm2-ladder-b": ("digits-edm2", ["net.name=edm2-ladder", "net.config=B", "net.dropout=0.1", "optim.lr=1e-3"]),
}


def train_losses(name: str) -> list[float]:
    torch.set_num_threads(1)
    recipe, settings = RUNS[name]
    settings = [*settings, "train.dtype=float64", "train.batch_size=16", "optim.warmup_images=0"]
    trainer = loop.Trainer(*open_dataset_for_run(recipes.resolve(recipe, settings)[0], Console(quiet=True)))
    return [trainer.step() for _ in range(30)]


@pytest.mark.parametrize("name", RUNS)
def test_golden_losses(name):
    assert train_losses(name) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-8)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: train_losses(name) for name in RUNS}, indent=1) + "\n")
