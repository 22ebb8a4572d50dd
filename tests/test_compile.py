"""Blocks compiled and computed again are the same function: losses and gradients, by the compiler for CPUs."""

import shutil

import pytest
import torch
from networks import ROWS, batch, trained
from rich.console import Console

from gesso import config, nets, recipes
from gesso.train import loop, parallel
from gesso.train.start import opened

pytestmark = [
    pytest.mark.slow,  # half a minute each, mostly g++
    pytest.mark.filterwarnings("ignore"),  # the compiler itself touches what torch has deprecated
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile needs on a CPU"),
]
NETS = {
    "digits": ["net.width=32", "net.depth=2", "net.heads=2"],
    "digits-edm2": ["net.channels=16", "net.channels_per_head=16", "net.multipliers=[1]", "net.blocks=1",
                    "net.attention_levels=[0]"],
}  # fmt: skip
ROWS_HERE = {"mmdit++": ROWS["mmdit++: class control"]}
EDM2 = ROWS["edm2: class control"]
SMALLER = EDM2.cfg.model_copy(update={"multipliers": (1,), "attention_levels": (0,)})  # every width costs g++ its time
ROWS_HERE["edm2"] = EDM2._replace(cfg=SMALLER)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ROWS_HERE)
def test_gradients_of_compiled_blocks_that_are_computed_again(name):
    """In float64: what the compiler changes is the order of sums, so that 1e-10 tells a wrong gradient from another."""
    row = ROWS_HERE[name]

    def gradients(**how: bool) -> dict[str, torch.Tensor]:
        net = trained(row)
        for block in nets.blocks(net):
            parallel.faster(block, config.Train(**how))
        net(*batch(row)).square().mean().backward()
        return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}

    wanted = gradients()
    assert compiled_graphs() == 0
    for how in ({"recompute": True}, {"compile": True}, {"compile": True, "recompute": True}):
        for key, gradient in gradients(**how).items():
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-10, atol=1e-10, msg=f"{key}, {how}")
    assert compiled_graphs() > 0


@pytest.mark.parametrize("recipe", NETS)
def test_runs_compiled_and_computed_again(recipe):
    """Losses of float32 to 1e-5 over 6 steps: rounding of 6e-8 that Adam's first steps, which have the size of the rate
    whatever the gradient, carry into the weights."""
    losses = []
    for how in ([], ["train.compile=true", "train.recompute=true"]):
        settings = [*NETS[recipe], *how, "train.batch_size=8", "optim.warmup_images=64", "train.threads=1"]
        trainer = loop.Trainer(*opened(recipes.resolve(recipe, settings)[0], Console(quiet=True)))
        losses.append([trainer.step() for _ in range(6)])
    assert compiled_graphs() > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][0] != losses[0][-1]
