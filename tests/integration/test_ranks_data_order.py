"""Training resumed within an epoch on another number of ranks sees the same samples and reaches the same weights."""

from pathlib import Path

import pytest
import torch
from helpers.cli import run_cli
from helpers.distributed import launch, logged_losses, max_weight_difference
from safetensors.torch import load_file

BATCH, EPOCH = 5, 16  # which BATCH does not divide, nor 2 BATCH
STEPS = 14
# Saves every training sample: pixels or latents, label, control, which conditions are dropped.
SAVE_SAMPLES = """
import os
from pathlib import Path
from safetensors.torch import save_file
from gesso.data.batching import Batcher
to_device = Batcher.to_device
def to_device_and_save(self, index, samples):
    x0, cond = to_device(self, index, samples)
    for i, k in enumerate(index.tolist()):
        fields = {{name: t[i].contiguous() for name, t in vars(cond).items() if t is not None}}
        path = Path({folder!r}) / f"{{os.getpid()}}"
        save_file({{"x0": x0[i].contiguous()}} | fields, path)
        os.replace(path, path.with_name(str(k)))
    return x0, cond
Batcher.to_device = to_device_and_save
"""


def samples(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    return {int(path.name): load_file(path) for path in folder.iterdir()}


@pytest.mark.parametrize(
    "kind",
    [
        "cached latents",
        "folder",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("cached pixels", "folder through a VAE")),
    ],
)
def test_other_ranks_see_the_same_samples(photos, vae, tmp_path, kind):
    views = ["--views", 2, "--crop-scale", ".5,1", "--flip", "--batch-size", 8]
    source, settings = photos, {"data.crop_scale": "[0.5,1]", "data.flip": "true"}
    if kind.startswith("cached"):
        source, settings = tmp_path / "cache", {}
        through = ["--resolution", 32, "--vae", vae] if "latents" in kind else ["--resolution", 16]
        run_cli("cache", photos, source, *through, *views)
    elif "VAE" in kind:
        settings |= {"latent.vae": vae, "data.resolution": 32}
    settings |= {
        "control.variables": "flip,crop", "dropout.control": 0.3, "train.dtype": "float64", "train.batch_size": BATCH,
        "train.total_images": STEPS * BATCH, "train.snapshot_every": STEPS * BATCH, "train.log_every": BATCH,
        "train.checkpoint_every": 2 * BATCH,
    }  # fmt: skip
    output = {"data.source": source, "data.channels": 3, "net.hidden_size": 32, "net.depth": 1, "net.num_heads": 2,
    "net.patch_size": 1,
            "data.resolution": 16, "train.num_threads": 1, "eval.toy_metrics": "none",
            "optim.warmup_images": 0}  # fmt: skip

    def train(name: str, world: int, **options) -> None:
        samples_folder = tmp_path / f"seen {name}"
        samples_folder.mkdir(exist_ok=True)
        job = {
            "out": str(tmp_path / name),
            "settings": {k: str(v) for k, v in (output | settings).items()},
            "resume": True,
        }
        launch(world, [job | {"prelude": SAVE_SAMPLES.format(folder=str(samples_folder))} | options])

    train("whole", 1)
    train("parts", 1, stop_at=4 * BATCH)  # states are those of 2, 4, ... batches
    train("parts", 2, stop_at=9 * BATCH)
    train("parts", 1)
    uninterrupted, resumed = samples(tmp_path / "seen whole"), samples(tmp_path / "seen parts")
    assert [*range(STEPS * BATCH)] == sorted(k for k in uninterrupted if k < STEPS * BATCH)
    assert STEPS * BATCH > 4 * EPOCH and 4 * BATCH % EPOCH and 8 * BATCH % EPOCH
    for k in range(STEPS * BATCH):
        assert (
            uninterrupted[k].keys()
            == resumed[k].keys()
            >= {"x0", "label", "has_semantic", "has_control", "control_high"}
        )
        assert all(uninterrupted[k][name].equal(resumed[k][name]) for name in uninterrupted[k]), k
    assert len({str(sample["control_high"]) for sample in uninterrupted.values()}) > 20  # crops differ
    assert len({bool(sample["has_control"]) for sample in uninterrupted.values()}) == 2
    assert max_weight_difference(tmp_path / "whole", tmp_path / "parts") < 1e-10
    assert logged_losses(tmp_path / "parts") == pytest.approx(logged_losses(tmp_path / "whole"), rel=1e-10)
