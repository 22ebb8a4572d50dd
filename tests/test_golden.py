"""Golden losses: 30 steps of each digits recipe in float64 on one thread. A refactor leaves them as they are.

After a deliberate change of mathematics:  python tests/test_golden.py  writes them anew (and docs/log.md says why).
"""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gesso import recipes
from gesso.train import loop
from gesso.train.start import opened

GOLDEN = Path(__file__).with_name("golden.json")
RECIPES = list(recipes.digits.RECIPES)  # one for each network family


def losses(recipe: str) -> list[float]:
    torch.set_num_threads(1)
    settings = ["train.dtype=float64", "train.batch_size=16", "optim.warmup_images=0"]
    trainer = loop.Trainer(*opened(recipes.resolve(recipe, settings)[0], Console(quiet=True)))
    return [trainer.step() for _ in range(30)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_golden_losses(recipe):
    assert losses(recipe) == pytest.approx(json.loads(GOLDEN.read_text())[recipe], rel=1e-8)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({recipe: losses(recipe) for recipe in RECIPES}, indent=1) + "\n")
