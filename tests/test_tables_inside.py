"""What a network does with padding tokens (Berrada et al. Figures A3, A4), in cases whose answer is known; and pictures of
samples."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from written import written

from gesso import snapshot
from gesso.data.dataset import open_dataset
from gesso.data.text import build
from gesso.tables import inside

WORDS = {"semantic.kind": "text", "semantic.tokens": 8}


def job(folder, padding: str, **settings: object) -> SimpleNamespace:
    run = written(folder, "digits", **WORDS, **{"semantic.padding": padding}, **settings)
    return SimpleNamespace(trained=SimpleNamespace(folder=folder, run=run))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(inside, "COUNT", 24)


def lengths_of(run) -> torch.Tensor:
    """Of the captions of the first images in the order of training."""
    dataset = open_dataset(run.data)
    index = dataset.order(run.train.seed, run.train.batch_size)(torch.arange(24))
    return build(run.semantic)([dataset.captions[i] for i in index.tolist()]).lengths


def test_what_is_masked_has_no_part(tmp_path):
    masked, zero = (job(tmp_path / padding, padding) for padding in ("masked", "zero"))
    assert inside.gradients(masked)["found"]["padding_share"] == 0
    assert inside.attention(masked)["found"]["padding_share"] == 0
    assert 0.05 < inside.gradients(zero)["found"]["padding_share"] < 0.95
    assert 0.05 < inside.attention(zero)["found"]["padding_share"] < 0.95


def test_attention_that_sees_no_difference_is_even(tmp_path):
    """With keys of zero all weights are 1/(S+T): entropy 1, and padding has its share of the places."""
    even = job(tmp_path / "run", "zero")
    for one in snapshot.stored(tmp_path / "run"):
        weights, run, _ = snapshot.read(one.path)
        flat = {name: value * 0 if "qkv" in name else value for name, value in weights.items()}
        snapshot.write(one.path, flat, one.nimg, one.profile, run)
    found = inside.attention(even)["found"]
    share = float((1 - lengths_of(run) / 8).mean())
    assert found["entropy"] == pytest.approx(1, abs=1e-5) and found["padding_share"] == pytest.approx(share, abs=1e-5)
    assert 0.3 < share < 0.9


def test_copies_are_alike(tmp_path):
    alike = {
        padding: inside.attention(job(tmp_path / padding, padding, **{"semantic.noise": 1.0}))["found"]["alike"]
        for padding in ("zero", "replicate", "noisy")
    }
    assert alike["zero"] == 0 and alike["replicate"] == pytest.approx(1, abs=1e-6) and 0 < alike["noisy"] < 0.999


def test_share_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 0.0, 5.0]])
    assert inside._share(values, torch.tensor([3, 1])) == pytest.approx((0.4 + 0.5) / 2)


def test_samples_are_shown_told_each_size(tmp_path):
    """The grid is what generate draws of the same seeds, a row for each size; without sizes about a square."""
    from gesso import conditions, config, ema, generate
    from gesso.tables import grids
    from gesso.tables.table import Part

    folder = tmp_path / "run"
    written(folder, "digits", **{"data.source": "digits-coarse", "control.variables": "size", "control.alpha": 1})
    part, asked = Part({}, {}, by="pictures"), ["eval.images=3", "sample.steps=2"]
    trained = SimpleNamespace(folder=folder)
    job = SimpleNamespace(trained=trained, part=part, asked=asked, told={"sizes": "4,8"}, path=tmp_path / "a.json")
    found = grids.pictures(job)
    assert found["found"] == {"pictures": 6} and found["protocol"]["sizes"] == ["4", "8"]
    run = config.recorded(folder, asked, ("sample.", "eval."))
    weights, *_ = snapshot.synthesize(folder, [ema.chosen(run.sample)])
    made = []
    for size in ("4x4", "8x8"):
        cond, _ = conditions.build(run, range(3), snapshot.control_rows(folder), [0, 1, 2], None, {"size": size})
        made += generate.generate(snapshot.denoiser(weights[0], run), run, range(3), cond)
    assert not made[0].equal(made[1])
    due = np.asarray(generate.grid(torch.cat(made).expand(-1, 3, -1, -1), 3))
    with Image.open(grids.grid_of(job)) as picture:
        assert (np.asarray(picture) == due).all()
    job.told, job.path = {}, tmp_path / "b.json"
    assert grids.pictures(job)["found"] == {"pictures": 3}
    with Image.open(grids.grid_of(job)) as picture:
        width, height = picture.size
    assert width == height and grids.grid_of(job) == tmp_path / "b.png"
