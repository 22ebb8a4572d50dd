"""Moments, Frechet distance and the digit features, against numpy, scipy and closed forms."""

import hashlib
import json
from importlib import resources
from types import SimpleNamespace

import numpy
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sklearn.datasets import load_digits

from gesso.data import crops, shapes_dataset
from gesso.data.sources import decode
from gesso.errors import RunError, UsageError
from gesso.evaluation.feature_stats import Moments
from gesso.evaluation.metrics.frechet import frechet_distance
from gesso.evaluation.metrics.per_image import match_rates
from gesso.evaluation.networks import toy_networks
from gesso.evaluation.networks.base import SampleConditions
from gesso.evaluation.networks.toy_networks import (
    DigitFeatures,
    LabelMatch,
    ShapeFeatures,
    load_digit_features,
    load_shape_features,
)
from gesso.evaluation.toy_evaluation import nearest_images

F64 = torch.float64
PATH = resources.files("gesso.evaluation.networks").joinpath(toy_networks.DIGITS_FILE)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(d: int, seed: int, rank: int | None = None) -> torch.Tensor:
    a = normal(d, rank or d, seed=seed)
    return a @ a.T


def moments_of(*batches: torch.Tensor) -> Moments:
    moments = Moments()
    for batch in batches:
        moments.update(batch)
    return moments


@pytest.fixture(scope="module")
def network() -> DigitFeatures:
    return load_digit_features()


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    values, labels = load_digits(return_X_y=True)
    pixels = numpy.round(values * 255 / 16).astype(numpy.uint8).reshape(-1, 1, 8, 8)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


# Frechet distance


@pytest.mark.parametrize("d", [1, 3, 16, 64])
def test_frechet_matches_sqrtm(d):
    m1, m2, c1, c2 = normal(d, seed=1), normal(d, seed=2), covariance(d, 3), covariance(d, 4)
    root = scipy.linalg.sqrtm((c1 @ c2).numpy())
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * float(numpy.trace(root).real)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-8, abs=1e-6)


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 9), st.floats(0, 9))
def test_frechet_of_one_dimension(m1, m2, s1, s2):
    def tensor(x, *shape):
        return torch.full(shape, x, dtype=F64)

    actual = frechet_distance(tensor(m1, 1), tensor(s1**2, 1, 1), tensor(m2, 1), tensor(s2**2, 1, 1))
    assert actual == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, abs=1e-6)


def test_frechet_of_commuting_covariances():
    q = torch.linalg.qr(normal(12, 12, seed=5)).Q
    a, b = normal(12, seed=6).square(), normal(12, seed=7).square()
    zero = torch.zeros(12, dtype=F64)
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(zero, (q * a) @ q.T, zero, (q * b) @ q.T) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_frechet_of_itself_is_zero_and_of_a_translation_its_square(rank, scale):
    m, c, shift = normal(20, seed=8), covariance(20, 9, rank) * scale, normal(20, seed=10)
    assert frechet_distance(m, c, m, c) == pytest.approx(0, abs=1e-6 * max(scale, 1))
    expected = float(shift.square().sum())
    assert frechet_distance(m, c, m + shift, c) == pytest.approx(expected, abs=1e-6 * max(scale, 1))


def test_frechet_of_rank_deficient_covariances():
    # Gaussians on two planes: tr (C1 C2)^(1/2) is the nuclear norm of A^T B for C1 = A A^T, C2 = B B^T.
    a, b, zero = normal(64, 10, seed=11), normal(64, 7, seed=12), torch.zeros(64, dtype=F64)
    nuclear = float(torch.linalg.svdvals(a.T @ b).sum())
    expected = float(a.square().sum() + b.square().sum()) - 2 * nuclear
    assert frechet_distance(zero, a @ a.T, zero, b @ b.T) == pytest.approx(expected, abs=1e-6)
    # Orthogonal planes share nothing.
    e = torch.eye(6, dtype=F64)
    c1, c2 = e * torch.tensor([1, 2, 3, 0, 0, 0]), e * torch.tensor([0, 0, 0, 4, 5, 6])
    assert frechet_distance(zero[:6], c1, zero[:6], c2) == pytest.approx(21, abs=1e-6)


def test_frechet_of_fewer_samples_than_features():
    x, y = normal(9, 32, seed=13), normal(12, 32, seed=14) + 0.5
    a, b = moments_of(x), moments_of(y)
    centred = [(t - t.mean(0)) / (len(t) - 1) ** 0.5 for t in (x, y)]
    nuclear = float(torch.linalg.svdvals(centred[0] @ centred[1].T).sum())
    expected = float((x.mean(0) - y.mean(0)).square().sum() + sum(t.square().sum() for t in centred)) - 2 * nuclear
    assert frechet_distance(a.mean, a.cov, b.mean, b.cov) == pytest.approx(expected, abs=1e-6)


def test_frechet_is_symmetric_and_names_what_is_wrong():
    m, c1, c2 = normal(8, seed=1), covariance(8, 2), covariance(8, 3, rank=4)
    assert frechet_distance(m, c1, 2 * m, c2) == pytest.approx(frechet_distance(2 * m, c2, m, c1), abs=1e-9)
    with pytest.raises(RunError, match="cov2 has NaN"):
        frechet_distance(m, c1, m, c2 * torch.nan)
    with pytest.raises(UsageError, match=r"\(8,\), \(8, 8\), \(7,\)"):
        frechet_distance(m, c1, m[:7], c2)


# Moments


@settings(deadline=None)
@given(
    n=st.integers(2, 40),
    d=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    seed=st.integers(0, 99),
)
def test_moments_equal_numpy_for_any_chunking_and_merge(n, d, cuts, offset, seed):
    x = normal(n, d, seed=seed) + offset
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    batches = [x[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    streamed, merged = moments_of(*batches), Moments()
    for batch in batches:
        merged.merge(moments_of(batch))
    for moments in (streamed, merged):
        assert moments.n == n
        numpy.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-12, atol=1e-12)
        expected = numpy.cov(x.numpy(), rowvar=False).reshape(d, d)
        numpy.testing.assert_allclose(moments.cov, expected, rtol=1e-7, atol=1e-8)


def test_moments_resolve_a_small_covariance_with_a_large_mean():
    x = normal(1000, 4) * 1e-2
    shifted = moments_of(*(x + 1e6).split(37))
    numpy.testing.assert_allclose(shifted.cov, numpy.cov(x.numpy(), rowvar=False), rtol=1e-5, atol=1e-9)


def test_moments_take_float32_and_leave_the_other_alone():
    x = normal(30, 3).float()
    a, b = moments_of(x[:10]), moments_of(x[10:])
    before = b.cov.clone()
    a.merge(b)
    a.update(x)
    assert a.mean.dtype == a.cov.dtype == F64
    assert a.n == 60 and b.n == 20 and torch.equal(b.cov, before)
    empty = Moments()
    empty.merge(b)
    empty.update(x)
    assert b.n == 20 and torch.equal(b.cov, before)


def test_moments_merge_with_themselves_count_twice():
    x = normal(10, 3)
    moments = moments_of(x)
    moments.merge(moments)
    numpy.testing.assert_allclose(moments.cov, moments_of(x, x).cov, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_moments_refuse_nan(value):
    moments = moments_of(normal(5, 3))
    x = normal(7, 3)
    x[2, 1] = x[4, 0] = value
    with pytest.raises(RunError, match="2 of 7 feature vectors have NaN or infinity"):
        moments.update(x)
    assert moments.n == 5


def test_moments_name_what_is_wrong():
    with pytest.raises(RunError, match="no mean"):
        _ = Moments().mean
    with pytest.raises(RunError, match="at least 2 samples, and 1 were"):
        _ = moments_of(normal(1, 3)).cov
    with pytest.raises(UsageError, match="width 4 added to Moments of width 3"):
        moments_of(normal(2, 3), normal(2, 4))
    with pytest.raises(UsageError, match=r"\(N, D\)"):
        Moments().update(normal(3))


# Agreement and neighbours


def test_rates_count_matches_among_claims():
    results = torch.tensor([[1.0, -1, -1], [0, 1, -1], [1, -1, -1]])
    assert match_rates(results, ("a", "b", "c")) == {"a": 2 / 3, "b": 1, "c": 0}


def test_label_match_of_digits(digits):
    images, labels = digits[0].expand(-1, 3, -1, -1), digits[1].tolist()
    network = LabelMatch(load_digit_features())
    matches = network.extract_features(images, SampleConditions(labels))
    assert matches.shape == (1797, 1) and match_rates(matches, ("class_accuracy",))["class_accuracy"] >= 0.99
    shifted = network.extract_features(images, SampleConditions([(label + 1) % 10 for label in labels]))
    assert match_rates(shifted, ("class_accuracy",))["class_accuracy"] < 0.01
    network.network.head.weight.data.fill_(torch.nan)
    with pytest.raises(RunError, match="logits of 2 of 2 images are NaN"):
        network.extract_features(images[:2], SampleConditions(labels[:2]))


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 9), st.integers(0, 99))
def test_nearest_is_exact_for_any_chunk(n, m, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    # Few grey values and pixels: ties are common, and the first must win.
    a, b = (torch.randint(0, 3, (k, 1, 2, 2), generator=generator, dtype=torch.uint8) * 127 for k in (n, m))
    squares = (a.flatten(1).numpy()[:, None].astype(int) - b.flatten(1).numpy()[None].astype(int)) ** 2
    actual = nearest_images(a, b, chunk)
    assert actual.dtype == torch.int64
    assert actual.tolist() == squares.sum(-1).argmin(1).tolist()


def test_nearest_tells_large_images_one_step_apart():
    reference = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8)
    reference[0, 0, 0, 0], reference[2, 0, 0, 0] = 254, 253
    assert nearest_images(reference, reference).tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="uint8"):
        nearest_images(reference.float(), reference)
    with pytest.raises(UsageError, match="do not compare"):
        nearest_images(reference[:, :1], reference)
    with pytest.raises(UsageError, match="do not compare"):
        nearest_images(reference, reference[:0])


# The shipped network


def test_shipped_file_is_small_recorded_and_described():
    content = PATH.read_bytes()
    assert len(content) < 300_000
    assert hashlib.sha256(content).hexdigest() == toy_networks.DIGITS_SHA256
    with resources.as_file(PATH) as path, safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["gesso"])
    assert about["name"] == DigitFeatures.name == "digits-cnn-v1"
    assert about["held_out_accuracy"] >= 0.985
    assert {"split", "seed", "versions"} <= about.keys()


def test_another_file_is_refused(monkeypatch, tmp_path):
    changed = bytearray(PATH.read_bytes())
    changed[-1] ^= 1
    (tmp_path / toy_networks.DIGITS_FILE).write_bytes(changed)
    monkeypatch.setattr(toy_networks, "resources", SimpleNamespace(files=lambda package: tmp_path))
    with pytest.raises(RunError, match="sha256"):
        load_digit_features()
    (tmp_path / toy_networks.DIGITS_FILE).unlink()
    with pytest.raises(RunError, match="missing"):
        load_digit_features()


def test_shipped_classifier_knows_the_digits(network, digits):
    images, labels = digits
    actual, logits = network.classify(images)
    assert actual.shape == (1797, 64) and actual.dtype == logits.dtype == torch.float32
    assert not actual.requires_grad and not network.training
    assert (logits.argmax(dim=1) == labels).double().mean() >= 0.99


def test_features_do_not_depend_on_the_batch(network, digits):
    images = digits[0][:200]
    full = network(images)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(images[order]), full[order], rtol=1e-5, atol=1e-5)
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(alone, full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(images[:, 0]), full, rtol=0, atol=0)
    network.train()
    torch.testing.assert_close(network(images), full, rtol=0, atol=0)
    network.eval()


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 1, 16, 16), (2, 8, 9), (8, 8), (2, 64)])
def test_other_images_are_refused(network, shape):
    with pytest.raises(UsageError, match="digits-cnn-v1 reads"):
        network(torch.zeros(shape, dtype=torch.uint8))


def test_floats_are_refused(network):
    with pytest.raises(UsageError, match=r"uint8 .* got torch.float32"):
        network(torch.zeros(2, 1, 8, 8))


def test_distance_grows_with_noise(network, digits):
    images = digits[0][torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    real = moments_of(network(images[:898]))
    noise = normal(898, 1, 8, 8)
    distances = []
    # One of the 17 grey values of the scans is 16 apart from the next: noise below that is within the floor.
    for std in (0, 16, 32, 64):
        noisy = (images[898:1796] + std * noise).round().clamp(0, 255).to(torch.uint8)
        actual = moments_of(network(noisy))
        distances.append(frechet_distance(real.mean, real.cov, actual.mean, actual.cov))
    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0]


def test_shape_features_name_the_shapes():
    """The classifier finds exactly the shapes of nine in ten images that it was not trained on.

    So it does at larger sizes, and in three of four images of half the edge.
    """
    network, pairs = (
        load_shape_features(),
        [(kind, colour) for kind in shapes_dataset.KINDS for colour in shapes_dataset.COLOURS],
    )
    scenes = shapes_dataset.sample_scenes(range(21_000, 21_200))
    there = torch.tensor([[pair in shapes_dataset.scene_facts(scene).shapes for pair in pairs] for scene in scenes])
    for side, least in ((16, 0.75), (32, 0.87), (64, 0.87)):
        images = [decode.decode_image(shapes_dataset.render_scene(scene), 3)[0] for scene in scenes]
        created = [
            crops.crop_resize(image, crops.center_view(image.height, image.width), side, side) for image in images
        ]
        actual = network.head(network(torch.from_numpy(numpy.stack(created)))) > 0
        assert (actual == there).all(dim=1).float().mean() > least


def test_shape_features_refuse_other_pictures():
    network = ShapeFeatures()
    assert network(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)).shape == (2, network.num_features)
    small = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert network(small).equal(network(small.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    for wrong in (
        torch.zeros(1, 1, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 48, 48, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32),
    ):
        with pytest.raises(UsageError, match="multiple of 32"):
            network(wrong)
