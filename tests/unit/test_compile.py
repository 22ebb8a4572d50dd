"""Compilation and activation checkpointing of blocks do not change losses and gradients (on a CPU)."""

import shutil

import pytest
import torch
from helpers.network_cases import CASES, example_batch, randomized_net
from rich.console import Console

from gesso import config, models, recipes
from gesso.training import loop, parallel
from gesso.training.run_folder import open_dataset_for_run

pytestmark = [
    pytest.mark.slow,  # half a minute each, mostly g++
    pytest.mark.filterwarnings("ignore"),  # the compiler itself touches what torch has deprecated
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile needs on a CPU"),
]
NETS = {
    "digits": ["net.hidden_size=32", "net.depth=2", "net.num_heads=2"],
    "digits-edm2": ["net.channels=16", "net.channels_per_head=16", "net.channel_mult=[1]", "net.num_blocks=1",
                    "net.attention_levels=[0]"],
}  # fmt: skip
COMPILE_CASES = {"mmdit++": CASES["mmdit++: class control"]}
EDM2_CASE = CASES["edm2: class control"]
SMALLER_EDM2 = EDM2_CASE.cfg.model_copy(
    update={"channel_mult": (1,), "attention_levels": (0,)}
)  # every width costs g++ its time
COMPILE_CASES["edm2"] = EDM2_CASE._replace(cfg=SMALLER_EDM2)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", COMPILE_CASES)
def test_gradients_of_compiled_checkpointed_blocks(name):
    """The compiler changes the order of sums only, so that 1e-10 detects wrong gradients in float64."""
    row = COMPILE_CASES[name]

    def gradients(**options: bool) -> dict[str, torch.Tensor]:
        net = randomized_net(row)
        for block in models.list_blocks(net):
            parallel.compile_and_checkpoint_block(block, config.TrainConfig(**options))
        net(*example_batch(row)).square().mean().backward()
        return {key: p.grad for key, p in net.named_parameters() if p.grad is not None}

    expected = gradients()
    assert compiled_graphs() == 0
    for options in (
        {"activation_checkpointing": True},
        {"compile": True},
        {"compile": True, "activation_checkpointing": True},
    ):
        for key, gradient in gradients(**options).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-10, atol=1e-10, msg=f"{key}, {options}")
    assert compiled_graphs() > 0


@pytest.mark.parametrize("recipe", NETS)
def test_runs_with_compile_and_activation_checkpointing(recipe):
    """Losses of float32 to 1e-5 over 6 steps: rounding of 6e-8 that Adam's first steps, which have the size of the rate
    whatever the gradient, carry into the weights."""
    losses = []
    for options in ([], ["train.compile=true", "train.activation_checkpointing=true"]):
        settings = [*NETS[recipe], *options, "train.batch_size=8", "optim.warmup_images=64", "train.num_threads=1"]
        trainer = loop.Trainer(*open_dataset_for_run(recipes.resolve(recipe, settings)[0], Console(quiet=True)))
        losses.append([trainer.step() for _ in range(6)])
    assert compiled_graphs() > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[0][0] != losses[0][-1]
