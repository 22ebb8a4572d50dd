"""The Fashion-MNIST recipes: training from IDX files, held-out loss, and metrics of the clothes classifier."""

import json

import numpy as np
import pytest
import torch
from helpers.idx import FASHION_MNIST, write_idx
from typer.testing import CliRunner

from gesso.cli import app
from gesso.data.sources.registry import open_source
from gesso.errors import UsageError
from gesso.evaluation.networks.toy_networks import load_fashion_features

SETTINGS = [
    "net.hidden_size=16", "net.depth=1", "net.num_heads=2", "train.total_images=64", "train.snapshot_every=32",
    "train.checkpoint_every=64", "optim.warmup_images=0", "monitor.validate_every=null", "sample.steps=2",
]  # fmt: skip


def test_train_and_evaluate(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    images = {split: rng.integers(0, 256, (40, 28, 28), np.uint8) for split in ("train", "t10k")}
    (tmp_path / "data").mkdir()
    for split, pixels in images.items():
        write_idx(tmp_path / "data/fashion-mnist", split, True, pixels, np.arange(40, dtype=np.uint8) % 10)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "fashion", *SETTINGS])
    assert done.exit_code == 0, done.output
    metrics = ["eval.metrics=loss,fd_fashion,class_accuracy", "eval.num_samples=20", "eval.validation_pairs=100"]
    done = CliRunner().invoke(app, ["evaluate", "runs/fashion", *metrics])
    assert done.exit_code == 0, done.output
    (result,) = json.loads((tmp_path / "runs/fashion/metrics.json").read_text())["evaluations"].values()
    assert result["protocol"]["networks"] == {"fashion": "fashion-cnn-v1", "classifier": "fashion-cnn-v1"}
    assert result["protocol"]["validation"].endswith("t10k-images-idx3-ubyte.gz")
    values = {name: entry["best"] for name, entry in result["metrics"].items()}
    assert values["fd_fashion"] > 0 and 0 <= values["class_accuracy"] <= 1 and 0 < values["loss"] < 100


def test_features_need_28x28_grey_images():
    network = load_fashion_features()
    assert network(torch.zeros(3, 1, 28, 28, dtype=torch.uint8)).shape == (3, 64)
    for wrong in (torch.zeros(3, 1, 28, 28), torch.zeros(3, 1, 32, 32, dtype=torch.uint8)):
        with pytest.raises(UsageError, match="fashion-cnn-v1 reads"):
            network(wrong)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Fashion-MNIST beside the repository")
def test_accuracy_of_the_classifier_on_images_that_it_was_not_trained_on():
    source = open_source(FASHION_MNIST)
    pixels = torch.from_numpy(source.pixels[:2000].copy())
    predicted = load_fashion_features().classify(pixels)[1].argmax(1)
    assert float((predicted == torch.from_numpy(source.labels[:2000])).double().mean()) > 0.88
