"""Any pictures beside any others: gesso evaluate --images DIR --ref DIR."""

import json

import numpy as np
import pytest
import torch
from helpers.feature_weights import inception_state, random_images, write_scripted_inception, write_weights
from PIL import Image

from gesso import atomic_io
from gesso.config import EvalConfig
from gesso.errors import RunError, UsageError
from gesso.evaluation import runner
from gesso.evaluation.image_sets import open_image_set
from gesso.evaluation.metrics.frechet import frechet_distance
from gesso.evaluation.metrics.kernel_distance import kernel_distance
from gesso.evaluation.networks import downloads, inception
from gesso.evaluation.networks.toy_networks import load_digit_features


def arguments(images, ref=None, metrics=("fid",), weights_dir=None, **fields) -> runner.ImageSetArgs:
    names = {name for name in fields if name in EvalConfig.model_fields}
    cfg = EvalConfig(
        metrics=metrics,
        reference=ref,
        weights_dir=weights_dir and str(weights_dir),
        **{k: fields.pop(k) for k in names},
    )
    return runner.ImageSetArgs(images, cfg, device="cpu", **fields)


def with_config(args: runner.ImageSetArgs, **fields) -> runner.ImageSetArgs:
    return args._replace(config=args.config.model_copy(update=fields))


def evaluate(args: runner.ImageSetArgs):
    return runner.evaluate_images(args, lambda done, total: None)


@pytest.fixture(autouse=True)
def temporary_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder, pictures: torch.Tensor) -> str:
    folder.mkdir(parents=True)
    for i, one in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(one).save(folder / f"{i:03d}.png")
    return str(folder)


def grey(n: int, seed: int, high: int = 256) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, high, (n, 1, 8, 8), dtype=np.uint8)
    return torch.from_numpy(pixels).expand(-1, 3, -1, -1)


def test_compare_two_folders(tmp_path):
    a, b = grey(90, 0), grey(70, 1, 200)
    requested = arguments(write(tmp_path / "a", a), write(tmp_path / "b", b), ("fd_digits",), batch_size=32)
    result, lines = evaluate(requested)
    network = load_digit_features()
    x, y = network(a).double(), network(b).double()
    expected = frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert result.best()["fd_digits"] == pytest.approx(expected, rel=1e-9) and expected > 1
    assert result.protocol["num_samples"] == 90 and result.protocol["reference_images"] == 70
    assert lines[0].startswith("fd_digits") and "digits-cnn-v1" in lines[1] and len(lines) == 2
    # In any batches, and from what was kept of the reference.
    again, _ = evaluate(requested._replace(batch_size=7))
    assert again.best()["fd_digits"] == pytest.approx(expected, rel=1e-9)
    (stored,) = atomic_io.cache_dir("statistics").glob("*.safetensors")
    stored.write_bytes(b"damaged")
    with pytest.raises(RunError, match="is damaged"):
        evaluate(requested)


def test_few_pictures_are_marked(tmp_path):
    requested = arguments(write(tmp_path / "a", grey(20, 0)), write(tmp_path / "b", grey(20, 1)), ("fd_digits",))
    _, lines = evaluate(requested)
    assert "20 samples do not determine a covariance of 64 features" in lines[-1]


def test_every_score_of_inception(tmp_path, monkeypatch):
    file = write_weights(inception_state(), tmp_path, "inception.pth")
    monkeypatch.setitem(downloads.INCEPTION_FILES, "torch-fidelity", file)
    a, b = random_images(12, 12, 14), random_images(12, 12, 16).flip(3)
    requested = arguments(
        write(tmp_path / "a", a),
        write(tmp_path / "b", b),
        ("fid", "kid", "is", "pr"),
        weights_dir=tmp_path,
        batch_size=8,
    )
    with pytest.raises(
        UsageError, match=r"kid is a mean over subsets of 1,000 images, but one set has 14.*--kid-subset\) to 14"
    ):
        evaluate(requested)
    requested = with_config(requested, kid_subset=9)
    result, lines = evaluate(requested)
    scores = result.best()
    assert result.protocol["kid_subset"] == 9 and any(
        "over subsets of 9; published ones have 1,000" in s for s in lines
    )
    network = inception.load_inception(tmp_path)
    x, y = network(a).double(), network(b).double()
    assert scores["fid"] == pytest.approx(frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov()), rel=1e-5)
    assert scores["kid"] == pytest.approx(kernel_distance(y, x, subset_size=9)[0], rel=1e-4)
    assert 1 <= scores["is"] < 14 and {"precision", "recall", "density", "coverage", "is_std", "kid_std"} <= set(scores)
    assert evaluate(requested)[0].metrics == result.metrics
    with pytest.raises(UsageError, match=r"needs inception\.pth, but it is missing: download"):
        evaluate(with_config(requested, weights_dir=str(tmp_path / "a")))


def test_inception_of_another_publisher(tmp_path, monkeypatch):
    monkeypatch.setitem(downloads.INCEPTION_FILES, "nvidia", write_scripted_inception(tmp_path))
    a, b = write(tmp_path / "a", random_images(12, 12, 14)), write(tmp_path / "b", random_images(12, 12, 16))
    requested = arguments(a, b, ("fid", "is"), weights_dir=tmp_path, inception="nvidia")
    result, lines = evaluate(requested)
    assert result.protocol["networks"] == {"inception": "inception-v3-2015-12-05 (nvidia)"} and "nvidia" in lines[2]
    assert result.best()["is"] >= 1 and result.best()["fid"] > 0
    with pytest.raises(
        UsageError, match="--inception nvida: Input should be 'torch-fidelity', 'pytorch-fid' or 'nvidia'"
    ):
        runner.parse_image_args([], {"images": a, "ref": b, "inception": "nvida"})


@pytest.mark.parametrize("packed", [False, True])
def test_npz_of_samples_and_of_statistics(tmp_path, packed):
    a, b = grey(90, 0), grey(70, 1, 200)
    (np.savez_compressed if packed else np.savez)(tmp_path / "a.npz", a.permute(0, 2, 3, 1).numpy(), np.arange(90))
    folder = arguments(write(tmp_path / "a", a), write(tmp_path / "b", b), ("fd_digits",))
    expected = evaluate(folder)[0].best()
    archive = folder._replace(images=str(tmp_path / "a.npz"))
    assert evaluate(archive)[0].best() == pytest.approx(expected, rel=1e-12)
    y = load_digit_features()(b).double()
    np.savez(tmp_path / "b.npz", mu=y.mean(0).numpy(), sigma=y.T.cov().numpy())
    statistics = with_config(archive, reference=str(tmp_path / "b.npz"))
    assert evaluate(statistics)[0].best() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UsageError, match="kid needs the images"):
        evaluate(with_config(statistics, metrics=("kid",)))


def test_images_are_resized_to_one_size(tmp_path):
    mixed = tmp_path / "mixed"
    write(mixed, grey(3, 0))
    Image.new("RGB", (12, 8)).save(mixed / "wide.png")
    with pytest.raises(UsageError, match=r"wide\.png is 8x12, but the first image is 8x8: set --resolution"):
        list(open_image_set(str(mixed)).batches(2))
    (batch,) = open_image_set(str(mixed), 8).batches(10)
    assert batch.shape == (4, 3, 8, 8) and batch.dtype == torch.uint8
    (mixed / "wide.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(RunError, match=r"wide\.png cannot be read"):
        list(open_image_set(str(mixed), 8).batches(2))


def test_error_messages(tmp_path):
    a, big = write(tmp_path / "a", grey(5, 0)), write(tmp_path / "big", random_images(16, 16, 5))
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "odd.npz", np.zeros((3, 4, 4)))
    for requested, output in (
        (arguments(a, a, ("fad",)), "no metric 'fad'; did you mean fid"),
        (arguments(a), "fid needs reference images: name them with --ref DIR"),
        (arguments(a, big), "a is 8x8, .*big 16x16: set --resolution"),
        (arguments(a, a, num_images=9), "has 5 images: set --num-images to that number or less, not 9"),
        (arguments(str(tmp_path / "empty"), a), "empty"),
        (arguments(str(tmp_path / "no.npz"), a), "there is no file"),
        (arguments(str(tmp_path / "odd.npz"), a), r"arr_0 is float64 \(3, 4, 4\)"),
        (arguments(big, big, ("fd_digits",)), "digits-cnn-v1 reads"),
    ):
        with pytest.raises(UsageError, match=output):
            evaluate(requested)


def test_the_command(tmp_path, gesso):
    a, b = write(tmp_path / "a", grey(70, 0)), write(tmp_path / "b", grey(70, 1))
    out = tmp_path / "metrics.json"
    code, output, _ = gesso("evaluate", "--images", a, "--ref", b, "--metrics", "fd_digits", "--out", out)
    assert code == 0 and "fd_digits" in output
    assert set(json.loads(out.read_text())) == {"metrics", "protocol"}
    for arguments, wrong in (
        ((), "nothing to evaluate"),
        (("runs/x", "--ref", b), "--ref is for --images"),
        (("--images", a, "--metrics", "fad", "--ref", b), "no metric 'fad'"),
    ):
        code, _, output = gesso("evaluate", *arguments)
        assert code == 2 and wrong in output and "Traceback" not in output
