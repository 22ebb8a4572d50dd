"""Rates, betas and decay by group; the rate at another batch size."""

import importlib.util
import math
from fnmatch import fnmatchcase

import pytest
import torch
from helpers.run_factory import tiny_run
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gesso import config, recipes
from gesso.errors import UsageError
from gesso.models import mp
from gesso.training import loop, optimizer
from gesso.training.run_folder import open_dataset_for_run

QUIET = Console(quiet=True)


def trainer(*groups: dict, **settings) -> loop.Trainer:
    output = [{"match": "*", **group} for group in groups]
    run = tiny_run(**{"optim.warmup_images": 0} | settings)
    tree = config.to_dict(run)
    tree["optim"]["param_groups"] = output
    return loop.Trainer(*open_dataset_for_run(config.validate(tree), QUIET))


def settings_of(loop_trainer: loop.Trainer) -> dict[str, tuple]:
    """What holds for each parameter, by name."""
    names = {id(p): name for name, p in loop_trainer.modules.named_parameters()}
    return {
        names[id(p)].removeprefix("net."): (group["lr_multiplier"], tuple(group["betas"]), group["weight_decay"])
        for group in loop_trainer.optimizer.param_groups
        for p in group["params"]
    }


BIAS = {"match": "*.bias", "lr_multiplier": 2.0, "betas": [0.5, 0.6], "weight_decay": 0.3}
FIRST = {"match": "blocks.0.*", "lr_multiplier": 0.25}
BASE = {"optim.weight_decay": 0.1, "optim.name": "adamw"}


def test_the_first_glob_that_fits_decides():
    loop_trainer = trainer(BIAS, FIRST, **BASE)
    actual = settings_of(loop_trainer)
    assert actual.keys() == {name.removeprefix("net.") for name, _ in loop_trainer.modules.named_parameters()}
    for name, parameter in loop_trainer.modules.named_parameters():
        name = name.removeprefix("net.")
        decay = 0.1 if parameter.ndim > 1 else 0.0
        wanted = (1.0, (0.9, 0.99), decay)
        if fnmatchcase(name, "*.bias"):
            wanted = (2.0, (0.5, 0.6), 0.3)
        elif name.startswith("blocks.0."):
            wanted = (0.25, (0.9, 0.99), decay)
        assert actual[name] == wanted, name
    assert len({*actual.values()}) == 4  # biases; two of the first block, matrices of the rest


def test_a_step_is_that_of_adamw_by_hand():
    """Of every parameter after three steps, by the equations of AdamW with the settings of its group."""
    loop_trainer = trainer(BIAS, FIRST, **BASE | {"train.dtype": "float64"})
    lr, expected, moments = loop_trainer.run.optim.lr, {}, {}
    settings, parameters = settings_of(loop_trainer), dict(loop_trainer.modules.named_parameters())
    step = loop_trainer.optimizer.step

    def by_hand() -> None:
        for name, p in parameters.items():
            if p.grad is None:
                continue
            factor, (b1, b2), decay = settings[name.removeprefix("net.")]
            m, v, t = moments.get(name, (0, 0, 0))
            m, v, t = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2, t + 1
            moments[name] = m, v, t
            moved = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + loop_trainer.run.optim.eps)
            expected[name] = p.detach() * (1 - lr * factor * decay) - lr * factor * moved
        step()
        for name, wanted in expected.items():
            torch.testing.assert_close(parameters[name].detach(), wanted, rtol=1e-10, atol=1e-12, msg=name)

    loop_trainer.optimizer.step = by_hand
    for _ in range(3):
        loop_trainer.step()
    assert len(expected) > 20


def test_no_group_is_as_before():
    without_groups, one_group = trainer(**BASE), trainer({"match": "*"}, **BASE)
    assert [without_groups.step() for _ in range(3)] == [one_group.step() for _ in range(3)]
    assert all(
        a.equal(b) for a, b in zip(without_groups.modules.parameters(), one_group.modules.parameters(), strict=True)
    )


def test_the_sphere_never_decays():
    run = recipes.resolve("digits-edm2", ["net.channels=16", "net.channels_per_head=16", "loss.weighting=uncertainty"])[
        0
    ]
    tree = config.to_dict(run)
    tree["optim"] |= {
        "weight_decay": 0.1,
        "param_groups": [{"match": "*gain", "weight_decay": 0.2}, {"match": "uncertainty.*", "lr_multiplier": 3}],
    }
    loop_trainer = loop.Trainer(*open_dataset_for_run(config.validate(tree), QUIET))
    actual, sphere = settings_of(loop_trainer), {id(w) for w in mp.sphere_weights(loop_trainer.modules)}
    for name, parameter in loop_trainer.modules.named_parameters():
        if id(parameter) in sphere:
            assert actual[name.removeprefix("net.")][2] == 0
    assert actual["out_gain"][2] == 0.2 and actual["uncertainty.linear.weight"][0] == 3
    with pytest.raises(UsageError, match="all its weights are normalized"):
        tree["optim"]["param_groups"] = [{"match": "conv_*.weight", "weight_decay": 0.2}]
        loop.Trainer(*open_dataset_for_run(config.validate(tree), QUIET))


@pytest.mark.parametrize(
    "groups, output",
    [
        ([{"match": "blocks.0.imag.*"}], "matches no parameter of this network; did you mean .*blocks.0.image"),
        ([{"match": "nothing-like-it"}], "matches no parameter"),
        (
            [{"match": "*"}, {"match": "*.bias"}],
            r"match=\*.bias has no effect: earlier groups match all its parameters",
        ),
    ],
)
def test_globs_that_fit_nothing(groups, output):
    with pytest.raises(UsageError, match=output):
        trainer(*groups)


@pytest.mark.parametrize(
    "argument, output",
    [
        ('optim.param_groups=[{"match":"*","lr_multiplier": 0}]', "optim.param_groups.0.lr_multiplier"),
        ('optim.param_groups=[{"lr_multiplier": 1}]', "optim.param_groups.0.match is missing"),
        (
            'optim.param_groups=[{"match":"*","rate":1}]',
            "optim.param_groups.0.rate = 1: no such setting; did you mean|there are",
        ),
        ("optim.lr_scaling=sqrt", "needs the batch size that optim.lr was tuned for"),
    ],
)
def test_settings_that_are_wrong(argument, output):
    with pytest.raises(UsageError, match=output):
        recipes.resolve("digits", [argument])


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(1e-6, 1))
def test_the_rate_at_another_batch(tuned, batch, lr):
    train = config.TrainConfig(batch_size=batch)
    rate = {
        rule: optimizer.learning_rate(config.OptimConfig(lr=lr, base_batch_size=tuned, lr_scaling=rule), train, 10**9)
        for rule in ("none", "sqrt", "linear")
    }
    assert rate["none"] == lr == optimizer.learning_rate(config.OptimConfig(lr=lr), train, 0)
    assert rate["linear"] * tuned == pytest.approx(lr * batch)
    assert rate["sqrt"] ** 2 == pytest.approx(rate["none"] * rate["linear"])


def test_steps_of_adam_grow_by_the_root_where_noise_rules():
    """With noisy gradients, k times fewer steps at sqrt(k) times the learning rate move as far.

    The variance of the sum of k steps of size lr is that of one step of sqrt(k) lr.
    """
    torch.manual_seed(0)
    far = {}
    for batch in (1, 16):
        cfg = config.OptimConfig(lr=1e-3, base_batch_size=1, lr_scaling="sqrt", betas=(0.0, 0.999))
        weight = torch.nn.Parameter(torch.zeros(4000))
        adam = torch.optim.Adam(
            [weight], lr=optimizer.learning_rate(cfg, config.TrainConfig(batch_size=batch), 0), betas=cfg.betas
        )
        for _ in range(3200 // batch):
            weight.grad = torch.randn(4000) / math.sqrt(batch)
            adam.step()
        far[batch] = float(weight.detach().std())
    assert far[16] == pytest.approx(far[1], rel=0.1)


def test_a_recipe_tuned_at_2048_offers_its_rules():
    _, notes = recipes.resolve("edm2-img512-s", ["train.batch_size=256"])
    assert notes == [
        "optim.lr=0.01 was tuned for batch size 2048, but train.batch_size=256; add optim.lr_scaling=sqrt (0.00354) or "
        "optim.lr_scaling=linear (0.00125) to scale it"
    ]
    run, notes = recipes.resolve("edm2-img512-s", ["train.batch_size=256", "optim.lr_scaling=sqrt"])
    assert notes == [
        "optim.lr=0.01 was tuned for batch size 2048; at train.batch_size=256 it is 0.00354 (optim.lr_scaling=sqrt)"
    ]
    assert run.optim.peak_lr(256) == pytest.approx(0.01 / math.sqrt(8))
    assert recipes.resolve("edm2-img512-s", [])[1] == []


def test_groups_are_resumed(tmp_path):
    """The state has the names that it would have without groups, and is read into others."""
    from gesso.training import checkpoint

    uninterrupted, plain = trainer(BIAS, FIRST, **BASE), trainer(**BASE)
    assert uninterrupted.state_tensors().keys() == plain.state_tensors().keys()
    for _ in range(3):
        uninterrupted.step()
    checkpoint.save_checkpoint(tmp_path / "state", uninterrupted.nimg, uninterrupted.state_tensors())
    after = [uninterrupted.step() for _ in range(3)]
    resumed = trainer(BIAS, FIRST, **BASE)
    resumed.nimg = checkpoint.load_latest(tmp_path / "state", resumed.state_tensors(), print)
    assert [resumed.step() for _ in range(3)] == after


# Adam's averages in 8 bits, by bitsandbytes.

EIGHT = {"optim.state_dtype": "8bit", "net.hidden_size": 64}


def without_library() -> bool:
    return importlib.util.find_spec("bitsandbytes") is None


library = pytest.mark.skipif(
    without_library(), reason="bitsandbytes is not installed: pip install 'gesso-diffusion[bits]'"
)


@library
def test_eight_bits_train_as_thirty_two_in_a_quarter_of_the_room():
    full, eight = trainer(**EIGHT | {"optim.state_dtype": "full"}), trainer(**EIGHT)
    a, b = ([loop_trainer.step() for _ in range(40)] for loop_trainer in (full, eight))
    assert a != b and sum(b[-10:]) == pytest.approx(sum(a[-10:]), rel=0.03)
    size = {}
    for loop_trainer in (full, eight):
        state = optimizer.named_optimizer_state(loop_trainer.optimizer, loop_trainer.modules)
        large = [n for n, p in loop_trainer.modules.named_parameters() if p.numel() >= 4096]
        num_bytes = sum(t.nbytes for n, t in state.items() if any(n.startswith(name + ".") for name in large))
        size[loop_trainer] = num_bytes / sum(
            p.numel() for n, p in loop_trainer.modules.named_parameters() if n in large
        )
    assert size[full] == pytest.approx(8, abs=0.01) and size[eight] == pytest.approx(2 + 8 / 256, abs=0.01)


@library
def test_eight_bits_are_adamw_but_for_rounding():
    """In the first step from zero every quotient m / sqrt(v) is 1, whatever its 8 bits are later; decay agrees too."""
    run = {"optim.name": "adamw", "optim.weight_decay": 0.1}
    full, eight = trainer(**EIGHT | run | {"optim.state_dtype": "full"}), trainer(**EIGHT | run)
    full.step(), eight.step()
    for (name, a), b in zip(full.modules.named_parameters(), eight.modules.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=name)


@library
def test_eight_bits_resume_bit_by_bit(tmp_path):
    from gesso.training import checkpoint

    uninterrupted = trainer(BIAS, **EIGHT | BASE)
    for _ in range(3):
        uninterrupted.step()
    checkpoint.save_checkpoint(tmp_path / "state", uninterrupted.nimg, uninterrupted.state_tensors())
    assert all(
        t.dtype in (torch.uint8, torch.float32)
        for t in optimizer.named_optimizer_state(uninterrupted.optimizer, uninterrupted.modules).values()
    )
    after = [uninterrupted.step() for _ in range(3)]
    resumed = trainer(BIAS, **EIGHT | BASE)
    resumed.nimg = checkpoint.load_latest(tmp_path / "state", resumed.state_tensors(), print)
    assert [resumed.step() for _ in range(3)] == after
    assert all(
        a.equal(b) for a, b in zip(uninterrupted.modules.parameters(), resumed.modules.parameters(), strict=True)
    )


@library
def test_eight_bits_leave_the_sphere_to_the_step():
    run = recipes.resolve("digits-edm2", ["net.channels=16", "net.channels_per_head=16", "optim.state_dtype=8bit"])[0]
    loop_trainer = loop.Trainer(*open_dataset_for_run(run, QUIET))
    for _ in range(3):
        loop_trainer.step()
    for weight in mp.sphere_weights(loop_trainer.modules):
        rms = weight.detach().flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-5, atol=0)


@pytest.mark.skipif(not without_library(), reason="bitsandbytes is installed")
def test_eight_bits_without_the_library():
    with pytest.raises(UsageError, match=r"needs bitsandbytes: pip install 'gesso-diffusion\[bits\]'"):
        trainer(**EIGHT)


@pytest.mark.parametrize(
    "settings, output",
    [
        (["train.sharding=fsdp"], "does not work with train.sharding=fsdp"),
        (["train.dtype=float64"], "train.dtype=float64"),
        (["optim.weight_decay=0.1"], "decoupled weight decay only"),
    ],
)
def test_what_eight_bits_do_not_go_with(settings, output):
    with pytest.raises(UsageError, match=output):
        recipes.resolve("digits", ["optim.state_dtype=8bit", *settings])


def test_errors_are_reported_before_a_folder_is_created(tmp_path):
    from gesso.training.run_folder import start_training

    run = recipes.resolve("digits", ['optim.param_groups=[{"match":"nothing.*"}]'])[0]
    with pytest.raises(UsageError, match="matches no parameter"):
        start_training(run, tmp_path / "run", False, QUIET, print)
    assert not (tmp_path / "run").exists()
