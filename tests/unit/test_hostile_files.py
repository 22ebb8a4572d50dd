"""Damaged and hostile files of runs, weights and references: a named error of one to three lines, never a traceback."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fuzz
from helpers.run_factory import write_run
from safetensors.torch import save_file

from gesso import config, snapshot
from gesso.errors import GessoError, RunError, UsageError
from gesso.evaluation import results
from gesso.evaluation.feature_stats import load_stats
from gesso.evaluation.image_sets import open_image_set
from gesso.evaluation.runner import evaluate_images, parse_image_args
from gesso.interop import files
from gesso.safetensors_io import read_metadata, read_tensors
from gesso.training.checkpoint import load_latest
from gesso.training.logging import read_log


def read_weights(path: Path) -> object:
    return files.read_state(path, f"init.source={path}")


def assert_short(error: GessoError, path: Path) -> None:
    assert str(path) in str(error) and len(str(error).splitlines()) <= 3, error


# metrics.json and log.jsonl.

ENTRY = {
    "protocol": {"series": "guided", "guidance": 1, "nimg": 16, "networks": {}},
    "metrics": {"fd": {"values": [1], "best": 1, "mean": 1}},
}


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", "{", '{"format": 3}', "[" * 9999, '{"format": "gesso metrics 1"}',
        '{"format": "gesso metrics 1", "evaluations": []}', '{"format": "gesso metrics 1", "evaluations": {"a": 3}}',
        '{"format": "gesso metrics 1", "evaluations": {"a": {"protocol": 3, "metrics": {}}}}',
        '{"format": "gesso metrics 1", "evaluations": {"a": {"protocol": {}, "metrics": {"b": 1}}}}',
        '{"format": "gesso metrics 1", "evaluations": {"a": {"protocol": {}, "metrics": {"b": '
        '{"values": ["x"], "best": 1, "mean": 1}}}}}',
        '{"format": "gesso metrics 1", "evaluations": {"a": {"protocol": {}, "metrics": {}, "extra": 1}}}',
    ],
)  # fmt: skip
def test_a_damaged_metrics_file(tmp_path, gesso, content):
    write_run(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"nimg": 16, "loss": 1}\n')
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(RunError) as caught:
        results.read_evaluations(tmp_path)
    assert_short(caught.value, tmp_path / "metrics.json")
    code, _, err = gesso("report", tmp_path)
    assert code == 1 and "metrics.json" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "line",
    [
        '{"nimg": 16, "loss": "x"}', '{"nimg": 16, "loss": [1]}', '{"nimg": 16, "loss": 1, "validation": 3}',
        '{"nimg": 16, "loss": 1, "loss_by_noise": 3}', '{"nimg": 16, "loss": {"a": 1}}',
        '{"nimg": 16, "loss": 1, "metrics": [1]}',
        '{"nimg": 16, "loss": 1, "magnitudes": {"a": 3}}', '{"nimg": 16, "loss": 1, "unreadable": 7}',
    ],
)  # fmt: skip
def test_odd_values_in_a_log(tmp_path, gesso, line):
    write_run(tmp_path)
    (tmp_path / "log.jsonl").write_text(f"{line}\n")
    code, _, err = gesso("report", tmp_path)
    assert (code == 0 or "log.jsonl" in err) and "Traceback" not in err and len(err.strip().splitlines()) <= 3


def test_an_evaluation_with_missing_keys_is_reported(tmp_path, gesso):
    write_run(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"nimg": 16, "loss": 1}\n')
    for protocol in ({}, {"series": "guided"}, {"series": [1]}):
        entry = ENTRY | {"protocol": protocol}
        text = json.dumps({"format": results.FORMAT, "evaluations": {"a": entry}})
        (tmp_path / "metrics.json").write_text(text)
        code, _, err = gesso("report", tmp_path)
        assert code == 1 and "metrics.json" in err and "Traceback" not in err


# Weight files.


def test_torch_files_with_odd_content(tmp_path):
    path = tmp_path / "x.pt"
    for content in (
        {1: torch.zeros(2)}, {(1, 2): torch.zeros(2)}, [torch.zeros(2)], torch.zeros(2), 3, None, {},
        {"a": torch.zeros(2).to_sparse()}, {"a": torch.zeros(1).expand(10**6, 10**6)}, {"a": torch.zeros(2,
        dtype=torch.complex64)},
        {"model": {1: 2}}, {"a": {"b": torch.zeros(1)}},
    ):  # fmt: skip
        torch.save(content, path)
        with pytest.raises(GessoError) as caught:
            read_weights(path)
        assert_short(caught.value, path)


class Executes:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def test_a_pickle_with_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Executes()}, tmp_path / "x.pt")
    with pytest.raises(RunError, match="contains code, which gesso never runs"):
        read_weights(tmp_path / "x.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["/dev/zero", "pipe.pt", "pipe.pkl", "pipe.safetensors", "folder"])
def test_weights_are_regular_files(tmp_path, gesso, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name != "/dev/zero":
        os.mkfifo(path)
    with pytest.raises(GessoError) as caught:
        read_weights(path)
    assert_short(caught.value, path)
    for arguments in (["import", path], ["train", "digits", f"init.source={path}", "--out", tmp_path / "run"]):
        code, _, err = gesso(*arguments)
        assert code in (1, 2) and "Traceback" not in err and len(err.strip().splitlines()) <= 3


def test_impossible_shapes_of_known_projects(tmp_path):
    from helpers.run_factory import small_run

    from gesso import interop
    from gesso.models import build_network

    run = small_run("digits-dit", **{"net.pos_embed": "proportional"})
    net = build_network(run.net, run.input_spec._replace(num_classes=10))
    _, _, weights = interop.to_diffusers(net, run.net, run.input_spec._replace(num_classes=10))
    for shape in ((), (0,), (1,), (2, 3), (1, 1, 1, 1, 1)):
        for name in list(weights)[:12]:
            with pytest.raises(GessoError):
                interop.load_network(weights | {name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "header",
    [
        b"", b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", (2).to_bytes(8,
        "little") + b"{]",
        (91).to_bytes(8,
        "little") + b'{"a":{"dtype":"F32","shape":[99999999999,99999999999],"data_offsets":[0,4]}}'.ljust(91) + b"1234",
        (70).to_bytes(8, "little") + b'{"a":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}'.ljust(70) + b"1234",
        (70).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'.ljust(70) + b"1234",
    ],
)  # fmt: skip
def test_damaged_safetensors(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header)
    for read in (read_tensors, read_metadata, load_stats, snapshot.read_header):
        with pytest.raises(RunError) as caught:
            read(path)
        assert_short(caught.value, path)


# References.


def evaluate_with(reference: Path, images: Path) -> None:
    args = parse_image_args([], {"images": str(images), "ref": str(reference), "metrics": "fid"})
    evaluate_images(args, lambda done, total: None)


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (np.zeros(3), np.diag([1.0, 1, -1]), "negative eigenvalues"), (np.zeros(3), np.eye(3) * 1j, "real numbers"),
        (np.zeros(3), np.triu(np.ones((3, 3))), "not symmetric"), (np.zeros(3), np.full((3, 3), np.nan), "NaN"),
        (np.zeros(3), np.eye(2), "do not match"), (np.zeros(0), np.zeros((0, 0)), "real numbers"), (np.array(["a"]),
        np.eye(1), "real numbers"),
        (np.array([None]), np.eye(1), "not a readable"),
    ],
)  # fmt: skip
def test_a_reference_that_is_no_covariance(tmp_path, photos, mean, cov, message):
    np.savez(tmp_path / "ref.npz", mu=mean, sigma=cov)
    with pytest.raises(UsageError, match=message) as caught:
        evaluate_with(tmp_path / "ref.npz", photos)
    assert_short(caught.value, tmp_path / "ref.npz")


def test_an_array_bomb_is_not_unpacked(tmp_path, photos):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", b"0" * 1000)
        archive.writestr("mu.npy", b"0" * 1000)
        archive.writestr("sigma.npy", b"0" * 1000)
    data = (tmp_path / "x.npz").read_bytes().replace((1000).to_bytes(4, "little"), (0xFFFFFFF0).to_bytes(4, "little"))
    (tmp_path / "x.npz").write_bytes(data)
    for action in (lambda: open_image_set(str(tmp_path / "x.npz")), lambda: evaluate_with(tmp_path / "x.npz", photos)):
        with pytest.raises(UsageError):
            action()


# Text.


def test_hostile_names_in_a_report(tmp_path, gesso):
    names = ("<script>alert(1)</script>", "\x1b[31mred", "[/b]", "{{ 7 * 7 }}", "a\u202eb")
    folder = tmp_path / "<img src=x>[b]"
    run = write_run(folder)
    data = run.data.model_copy(update={"class_names": (*names, *"56789")})
    run = run.model_copy(update={"recipe": "<script>alert(2)</script>\x1b[31m", "data": data})
    config.save_config(run, folder / "run.yaml")
    (folder / "log.jsonl").write_text('{"nimg": 16, "loss": 1.0, "<script>alert(3)</script>": 2}\n')
    code, out, err = gesso("report", folder)
    assert code == 0 and "\x1b" not in out + err, err
    page = (folder / "report.html").read_text()
    assert "\x1b" not in page and "\u202e" not in page and "<script>alert" not in page and "<img src=x" not in page
    assert "&lt;script&gt;alert(2)" in page and "\\x1b[31m" in page
    code, out, err = gesso("sample", folder, "--seeds", "0-1")
    assert code == 0 and "\x1b" not in out + err, err


# Random damage.


def read_png_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, arr_0=np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3))
    return file.getvalue()


def readers(folder: Path) -> dict[str, tuple[bytes, object]]:
    """Return the content of a valid file, and a function that reads such a file, by name."""
    write_run(folder / "run")
    checkpoint_folder = folder / "state" / "nimg000000000003"
    checkpoint_folder.mkdir(parents=True)
    save_file({"mean": torch.zeros(3), "cov": torch.eye(3), "n": torch.tensor(4)}, folder / "stats")
    torch.save({"a": torch.zeros(3), "b": {"c": torch.ones(2)}}, folder / "weights.pt")
    metrics = json.dumps({"format": results.FORMAT, "evaluations": {"a": ENTRY}}).encode()
    state = json.dumps({"format": "gesso state 1", "nimg": 3, "milestone": False, "files": {"a": 3}}).encode()

    def read_state(path: Path) -> None:
        path.replace(checkpoint_folder / "state.json")
        load_latest(folder / "state", {"a": torch.zeros(1)}, lambda text: None)

    def read_metrics(path: Path) -> None:
        path.replace(folder / "metrics.json")
        results.read_evaluations(folder)

    return {
        "snapshot.safetensors": (next((folder / "run" / "snapshots").iterdir()).read_bytes()[:6000], snapshot.read),
        "header.safetensors": (next((folder / "run" / "snapshots").iterdir()).read_bytes(), snapshot.read_header),
        "stats.safetensors": ((folder / "stats").read_bytes(), load_stats),
        "weights.pt": ((folder / "weights.pt").read_bytes(), read_weights),
        "images.npz": (read_png_npz(), lambda path: list(open_image_set(str(path)).batches(2))),
        "metrics.json": (metrics, read_metrics),
        "log.jsonl": (b'{"nimg": 16, "loss": 1.0}\n{"nimg": 32, "loss": [1, {"a": 2}]}\n', read_log),
        "state.json": (state, read_state),
    }


def test_mutants_of_all_readers(tmp_path):
    assert fuzz.read_mutants(readers(tmp_path), tmp_path, 0, 200) > 50


@pytest.mark.slow
def test_many_mutants_of_all_readers(tmp_path):
    assert fuzz.read_mutants(readers(tmp_path), tmp_path, 1, 5_000) > 1_000
