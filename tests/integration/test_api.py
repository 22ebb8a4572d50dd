"""The public Python API: names, signatures, laziness, and that it does what the command line does."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import gesso
from gesso.cli import app
from gesso.conditioning import Cond

SIGNATURES = {
    "load_run": "(folder: str | pathlib.Path) -> gesso.api.Run",
    "recipe": "(name: str, settings: collections.abc.Mapping[str, typing.Any] | None = None) "
    "-> gesso.config.run.RunConfig",
    "train": "(run: gesso.config.run.RunConfig | str, out: str | pathlib.Path, resume: bool = False, "
    "log: collections.abc.Callable[[str], None] | None = None, "
    "trackers: collections.abc.Sequence[gesso.training.trackers.Tracker] = (), "
    "progress: collections.abc.Callable[[int, int], None] | None = None) -> gesso.api.Run",
    "model": "(name: str, inputs: gesso.config.net.InputSpec, **fields: Any) -> torch.nn.modules.module.Module",
}
RUN_METHODS = {
    "sample": [
        "labels",
        "prompts",
        "seeds",
        "guidance",
        "sigma_rel",
        "control",
        "nimg",
        "settings",
        "progress",
        "on_step",
    ],
    "evaluate": ["metrics", "num_images", "settings", "progress", "allow_addresses"],
    "denoiser": ["sigma_rel", "nimg", "settings"],
    "with_settings": ["settings"],
    "report": ["out"],
}  # fmt: skip
SMALL = {
    "net.hidden_size": 32, "net.depth": 1, "net.num_heads": 2, "train.total_images": 640, "train.batch_size": 32,
    "train.snapshot_every": 320, "train.num_threads": 1, "optim.warmup_images": 64, "monitor.sample_every": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> gesso.Run:
    lines, steps = [], []
    trained = gesso.train(
        gesso.recipe("digits", SMALL), tmp_path_factory.mktemp("api") / "run", log=lines.append,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert any("1,797 images" in line for line in lines)
    assert steps == [(nimg, 640) for nimg in range(32, 641, 32)]
    return trained


def test_exported_names_and_signatures():
    assert set(gesso.__all__) == {
        "Cond", "ControlVariable", "GessoError", "InputSpec", "PostHocEMA", "Run", "RunConfig", "UsageError", "extend",
        "load_run", "model", "recipe", "train", "__version__",
    }  # fmt: skip
    for name, signature in SIGNATURES.items():
        assert str(inspect.signature(getattr(gesso, name))) == signature
    for name, parameters in RUN_METHODS.items():
        method = getattr(gesso.Run, name)
        assert list(inspect.signature(method).parameters) == ["self", *parameters] and method.__doc__
    public = {name for name in vars(gesso.Run) if not name.startswith("_")}
    assert public == {*RUN_METHODS, "nimg", "class_names"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gesso.nothing  # noqa: B018


def test_importing_gesso_loads_nothing_else():
    heavy = ("torch", "numpy", "rich", "pydantic")
    code = f"import sys, gesso; assert 'load_run' in dir(gesso); print([m for m in {heavy} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


def test_samples_are_those_of_the_command_line(run, tmp_path):
    from PIL import Image

    images = run.sample(labels=[7, 3], seeds=range(4), guidance=2.0, sigma_rel=0.1, settings={"sample.steps": 4})
    assert images.shape == (4, 1, 8, 8) and images.dtype == torch.uint8
    settings = ["sample.guidance=2", "sample.sigma_rel=0.1", "sample.steps=4"]
    command = ["sample", str(run.folder), "--label", "7,3", "--seeds", "0-3", "--out", str(tmp_path), *settings]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    for seed in range(4):
        with Image.open(tmp_path / f"seed{seed:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), images[seed, 0].numpy())
    # An image depends on its seed and condition alone; labels may be names.
    assert run.sample(labels=["7"], seeds=[2], guidance=2.0, sigma_rel=0.1, settings={"sample.steps": 4}).equal(
        images[2:3]
    )


def test_a_loaded_run_is_the_trained_one(run):
    again = gesso.load_run(run.folder)
    assert again.config == run.config and again.nimg == 640 and len(again.class_names) == 10
    x, s = torch.randn(2, 1, 8, 8), torch.ones(2)
    first, cond = run.denoiser(sigma_rel=0.07), Cond(label=torch.tensor([3, 4]))
    assert first is run.denoiser(sigma_rel=0.07) and first(x, s, cond).shape == x.shape
    assert first(x, s, cond).equal(again.denoiser(sigma_rel=0.07)(x, s, cond))


def test_evaluation_is_that_of_the_command_line(run):
    calls = []
    values = run.evaluate(["fd_digits"], num_images=50, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (50, 50) and set(values) == {"fd_digits"}
    done = CliRunner().invoke(app, ["evaluate", str(run.folder), "eval.metrics=fd_digits", "eval.num_samples=50"])
    assert done.exit_code == 0, done.output
    (stored,) = json.loads((run.folder / "metrics.json").read_text())["evaluations"].values()
    assert stored["metrics"]["fd_digits"]["best"] == values["fd_digits"]


def test_report(run):
    assert "<html" in run.report().read_text()


def test_models_are_built_by_name():
    inputs = gesso.InputSpec(4, 32, num_classes=10)
    net = gesso.model("dit", inputs, hidden_size=32, depth=2, num_heads=2, patch_size=2)
    assert sum(p.numel() for p in net.parameters()) > 10_000
    with pytest.raises(gesso.UsageError, match=r"did you mean net\.hidden_size"):
        gesso.model("dit", inputs, hidden_siz=32, depth=2, num_heads=2, patch_size=2)
    with pytest.raises(gesso.UsageError, match="did you mean unet"):
        gesso.model("resnet", inputs)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda run: run.sample(labels=["eleven"]), "label 'eleven': no such class"),
        (lambda run: run.sample(labels=[11]), "label 11 is out of range"),
        (lambda run: run.sample(labels=[]), "labels is empty"),
        (lambda run: run.sample(settings={"net.depth": 3}), "net.depth"),
        (lambda run: run.sample(settings={"sample.step": 3}), "did you mean sample.steps"),
        (lambda run: run.evaluate(["fdi"]), "fdi"),
        (lambda run: gesso.load_run("/nowhere"), "nowhere"),
        (lambda run: gesso.train("digits", run.folder), "--resume|resume"),
        (lambda run: gesso.recipe("digit"), "did you mean digits"),
    ],
)
def test_errors_say_what_to_do(run, call, message):
    with pytest.raises(gesso.GessoError, match=message):
        call(run)
