"""Trajectories of DiT's and MDT's weights against those of their published samplers.

published_samplers.json was computed by facebookresearch/DiT (gaussian_diffusion, respace, models) and sail-sg/MDT on
weights and noise of `wave`, with their tables and time embeddings in float64 instead of float32. PixArt's are those of
its published sampler on gesso's network, which tests/unit/test_interop.py compares with diffusers'.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from gesso import config, interop, recipes, sampling
from gesso.conditioning import Cond
from gesso.config import DataConfig, LatentConfig, RunConfig, SampleConfig, VPConfig
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import process, samplers, schedules
from gesso.errors import UsageError
from gesso.training import optimizer as optim

PUBLISHED = json.loads((Path(__file__).parent / "published_samplers.json").read_text())
F64 = torch.float64


def formula_tensor(shape, phase):
    """Return numbers of mean square about 1 that are equal on every machine."""
    j = torch.arange(math.prod(shape), dtype=F64)
    return (math.sqrt(2) * torch.sin(1.7 * j + 0.9 * phase + 0.3 * torch.cos(2.3 * j * (1 + 0.01 * phase)))).reshape(
        shape
    )


def formula_weights(kind):
    """Return weights under the names of the published code."""
    shapes = PUBLISHED["shapes"][kind]
    return {
        name: (0.25 * formula_tensor(shape, i + 1)).float() for i, (name, shape) in enumerate(sorted(shapes.items()))
    }


def import_denoiser(kind, **sample):
    """Return the denoiser in float64 and the run that samples from it."""
    state = formula_weights(kind)
    cfg, inputs, _, _, proc = interop.detect_format(state, 2)
    channels = inputs.channels
    denoiser, _ = interop.load_denoiser(state, 2)
    run = RunConfig(
        net=cfg, process=proc, sample=SampleConfig(sampler="euler", state_dtype="float64", **sample),
        latent=LatentConfig(vae=None if "pixels" in kind else "its VAE"),
        data=DataConfig(resolution=32, num_classes=5, mean=(0.0,) * channels, std=(1.0,) * channels),
    )  # fmt: skip
    return denoiser.double(), run


def sample_settings(case):
    """Return the sampling settings of gesso that correspond to a published run."""
    steps = len(case["index"])
    sample = {
        "steps": steps,
        "schedule": "ddim" if case["respacing"].startswith("ddim") else "respaced",
        "eta": case["eta"],
    }
    if case["how"] == "p":
        sample |= {"eta": 1.0, "variance": "learned" if case["learned"] else "small" if case["small"] else "large"}
    if case["guidance"]:
        sample |= {"guidance": case["guidance"], "guided_channels": 3}
    if case["power"]:
        sample |= {"guidance_schedule": "power_cosine", "guidance_power": case["power"]}
    return sample | {"clip": case["clip"]}


def case_name(case):
    parts = (
        case["network"],
        case["how"],
        case["respacing"],
        case["guidance"],
        case["power"],
        case["learned"],
        case["small"],
    )
    return " ".join(str(part) for part in parts)


@pytest.mark.parametrize("case", PUBLISHED["runs"], ids=case_name)
def test_trajectory_of_the_published_sampler(case):
    denoiser, run = import_denoiser(
        case["network"] + ("" if case["learned"] else " without variance"), **sample_settings(case)
    )
    levels = schedules.levels_from_config(denoiser.process, run.sample)
    assert denoiser.process.timestep(levels[:-1]).round().long().tolist() == case["index"]
    states, shape = [], (2, run.x0_channels, 4, 4)
    cond = Cond(text=formula_tensor((2, 6, 12), 7)) if case["network"] == "pixart" else Cond(label=torch.tensor([1, 3]))
    denoise = sampling.guided_denoiser(denoiser, run, cond, None)
    x = samplers.sample(
        run.sample, denoiser.process, denoise, formula_tensor(shape, 0), lambda i: formula_tensor(shape, i + 1),
        lambda i, x, D: states.append(x[0, :, 0, 0] / (1 + levels[i + 1] ** 2).sqrt()),
    )  # fmt: skip
    expected = torch.tensor(case["final"], dtype=F64)
    scale = float(expected.abs().max())
    # These weights do not denoise: x grows by 1/sqrt(abar) = 157, and the noise of a step is a thousandth of it. Ten
    # digits are stored; MDT's code computes its guidance in float32.
    tolerance = 1e-7 if case["power"] else 2e-9
    assert (x.flatten()[: len(expected)] - expected).abs().max() < tolerance * scale
    trace = torch.stack(states[:: case["every"]])
    torch.testing.assert_close(trace / scale, torch.tensor(case["trace"], dtype=F64) / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "case, change",
    [
        (0, {"guided_channels": None}),
        (0, {"schedule": "linspace"}),
        (2, {"variance": "small"}),
        (2, {"schedule": "trailing"}),
        (4, {"variance": "small"}),
        (8, {"guidance_power": 2.0}),
        (8, {"guidance_schedule": "constant"}),
        (6, {"clip": False}),
        (6, {"variance": "small"}),
    ],
)
def test_every_option_of_the_published_samplers_matters(case, change):
    case = PUBLISHED["runs"][case]
    denoiser, run = import_denoiser(
        case["network"] + ("" if case["learned"] else " without variance"), **sample_settings(case) | change
    )
    denoise = sampling.guided_denoiser(denoiser, run, Cond(label=torch.tensor([1, 3])), None)
    shape = (2, run.x0_channels, 4, 4)
    x = samplers.sample(
        run.sample, denoiser.process, denoise, formula_tensor(shape, 0), lambda i: formula_tensor(shape, i + 1)
    )
    expected = torch.tensor(case["final"], dtype=F64)
    assert (x.flatten()[: len(expected)] - expected).abs().max() > 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["dit", "mdt"])
def test_learned_variance_leaves_the_ordinary_output_as_it_is(kind):
    """The image is the first half of the published output, the variance the second."""
    denoiser, _ = import_denoiser(kind)
    net, x, t = denoiser.net, formula_tensor((2, 4, 4, 4), 3), torch.tensor([980.0, 20.0], dtype=F64)
    cond = Cond(label=torch.tensor([1, 3]))
    both = net(x, t, t / 1000, cond, return_variance=True)
    assert both.shape == (2, 8, 4, 4) and both[:, :4].equal(net(x, t, t / 1000, cond))
    assert both[:, 4:].std() > 0.1
    head = net.variance if kind == "mdt" else net.trunk.variance
    assert not head.weight.requires_grad


def test_linear_betas_are_the_published_ones():
    """betas, abar and their ends, as get_named_beta_schedule("linear", 1000) and its cumulative product give them."""
    proc = process.build_process(VPConfig(betas="linear"))
    betas = 1e-4 + (0.02 - 1e-4) * torch.arange(1000, dtype=F64) / 999
    torch.testing.assert_close(process.betas(proc), betas, rtol=1e-9, atol=1e-13)
    abar = 1 / (1 + proc.level_table**2)
    # Values of the published code: alphas_cumprod[[0, 250, 500, 999]].
    published = torch.tensor([0.9999, 0.5214230306185275, 0.07779665836502389, 4.035829765375676e-05], dtype=F64)
    torch.testing.assert_close(abar[[0, 250, 500, 999]], published, rtol=1e-12, atol=0)


def test_ddim_spacing_of_dit():
    proc = process.build_process(VPConfig(betas="linear"))
    index = proc.timestep(schedules.levels(proc, 50, "ddim")[:-1]).round().long()
    assert index.tolist() == list(range(980, -1, -20))
    # space_timesteps(1000, "21") has 499 in the middle, np.linspace and its rounding 500.
    for grid, middle in (("respaced", 499), ("linspace", 500)):
        assert float(proc.timestep(schedules.levels(proc, 21, grid)[10])) == pytest.approx(middle)
    with pytest.raises(
        UsageError,
        match=r"sample.steps=60: sample.schedule=ddim uses every n-th of 1000 timesteps.*sample.steps=59 or 63",
    ):
        schedules.levels(proc, 60, "ddim")


@pytest.mark.parametrize(
    "change, settings_text",
    [
        (
            {"sample": {"sampler": "euler", "eta": 1, "variance": "learned"}, "process": {"name": "vp"}},
            "net.learned_variance=true",
        ),
        (
            {"sample": {"sampler": "euler", "eta": 0.5, "variance": "large"}, "process": {"name": "vp"}},
            "sample.sampler=euler sample.eta=1",
        ),
        ({"sample": {"sampler": "euler", "eta": 1, "variance": "large"}}, "is for process.name=vp, not edm"),
        (
            {"sample": {"clip": True}, "latent": {"vae": "some"}, "data": {"resolution": 64}},
            "clips to the range of pixels, not of latents",
        ),
        ({"sample": {"multistep": "log_s"}}, "is for dpm..2m, not for sample.sampler=heun"),
        ({"sample": {"guided_channels": 4}}, "above the 3 channels of x0"),
    ],
)
def test_settings_of_the_published_samplers_that_contradict_are_refused(change, settings_text):
    with pytest.raises(UsageError, match=settings_text):
        config.validate({"net": {"name": "dit"}} | change)


def test_a_guide_without_variance_guides_only_the_image():
    """The guide learns no variance; the variance is that of the guided network."""
    denoiser, run = import_denoiser("dit", steps=3, eta=1.0, variance="learned", guidance=2.0)
    guide, _ = import_denoiser("dit without variance")
    x, s = formula_tensor((2, 4, 4, 4), 5), denoiser.process.level_table[500]
    cond = Cond(label=torch.tensor([1, 3]))
    D, v = sampling.guided_denoiser(denoiser, run, cond, guide)(x, s).chunk(2, dim=1)
    with torch.no_grad():
        actual = denoiser(x, s, cond, return_variance=True)
        far = guide(x, s, cond.without(semantic=True, control=True))
    torch.testing.assert_close(D, 2 * actual[:, :4] - far, rtol=0, atol=1e-12)
    assert v.equal(actual[:, 4:])


def test_clip_is_to_black_and_white():
    """By channel, with the data's mean and standard deviation; values beyond are clipped."""
    _, run = import_denoiser("dit pixels", steps=2, clip=True)
    run = run.model_copy(
        update={"data": run.data.model_copy(update={"mean": (0.1, 0.0, -0.2), "std": (0.5, 1.0, 0.4)})}
    )
    denoiser, _ = import_denoiser("dit pixels")
    x, s = 40 * formula_tensor((2, 3, 4, 4), 1), denoiser.process.level_table[400]
    D = sampling.guided_denoiser(denoiser, run, Cond(label=torch.tensor([1, 3])), None)(x, s)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.0, 1.0), (-0.2, 0.4)]):
        low, high = D[:, channel].min(), D[:, channel].max()
        torch.testing.assert_close(
            torch.stack([low, high]), torch.tensor([(-1 - mean) / std, (1 - mean) / std], dtype=F64)
        )


def test_settings_of_the_documentation_are_settings():
    """Every row of the first table of docs/sampling.md resolves and has valid noise levels."""
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `((?:process|sample)\.[^`]+)`", page, re.M)
    assert len(rows) == 9
    for row in rows:
        run, _ = recipes.resolve("digits", ["data.channels=3", "eval.toy_metrics=none", *row.split()])
        sampling.check_sampling(run)
    for grid in ("karras", "linspace", "respaced", "ddim", "linear", "sd3"):
        assert f"| `{grid}` |" in page


def test_training_leaves_the_learned_variance_as_it_is():
    """No loss reaches the frozen layer, and the optimizer does not move it."""
    run, _ = recipes.resolve(
        "digits-dit", ["net.learned_variance=true", "data.num_classes=10", "data.mean=[0.0]", "data.std=[0.5]"]
    )
    torch.manual_seed(0)
    images = diffusion.build_denoiser(run)
    head = images.net.trunk.variance
    torch.nn.init.normal_(head.weight)
    before = {name: p.detach().clone() for name, p in images.named_parameters()}
    optimizer = optim.build_optimizer(run.optim, torch.nn.ModuleDict({"net": images.net}))
    for step in range(2):  # the second step, as the last layer starts at zero
        s = images.process.icdf(torch.full((3,), 0.4 + 0.1 * step))
        x0, eps = (formula_tensor((3, 1, 8, 8), i).float() for i in (step, 5))
        diffusion.loss(images, images.process, x0, s, eps, Cond(label=torch.tensor([1, 2, 3]))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in images.named_parameters() if not p.equal(before[name])}
    assert "net.trunk.final.weight" in moved and not any("variance" in name for name in moved)
