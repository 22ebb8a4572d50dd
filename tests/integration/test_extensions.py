"""Networks, data sets, losses and control variables of the user: training, resume, sampling, evaluation, report."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.run_factory import tiny_run
from PIL import Image
from torch import nn

import gesso
from gesso import config, models
from gesso.data.sources import open_source
from gesso.diffusion import denoiser as diffusion
from gesso.snapshot import list_snapshots

pytestmark = pytest.mark.usefixtures("clean_extensions")
SMALL = {
    "train.total_images": 320, "train.batch_size": 32, "train.snapshot_every": 160, "train.checkpoint_every": 160,
    "train.num_threads": 1, "train.log_every": 32, "monitor.sample_every": None, "monitor.magnitude_every": None,
    "optim.warmup_images": 0,
}  # fmt: skip
RECIPE_FILE = '''
"""A network in fifteen lines."""
import gesso
from torch import nn


class ConvNet(nn.Module):
    def __init__(self, inputs: gesso.InputSpec, width: int = 16):
        super().__init__()
        self.classes = inputs.num_classes
        self.read = nn.Conv2d(inputs.channels, width, 3, padding=1)
        self.write = nn.Conv2d(width, inputs.channels, 3, padding=1)
        self.label, self.noise = nn.Embedding(inputs.num_classes + 1, width), nn.Linear(1, width)

    def forward(self, x, c_noise, progress, cond):
        emb = self.label(cond.label_or_null(self.classes)) + self.noise(progress[:, None])
        return self.write(nn.functional.silu(self.read(x) + emb[:, :, None, None]))


gesso.extend(networks={"conv": ConvNet})


def recipe():
    return gesso.recipe("digits", {"net": {"name": "custom", "network": "conv"}, "train.total_images": 320,
                                   "train.batch_size": 32, "train.snapshot_every": 160, "train.checkpoint_every": 160,
                                   "train.num_threads": 1, "monitor.sample_every": None,
                                   "monitor.magnitude_every": None})
'''


class ScaleNet(nn.Module):
    """The smallest network: one learned factor per channel."""

    def __init__(self, inputs, scale: float = 0.0):
        super().__init__()
        self.inputs, self.factor = inputs, nn.Parameter(torch.full((inputs.channels,), scale))

    def forward(self, x, c_noise, progress, cond):
        return x * self.factor[:, None, None]


class Squares:
    """Grey 8x8 squares of two kinds, bright and dark."""

    class_names = ("dark", "bright")

    def __len__(self):
        return 40

    def __getitem__(self, i):
        pixels = np.full((8, 8), 40 + 150 * (i % 2) + i, np.uint8)
        pixels[:4] += 20
        return {"image": Image.fromarray(pixels), "label": i % 2, "caption": f"square {i}"}


def absolute_loss(denoised, x0, s, process):
    return process.weight(s) * (denoised - x0).abs().mean(dim=(1, 2, 3))


def top_brightness(samples):
    return samples.x[:, :, :4].float().mean(dim=(1, 2, 3))[:, None]


TOP = gesso.ControlVariable(
    ("top",), "low", "0 to 255", "0 to 255", lambda text: (float(text),), (100.0,), top_brightness
)


def test_network_dataset_loss_and_control_of_the_user_together(tmp_path):
    gesso.extend(
        networks={"scale": ScaleNet},
        datasets={"squares": Squares},
        losses={"abs": absolute_loss},
        controls={"top": TOP},
    )
    settings = SMALL | {
        "net": {"name": "custom", "network": "scale", "options": {"scale": 0.1}, "accepts": ["label", "control"]},
        "data.source": "custom:squares", "loss.weighting": "custom:abs", "control.variables": ["top"],
        "eval.metrics": "loss", "eval.toy_metrics": "none", "data.num_validation": 8, "monitor.validate_every": 160,
    }  # fmt: skip
    lines = []

    class Tracker:
        def write(self, nimg, values):
            lines.append((nimg, values["loss"]) if "loss" in values else None)

        def log_image(self, nimg, image):
            raise AssertionError("no sample grid was asked for")

        def close(self):
            lines.append("closed")

    run = gesso.train(gesso.recipe("digits", settings), tmp_path / "run", trackers=[Tracker()])
    assert lines[-1] == "closed" and [line[0] for line in lines[:-1] if line][-1] == 320
    assert run.class_names == ("dark", "bright") and run.config.control.variables == ("top",)
    images = run.sample(labels=["bright"], seeds=range(3), control={"top": "180"}, settings={"sample.steps": 4})
    assert images.shape == (3, 1, 8, 8)
    assert run.evaluate(["loss"])["loss"] > 0
    assert "test_extensions.py" in run.config.environment["code"] and run.report().stat().st_size > 1000
    assert "class ScaleNet" in (tmp_path / "run/code/test_extensions.py").read_text()
    # The loss is that of the function, and the control variable is what `measure` returned.
    trained = run.denoiser()
    x0, s = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
    cond = gesso.Cond(label=torch.zeros(4, dtype=torch.int64), control_low=torch.zeros(4, 1))
    eps = torch.zeros_like(x0)
    expected = trained.process.weight(s) * (trained(x0, s, cond) - x0).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(diffusion.loss(trained, trained.process, x0, s, eps, cond, "custom:abs"), expected)


def test_resumed_run_of_custom_code_is_bit_equal(tmp_path):
    gesso.extend(networks={"scale": ScaleNet}, datasets={"squares": Squares})
    settings = SMALL | {
        "net": {"name": "custom", "network": "scale"},
        "data.source": "custom:squares",
        "eval.toy_metrics": "none",
    }
    run = gesso.recipe("digits", settings)
    uninterrupted = gesso.train(run, tmp_path / "whole")
    gesso.train(run, tmp_path / "parts")
    for path in (tmp_path / "parts/state").glob("nimg*320*"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir() if path.is_dir() else path.unlink()
    for snapshot in list_snapshots(tmp_path / "parts"):
        if snapshot.nimg == 320:
            snapshot.path.unlink()
    notes = []
    parts = gesso.train(run, tmp_path / "parts", resume=True, log=notes.append)
    assert not [note for note in notes if "other code" in note]
    for name, tensor in uninterrupted.denoiser().state_dict().items():
        assert tensor.equal(parts.denoiser().state_dict()[name])


def run_gesso(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "gesso", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(gesso.__file__).parents[1])},
    )  # fmt: skip


def test_recipe_file_on_the_command_line(tmp_path):
    (tmp_path / "my_recipe.py").write_text(RECIPE_FILE)
    done = run_gesso("train", "my_recipe.py", "net.options.width=8", "--out", "r", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gesso --code my_recipe.py sample r --label 0" in done.stdout
    recorded = config.load_config(tmp_path / "r/run.yaml")
    assert recorded.recipe == "my_recipe" and dict(recorded.net.options) == {"width": 8}
    assert recorded.environment["code"].startswith("my_recipe.py ")
    # Another process does not have the network, and never executes the copy in the run folder by itself.
    (tmp_path / "r/code/my_recipe.py").write_text("raise SystemExit('executed')")
    refused = run_gesso("sample", "r", "--seeds", "0-1", cwd=tmp_path)
    assert refused.returncode == 2 and "--code FILE.py" in refused.stderr and "Traceback" not in refused.stderr
    for command in (
        ("sample", "r", "--seeds", "0-1", "--label", "3", "--code", "my_recipe.py"),
        ("--code=my_recipe.py", "evaluate", "r", "eval.metrics=fd_digits", "eval.num_samples=64"),
        ("report", "r"),
        ("config", "r"),
    ):
        done = run_gesso(*command, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
    (tmp_path / "my_recipe.py").write_text(RECIPE_FILE + "\n# changed\n")
    done = run_gesso("train", "my_recipe.py", "net.options.width=8", "--out", "r", "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "note: the run was started with other code (my_recipe.py " in done.stdout


@pytest.mark.parametrize(
    "content, message",
    [
        ("x = 1", "has no function recipe"),
        ("def recipe():\n    return 3", "returned int"),
        ("import gesso\n\n1 / 0", "line 3: ZeroDivisionError"),
        ("def recipe(:\n", "line 1: SyntaxError"),
    ],
)
def test_errors_in_a_recipe_file_name_the_line(tmp_path, content, message):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(gesso.UsageError, match=message):
        gesso.recipe(str(tmp_path / "broken.py"))


def test_what_is_not_loaded_is_named():
    inputs = gesso.InputSpec(1, 8)
    with pytest.raises(gesso.UsageError, match=r"net\.network 'conv' is custom code, which is not loaded"):
        gesso.model("custom", inputs, network="conv")
    with pytest.raises(gesso.UsageError, match="'custom:birds' is custom code"):
        open_source("custom:birds")
    with pytest.raises(gesso.UsageError, match="no such control variable: top"):
        gesso.recipe("digits-berrada", {"control.variables": ["top"]})
    with pytest.raises(gesso.UsageError, match="allowed are native, "):
        gesso.recipe("digits", {"loss.weighting": "huber"})
    denoiser = diffusion.build_denoiser(tiny_run())
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(gesso.UsageError, match=r"loss\.weighting 'huber' is custom code"):
        diffusion.loss(
            denoiser,
            denoiser.process,
            x,
            torch.ones(1),
            x,
            gesso.Cond(label=torch.zeros(1, dtype=torch.int64)),
            "custom:huber",
        )


def test_wrong_objects_are_refused():
    for arguments, message in (
        ({"networks": {"a b": ScaleNet}}, "letters, digits"),
        ({"networks": {"a": 3}}, "pass a class or a function"),
        ({"controls": {"flip": TOP}}, "is built in"),
        ({"controls": {"top": TOP._replace(measure=None)}}, "has no measure"),
        ({"controls": {"top": TOP._replace(columns=("height",))}}, "columns of other variables: height"),
    ):
        with pytest.raises(gesso.UsageError, match=message):
            gesso.extend(**arguments)
    gesso.extend(
        networks={"scale": ScaleNet, "text": lambda inputs: "no module"}, losses={"one": lambda d, x, s, p: d.sum()}
    )
    with pytest.raises(
        gesso.UsageError, match=r"do not fit net\.network=scale: got an unexpected keyword argument 'depth'"
    ):
        gesso.model("custom", gesso.InputSpec(1, 8), network="scale", options={"depth": 2})
    with pytest.raises(gesso.UsageError, match=r"returned str, not a torch\.nn\.Module"):
        gesso.model("custom", gesso.InputSpec(1, 8), network="text")
    with pytest.raises(ValueError, match="takes no text"):
        gesso.model("custom", gesso.InputSpec(1, 8, text_dim=4), network="scale")
    denoiser = diffusion.build_denoiser(tiny_run())
    x, cond = torch.zeros(2, 1, 8, 8), gesso.Cond(label=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(gesso.UsageError, match=r"returned \(\); return \(2,\)"):
        diffusion.loss(denoiser, denoiser.process, x, torch.ones(2), x, cond, "custom:one")


@pytest.mark.parametrize(
    "item, message",
    [
        (np.zeros((8, 8), np.float32), "is float32 of shape"),
        ((np.zeros((8, 8), np.uint8), 1, 2), "has 3 parts"),
        ({"picture": 1}, "has the key 'picture'"),
        ({"label": 1}, "has no key 'image'"),
        (np.zeros((8, 8, 4), np.uint8), r"of shape \(8, 8, 4\)"),
        ((np.zeros((8, 8), np.uint8), -1), "labels are wrong"),
    ],
)
def test_items_of_a_dataset_are_checked(item, message):
    gesso.extend(datasets={"bad": lambda: [item]})
    with pytest.raises(gesso.UsageError, match=message):
        open_source("custom:bad")


def test_images_of_a_dataset_in_every_form():
    grey, colour = (
        np.arange(64, dtype=np.uint8).reshape(8, 8),
        np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8),
    )
    items = [grey, Image.fromarray(grey), torch.from_numpy(grey), (grey[:, :, None], 0), colour,
             Image.fromarray(colour), torch.from_numpy(colour).permute(2, 0, 1)]  # fmt: skip
    gesso.extend(datasets={"forms": lambda: items})
    source = open_source("custom:forms")
    for i in range(4):
        assert np.array_equal(source.read(i), grey[:, :, None])
    for i in range(4, 7):
        assert np.array_equal(source.read(i), colour)
    assert source.class_names == () and source.captions() == [""] * 7


def test_fingerprint_of_a_dataset():
    """It changes with pixels, labels and captions; a data set with attributes is not read when it is opened."""

    class Listed:
        labels, captions, class_names, fingerprint = [0, 1], ["a", "b"], ("x", "y"), "v1"

        def __len__(self):
            return 2

        def __getitem__(self, i):
            raise AssertionError("read")

    gesso.extend(datasets={"listed": Listed})
    first = open_source("custom:listed")
    assert first.class_names == ("x", "y") and list(first.captions()) == ["a", "b"]
    Listed.fingerprint = "v2"
    assert open_source("custom:listed").fingerprint() != first.fingerprint()
    seen = set()
    pixels = np.zeros((8, 8), np.uint8)
    for image, label, caption in ((pixels, 0, ""), (pixels + 1, 0, ""), (pixels, 1, ""), (pixels, 0, "a")):
        gesso.extend(datasets={"one": lambda item={"image": image, "label": label, "caption": caption}: [item]})
        seen.add(open_source("custom:one").fingerprint())
    assert len(seen) == 4


def test_blocks_and_settings_of_a_custom_network():
    class Blocks(nn.Module):
        block_types = (nn.Linear,)

        def __init__(self, inputs, widths):
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(width, width) for width in widths))

    gesso.extend(networks={"blocks": Blocks})
    net = gesso.model("custom", gesso.InputSpec(1, 8), network="blocks", options={"widths": [2, 3]})
    assert models.list_blocks(net) == list(net.layers)
    cfg = config.build_net_config({"name": "custom", "network": "blocks", "options": {"widths": [2, 3]}})
    assert hash(cfg) == hash(cfg.model_copy()) and cfg.model_dump(mode="json")["options"] == {"widths": [2, 3]}
    assert config.build_net_config(cfg.model_dump(mode="json")) == cfg
