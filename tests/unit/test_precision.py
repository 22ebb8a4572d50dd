"""Products in 16 bits, loss scales, and steps whose gradient is not finite."""

import math

import pytest
import torch
from helpers.network_cases import CASES, example_batch, randomized_net
from helpers.run_factory import tiny_run
from rich.console import Console

from gesso import config, models
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import process as processes
from gesso.errors import RunError, UsageError
from gesso.models.embeddings import SemanticEmbedding, TimestepEmbedding
from gesso.models.mp_transformer import MPClassEmbedding, MPNoiseEmbedding
from gesso.training import loop
from gesso.training.run_folder import open_dataset_for_run

QUIET_CONSOLE = Console(quiet=True)


def trainer(**settings) -> loop.Trainer:
    return loop.Trainer(*open_dataset_for_run(tiny_run(**{"optim.warmup_images": 0} | settings), QUIET_CONSOLE))


def make_nonfinite(monkeypatch, times: range) -> None:
    """Make one value of the gradient infinite at these steps."""
    passes = loop.Trainer.forward_backward

    def spoiled(self, counter, *rest):
        result = passes(self, counter, *rest)
        if self.nimg // self.run.train.batch_size in times:
            next(p for p in self.modules.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
        return result

    monkeypatch.setattr(loop.Trainer, "forward_backward", spoiled)


def copy_state(loop_trainer: loop.Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in loop_trainer.modules.state_dict().items()}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_16_bit_training_matches_32_bit(precision):
    full, half = trainer(), trainer(**{"train.precision": precision})
    a, b = ([loop_trainer.step() for _ in range(12)] for loop_trainer in (full, half))
    assert b == pytest.approx(a, rel=0.01) and b != a
    assert all(value.dtype == torch.float32 for value in half.modules.state_dict().values())
    assert half.num_nonfinite_steps == 0 and half.pop_log_line().get("loss_scale") == (
        2.0**16 if precision == "float16" else None
    )


def test_a_constant_loss_scale_changes_nothing_but_rounding():
    first, second = (trainer(**{"train.precision": "float16", "train.loss_scale": k}) for k in (64, 4096))
    a, b = ([loop_trainer.step() for _ in range(6)] for loop_trainer in (first, second))
    assert a == pytest.approx(b, rel=2e-3) and first.grad_norm == pytest.approx(second.grad_norm, rel=0.02)
    assert second.loss_scale_state[0] == 4096


def test_a_dynamic_scale_halves_at_an_overflow_and_doubles_later():
    loop_trainer = trainer(**{"train.precision": "float16"})
    loop_trainer.loss_scale_state[0] = 2.0**60
    before, steps = copy_state(loop_trainer), 0
    while loop_trainer.loss_scale_state[2] > 0 or steps == 0:
        loop_trainer.step()
        steps += 1
        if loop_trainer.loss_scale_state[2] > 0:
            assert all(value.equal(before[name]) for name, value in loop_trainer.modules.state_dict().items())
        if steps == 15:
            loop_trainer.loss_scale_state[0] = 2.0**16  # far enough
    assert loop_trainer.num_nonfinite_steps == 15 and loop_trainer.nimg == 16 * 32
    loop_trainer.loss_scale_state[1] = 1999
    loop_trainer.step()
    assert loop_trainer.loss_scale_state.tolist() == [2.0**17, 0, 0]


@pytest.mark.parametrize("action, moved", [("skip", False), ("zero", True)])
def test_nonfinite_gradient(monkeypatch, action, moved):
    make_nonfinite(monkeypatch, range(2, 3))
    loop_trainer = trainer(**{"train.on_nonfinite": action})
    loop_trainer.step(), loop_trainer.step()
    before = copy_state(loop_trainer)
    loop_trainer.step()
    same = all(value.equal(before[name]) for name, value in loop_trainer.modules.state_dict().items())
    assert same != moved and loop_trainer.num_nonfinite_steps == 1 and loop_trainer.nimg == 96
    assert all(bool(value.isfinite().all()) for value in loop_trainer.modules.state_dict().values())
    assert math.isfinite(loop_trainer.step()) and loop_trainer.loss_scale_state[2] == 0
    line = loop_trainer.pop_log_line()
    assert line["nonfinite_steps"] == 1 and math.isfinite(line["grad_norm"])


@pytest.mark.parametrize("action", ["skip", "zero"])
def test_max_nonfinite_steps_stop_the_run(monkeypatch, action):
    make_nonfinite(monkeypatch, range(3, 100))
    loop_trainer = trainer(**{"train.on_nonfinite": action})
    for _ in range(22):
        loop_trainer.step()
    with pytest.raises(RunError, match="gradient is not finite for the 20th time in a row"):
        loop_trainer.step()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train.precision": "bfloat16", "train.dtype": "float64"}, "set train.dtype=float32"),
        ({"train.loss_scale": 100}, "is for train.precision=float16"),
        ({"train.precision": "float8"}, "train.precision"),
    ],
)
def test_invalid_precision_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        tiny_run(**settings)


# The embedding of noise level, class and control, on which every block depends, is never rounded to 16 bits.


def embeddings(name: str, rounded: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return the embeddings that a network's blocks receive, by module name, with or without 16-bit products."""
    row, outputs = CASES[name], {}
    net = randomized_net(row).float()

    def keep(key: str):
        def hook(module, args, *output):
            values = [*args, *output]
            flat = [v for value in values for v in (value if isinstance(value, tuple | list) else [value])]
            for i, value in enumerate(flat):
                # Vectors of a sample: (B, E), and the class as a token (B, 1, E).
                is_embedding = torch.is_tensor(value) and value.is_floating_point() and value.shape[0] == 3
                if is_embedding and (value.ndim == 2 or (value.ndim == 3 and value.shape[1] == 1)):
                    outputs[f"{key} {i}"] = value

        return hook

    for key, module in net.named_modules():
        if isinstance(
            module, TimestepEmbedding | MPNoiseEmbedding | SemanticEmbedding | MPClassEmbedding
        ) or key.endswith("emb_linear"):
            module.register_forward_hook(keep(key))
    models.list_blocks(net)[0].register_forward_pre_hook(keep("block"))
    with torch.no_grad(), torch.autocast("cpu", rounded, enabled=rounded is not None):
        net(*example_batch(row, dtype=torch.float32))
    return outputs


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CASES if "none" not in name])
def test_embeddings_stay_in_full_precision(name, precision):
    expected, result = embeddings(name, None), embeddings(name, precision)
    assert expected.keys() == result.keys() and any(key.startswith("block") for key in expected)
    assert [key for key in expected if not expected[key].equal(result[key])] == []
    assert all(value.dtype == torch.float32 for value in result.values())


def test_uncertainty_stays_in_full_precision():
    process = processes.build_process(config.EDMConfig())
    torch.manual_seed(0)
    u, s = diffusion.Uncertainty(process), torch.linspace(0.01, 20, 50)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = u(s)
    assert rounded.dtype == torch.float32 and rounded.equal(u(s))


@pytest.mark.parametrize(
    "name", [name for name in CASES if name.endswith(("class control", "pooled control", ": text"))]
)
def test_16_bit_networks_stay_close(name):
    """Errors are below 2 %.

    bfloat16 has 8 bits, an error of 2^-9 per factor; float16 has three more. Squared errors of independent layers
    add up: .1 % for each of some 30 layers in a row is below 2 % in all.
    """
    row = CASES[name]
    net, args = randomized_net(row).float(), example_batch(row, dtype=torch.float32)
    with torch.no_grad():
        expected = net(*args)
        for dtype, most in ((torch.bfloat16, 0.02), (torch.float16, 0.004)):
            with torch.autocast("cpu", dtype):
                error = float((net(*args) - expected).norm() / expected.norm())
            assert 1e-5 < error < most, dtype
