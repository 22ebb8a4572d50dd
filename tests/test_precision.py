"""Products in 16 bits, loss scales, and steps whose gradient is not finite."""

import math

import pytest
import torch
from conftest import tiny_run
from rich.console import Console

from gesso.errors import RunError, UsageError
from gesso.train import loop
from gesso.train.start import opened

QUIET = Console(quiet=True)


def trainer(**settings) -> loop.Trainer:
    return loop.Trainer(*opened(tiny_run(**{"optim.warmup_images": 0} | settings), QUIET))


def poisoned(monkeypatch, times: range) -> None:
    """One value of the gradient is infinite at these steps."""
    passes = loop.Trainer._passes

    def spoiled(self, counter, *rest):
        found = passes(self, counter, *rest)
        if self.nimg // self.run.train.batch_size in times:
            next(p for p in self.modules.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
        return found

    monkeypatch.setattr(loop.Trainer, "_passes", spoiled)


def state(some: loop.Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in some.modules.state_dict().items()}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bits_train_as_thirty_two(precision):
    full, half = trainer(), trainer(**{"train.precision": precision})
    a, b = ([some.step() for _ in range(12)] for some in (full, half))
    assert b == pytest.approx(a, rel=0.01) and b != a
    assert all(value.dtype == torch.float32 for value in half.modules.state_dict().values())
    assert half.nonfinite == 0 and half.summary().get("loss_scale") == (2.0**16 if precision == "float16" else None)


def test_a_constant_loss_scale_changes_nothing_but_rounding():
    one, other = (trainer(**{"train.precision": "float16", "train.loss_scale": k}) for k in (64, 4096))
    a, b = ([some.step() for _ in range(6)] for some in (one, other))
    assert a == pytest.approx(b, rel=2e-3) and one.grad_norm == pytest.approx(other.grad_norm, rel=0.02)
    assert other.scaling[0] == 4096


def test_a_dynamic_scale_halves_at_an_overflow_and_doubles_later():
    some = trainer(**{"train.precision": "float16"})
    some.scaling[0] = 2.0**60
    before, steps = state(some), 0
    while some.scaling[2] > 0 or steps == 0:
        some.step()
        steps += 1
        if some.scaling[2] > 0:
            assert all(value.equal(before[name]) for name, value in some.modules.state_dict().items())
        if steps == 15:
            some.scaling[0] = 2.0**16  # far enough
    assert some.nonfinite == 15 and some.nimg == 16 * 32
    some.scaling[1] = 1999
    some.step()
    assert some.scaling.tolist() == [2.0**17, 0, 0]


@pytest.mark.parametrize("what, moved", [("skip", False), ("zero", True)])
def test_a_gradient_that_is_not_finite(monkeypatch, what, moved):
    poisoned(monkeypatch, range(2, 3))
    some = trainer(**{"train.nonfinite": what})
    some.step(), some.step()
    before = state(some)
    some.step()
    same = all(value.equal(before[name]) for name, value in some.modules.state_dict().items())
    assert same != moved and some.nonfinite == 1 and some.nimg == 96
    assert all(bool(value.isfinite().all()) for value in some.modules.state_dict().values())
    assert math.isfinite(some.step()) and some.scaling[2] == 0
    line = some.summary()
    assert line["nonfinite_steps"] == 1 and math.isfinite(line["grad_norm"])


@pytest.mark.parametrize("what", ["skip", "zero"])
def test_twenty_in_a_row_end_the_run(monkeypatch, what):
    poisoned(monkeypatch, range(3, 100))
    some = trainer(**{"train.nonfinite": what})
    for _ in range(22):
        some.step()
    with pytest.raises(RunError, match="gradient is not finite for the 20th time in a row"):
        some.step()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"train.precision": "bfloat16", "train.dtype": "float64"}, "set train.dtype=float32"),
        ({"train.loss_scale": 100}, "is for train.precision=float16"),
        ({"train.precision": "float8"}, "train.precision"),
    ],
)
def test_what_does_not_fit(settings, said):
    with pytest.raises(UsageError, match=said):
        tiny_run(**settings)
