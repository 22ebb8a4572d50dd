"""Padding tokens in a network (Berrada et al. Figures A3, A4) in cases with a known answer, and grids of samples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.run_factory import write_run
from PIL import Image

from gesso import snapshot
from gesso.data.encoders.text import build_text_encoder
from gesso.data.factory import open_dataset
from gesso.reproduce import attention_probe

WORDS = {"semantic.kind": "text", "semantic.max_tokens": 8}


def job(folder, padding: str, **settings: object) -> SimpleNamespace:
    run = write_run(folder, "digits", **WORDS, **{"semantic.padding": padding}, **settings)
    return SimpleNamespace(training=SimpleNamespace(folder=folder, run=run))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(attention_probe, "NUM_SAMPLES", 24)


def lengths_of(run) -> torch.Tensor:
    """Of the captions of the first images in the order of training."""
    dataset = open_dataset(run.data)
    index = dataset.sample_order(run.train.seed, run.train.batch_size)(torch.arange(24))
    return build_text_encoder(run.semantic)([dataset.captions[i] for i in index.tolist()]).lengths


def test_what_is_masked_has_no_part(tmp_path):
    masked, zero = (job(tmp_path / padding, padding) for padding in ("masked", "zero"))
    assert attention_probe.measure_padding_gradients(masked)["values"]["padding_fraction"] == 0
    assert attention_probe.measure_padding_attention(masked)["values"]["padding_fraction"] == 0
    assert 0.05 < attention_probe.measure_padding_gradients(zero)["values"]["padding_fraction"] < 0.95
    assert 0.05 < attention_probe.measure_padding_attention(zero)["values"]["padding_fraction"] < 0.95


def test_attention_that_sees_no_difference_is_even(tmp_path):
    """With keys of zero all weights are 1/(S+T): entropy 1, and padding has its share of the places."""
    even = job(tmp_path / "run", "zero")
    for stored in snapshot.list_snapshots(tmp_path / "run"):
        weights, run, _ = snapshot.read(stored.path)
        flat = {name: value * 0 if "qkv" in name else value for name, value in weights.items()}
        snapshot.write(stored.path, flat, stored.nimg, stored.profile, run)
    result = attention_probe.measure_padding_attention(even)["values"]
    share = float((1 - lengths_of(run) / 8).mean())
    assert result["entropy"] == pytest.approx(1, abs=1e-5) and result["padding_fraction"] == pytest.approx(
        share, abs=1e-5
    )
    assert 0.3 < share < 0.9


def test_copies_are_alike(tmp_path):
    alike = {
        padding: attention_probe.measure_padding_attention(
            job(tmp_path / padding, padding, **{"semantic.padding_noise": 1.0})
        )["values"]["copy_similarity"]
        for padding in ("zero", "replicate", "noisy")
    }
    assert alike["zero"] == 0 and alike["replicate"] == pytest.approx(1, abs=1e-6) and 0 < alike["noisy"] < 0.999


def test_share_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 0.0, 5.0]])
    assert attention_probe._padding_fraction(values, torch.tensor([3, 1])) == pytest.approx((0.4 + 0.5) / 2)


def test_sample_grid_uses_each_size_condition(tmp_path):
    """The grid is what generate draws of the same seeds, a row for each size; without sizes about a square."""
    from gesso import config, ema, sampling
    from gesso.reproduce import sample_grids
    from gesso.reproduce.schema import ColumnGroup

    folder = tmp_path / "run"
    write_run(
        folder, "digits", **{"data.source": "digits-mixed-resolution", "control.variables": "size", "control.alpha": 1}
    )
    part, overrides = ColumnGroup({}, {}, method="sample_grid"), ["eval.num_samples=3", "sample.steps=2"]
    trained = SimpleNamespace(folder=folder)
    job = SimpleNamespace(
        training=trained, group=part, overrides=overrides, params={"sizes": "4,8"}, path=tmp_path / "a.json"
    )
    result = sample_grids.save_sample_grid(job)
    assert result["values"] == {"num_images": 6} and result["protocol"]["sizes"] == ["4", "8"]
    run = config.load_with_overrides(folder, overrides, ("sample.", "eval."))
    weights, *_ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(run.sample)])
    created = []
    for size in ("4x4", "8x8"):
        cond, _ = sampling.build_cond(
            run, range(3), snapshot.load_control_rows(folder), [0, 1, 2], None, {"size": size}
        )
        created += sampling.generate(snapshot.denoiser_from_weights(weights[0], run), run, range(3), cond)
    assert not created[0].equal(created[1])
    due = np.asarray(sampling.image_grid(torch.cat(created).expand(-1, 3, -1, -1), 3))
    with Image.open(sample_grids.grid_path(job)) as picture:
        assert (np.asarray(picture) == due).all()
    job.params, job.path = {}, tmp_path / "b.json"
    assert sample_grids.save_sample_grid(job)["values"] == {"num_images": 3}
    with Image.open(sample_grids.grid_path(job)) as picture:
        width, height = picture.size
    assert width == height and sample_grids.grid_path(job) == tmp_path / "b.png"
