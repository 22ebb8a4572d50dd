"""EDM2's published training: summed loss, fp16, uncertainty by CONFIG, and recipes against the paper."""

import math
import statistics

import pytest
import torch
from helpers import reference_edm2
from helpers.network_cases import formula
from rich.console import Console
from torch.nn import functional as F

from gesso import config, recipes, rng
from gesso.data.synthetic import with_synthetic_data
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import process as processes
from gesso.errors import UsageError
from gesso.models import mp
from gesso.models.edm2_ladder import UnnormalizedLayer
from gesso.reproduce import estimates
from gesso.training import estimate, loop, run_folder
from gesso.training.run_folder import open_dataset_for_run

QUIET_CONSOLE = Console(quiet=True)
BATCH_SIZE, NUM_STEPS, LEARNING_RATE = 32, 4, 1e-2
ELEMENTS_PER_SAMPLE = 64  # 1x8x8


def digits_run(*settings: str) -> config.RunConfig:
    common = [
        "train.dtype=float64",
        f"train.batch_size={BATCH_SIZE}",
        "optim.warmup_images=64",
        f"optim.lr={LEARNING_RATE}",
        "dropout.both=0",
        "dropout.control=0",
        "sample.guidance=1",
    ]
    return recipes.resolve("digits-edm2", [*common, *settings])[0]


def digits_trainer(*settings: str) -> loop.Trainer:
    """Return a trainer whose weights and gains are set by `formula`."""
    trainer = loop.Trainer(*open_dataset_for_run(digits_run(*settings), QUIET_CONSOLE))
    with torch.no_grad():
        for name, value in trainer.modules.state_dict().items():
            value.copy_(formula(name, tuple(value.shape)))
        mp.normalize_weights_(mp.sphere_weights(trainer.modules))
    return trainer


# Losses and updates of four steps of the published training_loop.py with its published network, in float64, on the
# weights, images, noise levels and noise of `digits_trainer`, without the 1e-4 in its weight normalization.
PUBLISHED_LOSSES = [4.141715312097411, 2.990741282546185, 3.313115923457671, 2.592094048551301]
PUBLISHED_UPDATE = 12.17346239435156  # norm of the change of all normalized weights
PUBLISHED_TENSORS = {  # of some tensors, by gesso's names
    "net.conv_in.weight": 0.3356445655921772,
    "net.encoder.2.attention.qkv.weight": 1.4424413357767172,
    "net.decoder.3.conv_res1.weight": 2.580661559839388,
    "net.emb_label.weight": 0.3485081555219482,
    "net.out_gain": 0.02411762762126085,
    "net.decoder.1.emb_gain": 0.0008797789215355678,
    "uncertainty.linear.weight": 0.2685106126078212,
}


def updates(trainer: loop.Trainer, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value - before[name] for name, value in trainer.modules.state_dict().items()}


def weights(trainer: loop.Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.modules.state_dict().items()}


def test_four_steps_of_the_published_loop():
    trainer = digits_trainer()
    before = weights(trainer)
    assert [trainer.step() for _ in range(NUM_STEPS)] == pytest.approx(PUBLISHED_LOSSES, rel=1e-8)
    change = updates(trainer, before)
    norm = math.sqrt(sum(float(value.norm()) ** 2 for value in change.values()))
    assert norm == pytest.approx(PUBLISHED_UPDATE, rel=1e-5)
    for name, value in PUBLISHED_TENSORS.items():
        assert float(change[name].norm()) == pytest.approx(value, rel=1e-5), name


def reference_steps(trainer: loop.Trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return mean losses and normalized weights of the same steps, written from the paper.

    Weights are normalized in the forward pass and by force before it (Algorithm 1); the loss of Eq. 21 is summed over
    channels and pixels and divided by the batch; the optimizer is plain Adam.
    """
    run, constants = trainer.run, ("freqs", "phases")
    w = {name: value.clone() for name, value in trainer.modules.state_dict().items()}
    learned = {name: value.requires_grad_() for name, value in w.items() if not name.endswith(constants)}
    adam = torch.optim.Adam(learned.values(), lr=1, betas=(0.9, 0.99), eps=1e-8)

    def on_sphere(value):
        return value if value.ndim < 2 else reference_edm2.unit_rows(value) * math.sqrt(value[0].numel())

    losses = []
    for step in range(NUM_STEPS):
        nimg = step * BATCH_SIZE
        with torch.no_grad():
            for value in learned.values():
                value.copy_(on_sphere(value))
        counter = torch.arange(nimg, nimg + BATCH_SIZE)
        x0, cond = trainer.batcher(counter)
        s = trainer.process.icdf(rng.uniform(run.train.seed, counter, "noise level")[:, 0]).to(x0)
        eps = rng.normal(run.train.seed, counter, "noise", x0.shape[1:], x0.dtype)
        sigma, sd = s.reshape(-1, 1, 1, 1), 0.5
        net = {name.removeprefix("net."): value for name, value in w.items() if name.startswith("net.")}
        x, scale = x0 + sigma * eps, (sigma**2 + sd**2).sqrt()
        output = reference_edm2.forward(net, x / scale, s.log() / 4, F.one_hot(cond.label, 10).double(), 2, 1, 32)
        D = sd**2 / scale**2 * x + sigma * sd / scale * output
        angle = (s.log() / 4)[:, None] * w["uncertainty.fourier.freqs"] + w["uncertainty.fourier.phases"]
        u = math.sqrt(2) * angle.cos() @ reference_edm2.unit_rows(w["uncertainty.linear.weight"]).T
        u = u.reshape(-1, 1, 1, 1)
        loss = (sigma**2 + sd**2) / (sigma * sd) ** 2 / u.exp() * (D - x0) ** 2 + u  # B C H W
        adam.zero_grad()
        (loss.sum() / BATCH_SIZE).backward()
        rate = LEARNING_RATE / math.sqrt(max(nimg / run.optim.ref_images, 1)) * min(nimg / run.optim.warmup_images, 1)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        losses.append(float(loss.detach().mean()))
    return losses, {name: on_sphere(value.detach()) for name, value in w.items()}


def test_four_steps_of_an_independent_loop():
    """Every tensor agrees with a loop that shares only its random numbers with the trainer."""
    trainer = digits_trainer()
    before = weights(trainer)
    losses, wanted = reference_steps(trainer)
    assert [trainer.step() for _ in range(NUM_STEPS)] == pytest.approx(losses, rel=1e-8)
    for name, change in updates(trainer, before).items():
        expected = wanted[name] - before[name]
        assert float((change - expected).norm()) <= 1e-5 * float(expected.norm()), name


def test_mean_reduction_trains_differently():
    """Adam's eps is 64 times as large relative to the gradient.

    These four steps differ by more than a hundred times the tolerance of the test above.
    """
    trainer = digits_trainer("loss.reduction=mean", "optim.eps=1e-5")
    before = weights(trainer)
    [trainer.step() for _ in range(NUM_STEPS)]
    other = digits_trainer("loss.reduction=sum", "optim.eps=1e-5")
    [other.step() for _ in range(NUM_STEPS)]
    a, b = updates(trainer, before), updates(other, before)
    difference = math.sqrt(sum(float((a[n] - b[n]).norm()) ** 2 for n in a) / sum(float(b[n].norm()) ** 2 for n in a))
    assert difference > 1e-3
    # The same as a mean with eps divided by the number of elements.
    third = digits_trainer("loss.reduction=mean", f"optim.eps={1e-5 / ELEMENTS_PER_SAMPLE}")
    [third.step() for _ in range(NUM_STEPS)]
    for name, value in updates(third, before).items():
        assert float((value - b[name]).norm()) <= 1e-9 * float(b[name].norm()), name


def test_logged_loss_is_a_mean_over_elements():
    """Losses of equal weights are equal; the gradient before clipping is C*H*W times as large."""
    one, other = (digits_trainer(f"loss.reduction={name}", "optim.lr=1e-30") for name in ("mean", "sum"))
    assert one.step() == pytest.approx(other.step(), rel=1e-12)
    assert other.grad_norm == pytest.approx(ELEMENTS_PER_SAMPLE * one.grad_norm, rel=1e-9)
    a, b = one.pop_log_line(), other.pop_log_line()
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-12) and a["loss_by_noise"] == b["loss_by_noise"]


def test_loss_is_independent_of_micro_batch_size():
    full_batch, parts = digits_trainer(), digits_trainer("train.micro_batch_size=5")
    before = weights(full_batch)
    assert [full_batch.step() for _ in range(2)] == pytest.approx([parts.step() for _ in range(2)], rel=1e-10)
    assert parts.grad_norm == pytest.approx(full_batch.grad_norm, rel=1e-9)
    assert all(
        (updates(parts, before)[n] - v).norm() <= 1e-6 * v.norm() for n, v in updates(full_batch, before).items()
    )


def test_gradient_clipping_applies_to_the_reduced_loss():
    clipped = [
        digits_trainer(f"loss.reduction={r}", f"optim.max_grad_norm={c}") for r, c in (("mean", 0.01), ("sum", 0.64))
    ]
    for trainer in clipped:
        trainer.step()
    norms = [
        math.sqrt(sum(float(p.grad.norm()) ** 2 for p in trainer.modules.parameters() if p.grad is not None))
        for trainer in clipped
    ]
    assert norms == pytest.approx([0.01, 0.64], rel=1e-4)
    assert "optim.max_grad_norm=64" in clipped[1]._divergence_message(torch.rand(2), torch.zeros(2))
    assert "optim.max_grad_norm=1." in clipped[0]._divergence_message(torch.rand(2), torch.zeros(2))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite_gradients_become_zero_before_clipping(bad, monkeypatch):
    """Clipping divides by the norm of the gradient after its bad values are set to 0.

    A bad value sets its full row to 0, as in the published code, where it passes through the normalization of the row.
    """
    passes = loop.Trainer.forward_backward

    def spoiled(self, *arguments):
        losses = passes(self, *arguments)
        self.denoiser.net.conv_out.weight.grad[0, 0, 0, 0] = bad
        return losses

    monkeypatch.setattr(loop.Trainer, "forward_backward", spoiled)
    trainer = digits_trainer("train.on_nonfinite=zero", "optim.max_grad_norm=1", "optim.warmup_images=0")
    before = weights(trainer)
    trainer.step()
    change = updates(trainer, before)
    assert all(bool(value.isfinite().all()) for value in change.values())
    assert not change["net.conv_out.weight"].any() and change["net.conv_in.weight"].any()
    assert trainer.num_nonfinite_steps == 1 and float(trainer.denoiser.net.conv_in.weight.grad.norm()) > 0


# fp16 (Appendix D.2).


def small_latents(*settings: str) -> loop.Trainer:
    """EDM2 on 64x64x4 latents, random ones, with 16 channels and two levels; gains as after some training."""
    run = recipes.resolve(
        "edm2-img512-xs",
        [
            "net.channels=16",
            "net.channels_per_head=16",
            "net.channel_mult=1,2",
            "net.num_blocks=1",
            "net.attention_levels=[]",
            "data.source=not/there",
            "train.batch_size=2",
            *settings,
        ],
    )[0]
    trainer = loop.Trainer(*with_synthetic_data(run))
    assert trainer.run.elements == 16_384
    with torch.no_grad():
        for name, value in trainer.modules.named_parameters():
            if name.endswith("gain"):
                value.copy_(0.3 + 0.2 * formula(name, (1,)))
    return trainer


def gradients(trainer: loop.Trainer) -> dict[str, torch.Tensor]:
    counts, counter, x0, cond = trainer.next_batch()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer._forward_backward_with_retry(counter, counts, x0, cond)
    return {
        n: p.grad / float(trainer.loss_scale_state[0])
        for n, p in trainer.modules.named_parameters()
        if p.grad is not None
    }


def errors(half: dict[str, torch.Tensor], full: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Relative error of the whole gradient, and the median of those of its tensors."""
    parts = {name: float((half[name] - value).norm()) for name, value in full.items()}
    every = math.sqrt(sum(e**2 for e in parts.values()) / sum(float(v.norm()) ** 2 for v in full.values()))
    return every, statistics.median(error / float(full[name].norm()) for name, error in parts.items())


def test_fp16_gradients_are_those_of_fp32():
    """The error is within .5 % at loss scale 1 on the sum, for 64 samples per rank as in the paper's runs.

    The test has two samples; a factor of 1/32 replaces the other 62. On the mean, unscaled, most of the gradient
    underflows in fp16.
    """
    full = gradients(small_latents("train.precision=full"))
    half = small_latents("train.loss_scale=0.03125")
    assert half.run.train.precision == "float16" and half.run.loss.reduction == "sum"
    every, median = errors(gradients(half), full)
    assert every < 0.005 and median < 0.005
    mean = gradients(small_latents("train.loss_scale=0.03125", "loss.reduction=mean"))
    every, median = errors({n: 16_384 * v for n, v in mean.items()}, full)
    assert every > 0.01 and median > 0.05


def test_a_dynamic_scale_starts_at_equal_gradients():
    """2^16 on the mean is 4 on the sum over 64x64x4."""
    mean = small_latents("train.loss_scale=dynamic", "loss.reduction=mean")
    assert small_latents("train.loss_scale=dynamic").loss_scale_state[0] * 16_384 == mean.loss_scale_state[0] == 2**16
    assert small_latents().loss_scale_state[0] == 1


# u(sigma) by CONFIG (Appendix B.2).


@pytest.mark.parametrize("step", "BCDEFG")
def test_the_uncertainty_follows_its_config(step):
    process = processes.build_process(config.EDMConfig())
    run = recipes.resolve(f"edm2-ladder-{step.lower()}", [])[0]
    torch.manual_seed(0)
    u = diffusion.build_uncertainty(run, process)
    names = {name for name, _ in u.named_parameters()}
    assert names == ({"linear.weight", "linear.bias"} if step == "B" else {"linear.weight"})
    free = step in "BCD"
    assert isinstance(u.linear, UnnormalizedLayer) == free and bool(mp.sphere_weights(u)) != free
    s = torch.tensor([0.1, 0.7, 5.0])
    features = torch.cos((s.log() / 4)[:, None] * u.fourier.freqs + u.fourier.phases)  # Eq. 35
    if step == "G":
        features = features * math.sqrt(2)  # Eq. 75
    weight = u.linear.weight.detach()
    if step in "BC":
        assert float(weight.abs().max()) <= 128**-0.5  # as the other layers of A to C at the start
        expected = features @ weight[0] + (u.linear.bias if step == "B" else 0)
    else:  # of unit length, by Eq. 47 on every use or on the sphere
        expected = features @ (weight[0] / weight[0].norm())
    torch.testing.assert_close(u(s), expected, rtol=1e-4, atol=1e-5)
    # Twice the weight is the same in D, where only its direction counts.
    before = u(s).detach()
    with torch.no_grad():
        u.linear.weight.mul_(2)
    assert torch.allclose(u(s), before, atol=1e-4) == (step == "D")


def test_uncertainty_of_config_a_and_other_networks():
    process = processes.build_process(config.EDMConfig())
    assert diffusion.build_uncertainty(recipes.resolve("edm2-ladder-a", [])[0], process) is None
    other = recipes.resolve("digits", ["loss.weighting=uncertainty"])[0]
    assert len(mp.sphere_weights(diffusion.build_uncertainty(other, process))) == 1


# Recipes (Table 6, Appendices B.1, C, D.2).

TABLE_6 = {  # duration in Mimg, channels, dropout, learning rate, decay, P_mean, P_std
    "img512-xs": (2147.5, 128, 0.0, 0.0120, 70000, -0.4, 1.0),
    "img512-s": (2147.5, 192, 0.0, 0.0100, 70000, -0.4, 1.0),
    "img512-m": (2147.5, 256, 0.1, 0.0090, 70000, -0.4, 1.0),
    "img512-l": (1879.0, 320, 0.1, 0.0080, 70000, -0.4, 1.0),
    "img512-xl": (1342.2, 384, 0.1, 0.0070, 70000, -0.4, 1.0),
    "img512-xxl": (939.5, 448, 0.1, 0.0065, 70000, -0.4, 1.0),
    "img64-s": (1073.7, 192, 0.0, 0.0100, 35000, -0.8, 1.6),
    "img64-m": (2147.5, 256, 0.1, 0.0090, 35000, -0.8, 1.6),
    "img64-l": (1073.7, 320, 0.1, 0.0080, 35000, -0.8, 1.6),
    "img64-xl": (671.1, 384, 0.1, 0.0070, 35000, -0.8, 1.6),
}


@pytest.mark.parametrize("name", TABLE_6)
def test_table_6(name):
    images, channels, dropout, lr, decay, mean, std = TABLE_6[name]
    run = recipes.resolve(f"edm2-{name}", [])[0]
    assert run.train.total_images / 1e6 == pytest.approx(images, abs=0.05) and run.train.batch_size == 2048
    assert (run.net.channels, run.net.dropout, run.optim.lr) == (channels, dropout, lr)
    assert run.optim.ref_images == decay * 2048 and (run.process.P_mean, run.process.P_std) == (mean, std)
    assert run.optim.betas == (0.9, 0.99) and run.optim.eps == 1e-8 and run.optim.max_grad_norm is None
    assert run.sample.steps == 32 and run.sample.sampler == "heun" and run.data.flip is False


EDM2_RECIPES = [name for name in recipes.RECIPES if name.startswith("edm2-")]


@pytest.mark.parametrize("name", EDM2_RECIPES)
def test_edm2_recipes_use_the_published_training(name):
    run = recipes.resolve(name, [])[0]
    assert run.loss.reduction == "sum"
    assert (run.train.precision, run.train.on_nonfinite, run.train.tf32) == ("float16", "zero", False)
    assert run.train.loss_scale == (100 if name == "edm2-ladder-a" else 1)
    assert run.ema.snapshot_dtype == "float16" and run.sample.precision == "float16"
    # On a processor, or where there is no float16; A has a scale to take out too.
    full = recipes.resolve(name, ["train.precision=full", "sample.precision=full", "train.loss_scale=1"])[0]
    assert full.train.precision == full.sample.precision == "full"


def test_other_recipes_use_mean_reduction():
    others = {name: recipes.resolve(name, [])[0] for name in recipes.RECIPES if "edm2" not in name and name != "folder"}
    assert len(others) > 30 and {run.loss.reduction for run in others.values()} == {"mean"}
    assert recipes.resolve("digits-edm2", [])[0].loss.reduction == "sum"


@pytest.mark.parametrize("name", ["edm2-img64-xs", "edm2-ladder-a"])
def test_error_for_a_device_without_fp16(name, tmp_path, gesso):
    for more in ([], ["--estimate"]):
        code, _, err = gesso("train", name, "data.source=shapes-class", "data.resolution=64", "train.device=cpu", *more,
                             "--out", tmp_path / "run")  # fmt: skip
        assert code != 0 and "train.precision=float16 cannot be used on cpu" in err
        assert "set train.precision=full" in " ".join(err.split()) and not (tmp_path / "run" / "run.yaml").exists()


def test_a_recipe_of_edm2_on_a_processor(tmp_path):
    """The tiny scale runs with the two settings that the message names."""
    run = recipes.resolve(
        "edm2-img64-xs",
        [
            "train.precision=full",
            "sample.precision=full",
            "net.channels=16",
            "net.channels_per_head=16",
            "net.num_blocks=1",
            "net.channel_mult=1,2",
            "net.attention_levels=[]",
            "data.source=shapes-class:64",
            "data.resolution=8",
            "train.batch_size=8",
            "train.total_images=16",
            "train.snapshot_every=16",
            "monitor.magnitude_every=null",
        ],
    )[0]
    run_folder.start_training(run, tmp_path, False, QUIET_CONSOLE, lambda text: None)
    assert len(list((tmp_path / "snapshots").iterdir())) == 2


def test_a_16_bit_network_samples_near_the_full_one():
    from gesso import devices, sampling
    from gesso.conditioning import Cond

    trainer = digits_trainer("train.dtype=float32")
    denoiser = trainer.denoiser.eval()
    x, s, cond = torch.randn(4, 1, 8, 8), torch.tensor(1.5), Cond(label=torch.arange(4))
    result = {}
    for precision in ("full", "tf32", "bfloat16", "float16"):
        sample = trainer.run.sample.model_copy(update={"precision": precision})
        run = trainer.run.model_copy(update={"sample": sample})
        with torch.no_grad(), devices.precision_context(x.device, precision):
            result[precision] = sampling.guided_denoiser(denoiser, run, cond, None)(x, s)
        assert result[precision].dtype == torch.float32
    assert result["full"].equal(result["tf32"])  # a processor has no TF32
    for precision, most in (("bfloat16", 0.03), ("float16", 0.005)):
        error = float((result[precision] - result["full"]).norm() / result["full"].norm())
        assert 1e-6 < error < most
    half = run.model_copy(update={"sample": sample})
    with pytest.raises(UsageError, match=r"sample.precision=float16 cannot be used on cpu.*set sample.precision=full"):
        next(sampling.generate(denoiser, half, [0], cond[:1]))


def test_torch_precision_flags_are_restored():
    from gesso import devices

    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    with devices.precision_context(torch.device("cpu"), "tf32"):
        assert all(switch.allow_tf32 for switch in switches)
        with devices.precision_context(torch.device("cpu"), "full"):
            assert not any(switch.allow_tf32 for switch in switches)
        assert all(switch.allow_tf32 for switch in switches)
    assert [switch.allow_tf32 for switch in switches] == before


def test_hours_depend_on_precision():
    """An A100 has 312, 156 or 19.5 TFLOP/s; an image costs three forward passes, 2 FLOPs per MAC, at 40 %."""

    def hours(*settings: str) -> float:
        return estimates.training_cost(recipes.resolve("edm2-img512-s", ["data.source=x", *settings])[0]).gpu_hours

    half = hours()
    config = recipes.resolve("edm2-img512-s", ["data.source=x"])[0]
    macs = estimates.count_model(config.net, config.input_spec, 1).macs
    assert half == pytest.approx(6 * macs * 2048 * 2**20 / (0.4 * 312e12) / 3600, rel=0.01)
    assert hours("train.precision=bfloat16") == half
    assert hours("train.precision=full", "train.tf32=true") == pytest.approx(2 * half)
    assert hours("train.precision=full") == pytest.approx(16 * half)
    run = recipes.resolve("edm2-img512-s", [])[0]
    for precision, key in (("full", "float32"), ("tf32", "tf32"), ("float16", "float16")):
        sample = run.sample.model_copy(update={"precision": precision})
        assert estimates.sampling_precision(run.model_copy(update={"sample": sample})) == key
    assert estimate.estimate_disk(run, 400, 1000).snapshot_bytes == 200  # snapshots of 16 bits
