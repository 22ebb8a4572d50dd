"""Checksums of snapshots and checkpoints: a flipped bit is noticed, and an older good checkpoint is used."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.run_factory import write_run

from gesso import ema, snapshot
from gesso.errors import RunError
from gesso.safetensors_io import read_metadata, read_tensors, write_tensors
from gesso.training import checkpoint


def flip_bit(path: Path, offset: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_in_a_snapshot_is_noticed(tmp_path, gesso):
    write_run(tmp_path)
    paths = sorted((tmp_path / "snapshots").iterdir())
    assert gesso("sample", tmp_path, "--seeds", "1")[0] == 0
    flip_bit(paths[0])
    code, _, err = gesso("sample", tmp_path, "--seeds", "0")
    assert code == 1 and f"{paths[0]} is damaged: the checksum of" in err
    with pytest.raises(RunError, match="checksum"):
        snapshot.read(paths[0])
    snapshot.read(paths[1])


def test_snapshots_without_checksums_are_read(tmp_path):
    write_run(tmp_path)
    path = sorted((tmp_path / "snapshots").iterdir())[0]
    header = json.loads(read_metadata(path)["gesso"])
    assert set(header.pop("crc32")) == set(read_tensors(path))
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    write_tensors(path, tensors, {"gesso": json.dumps(header)})
    flip_bit(path)
    snapshot.read(path)


def test_reconstructed_files_have_checksums(tmp_path):
    write_run(tmp_path)
    plan = snapshot.plan_reconstruction(snapshot.list_snapshots(tmp_path), [ema.PowerProfile(0.07)])
    (path,) = snapshot.reconstruct_to_files(plan, tmp_path)
    weights, _, description = snapshot.read(path)
    assert set(description.checksums) == set(read_tensors(path)) and "0" * 8 not in description.checksums.values()
    expected = snapshot.reconstruct(plan)[0]
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    flip_bit(path)
    with pytest.raises(RunError, match="checksum"):
        snapshot.read(path)


@pytest.mark.parametrize(
    "header",
    [
        "[1]", "{", "[" * 500, '{"format": "gesso snapshot 1"}',
        '{"format": "gesso snapshot 1", "nimg": "x", "run": null}',
        '{"format": "gesso snapshot 1", "nimg": 1, "run": [], "sigma_rel": 0.1}',
        '{"format": "gesso snapshot 1", "nimg": 1, "run": null, "sigma_rel": [1]}',
        '{"format": "gesso snapshot 1", "nimg": 1, "run": null, "sigma_rel": 1e999}',
        '{"format": "gesso snapshot 1", "nimg": -1, "run": null, "sigma_rel": 0.1}',
        '{"format": "gesso snapshot 1", "nimg": 1, "run": null, "halflife": -3}',
        '{"format": "gesso snapshot 1", "nimg": 1, "run": null, "halflife": 3, "buffers": 7}',
        '{"format": "gesso snapshot 1", "nimg": 1, "run": {"net": 3}, "sigma_rel": 0.1, "crc32": []}',
    ],
)  # fmt: skip
def test_damaged_headers_of_snapshots(tmp_path, gesso, header):
    write_run(tmp_path)
    path = tmp_path / "snapshots" / "nimg000000000001-ema0.0500.safetensors"
    write_tensors(path, {"a": torch.zeros(2)}, {"gesso": header})
    code, _, err = gesso("sample", tmp_path, "--seeds", "0")
    assert code in (1, 2) and str(path) in err and "Traceback" not in err and len(err.strip().splitlines()) <= 3


def save(folder: Path, nimg: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save_checkpoint(folder, nimg, {"a": torch.full((4, 4), float(nimg)), "b": torch.zeros(3)}, keep=3)


def state_file(folder: Path, nimg: int) -> Path:
    return next((folder / f"nimg{nimg:012d}").glob("*.safetensors"))


DAMAGES = {
    "flipped bit": lambda folder: flip_bit(state_file(folder, 3)),
    "flipped bit in the header": lambda folder: flip_bit(state_file(folder, 3), 20),
    "cut": lambda folder: state_file(folder, 3).write_bytes(b"x"),
    "missing": lambda folder: state_file(folder, 3).unlink(),
    "no JSON": lambda folder: (folder / "nimg000000000003" / "state.json").write_text("{"),
    "a list": lambda folder: (folder / "nimg000000000003" / "state.json").write_text("[]"),
    "deep": lambda folder: (folder / "nimg000000000003" / "state.json").write_text("[" * 10_000),
    "no files": lambda folder: edit(folder, files=None),
    "files of another type": lambda folder: edit(folder, files=[1]),
    "a file outside": lambda folder: edit(folder, files={"../x": 1}),
    "nimg of another type": lambda folder: edit(folder, nimg="3"),
    "negative nimg": lambda folder: edit(folder, nimg=-3),
    "checksums of another type": lambda folder: edit(folder, crc32=[]),
}


def edit(folder: Path, **values: object) -> None:
    path = folder / "nimg000000000003" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_older_checkpoint_is_used(tmp_path, damage):
    for nimg in (1, 2, 3):
        save(tmp_path, nimg)
    tensors, warned = {"a": torch.zeros(4, 4), "b": torch.ones(3)}, []
    assert checkpoint.load_latest(tmp_path, tensors, warned.append) == 3 and not warned
    assert (tensors["a"] == 3).all() and (tensors["b"] == 0).all()
    DAMAGES[damage](tmp_path)
    assert checkpoint.load_latest(tmp_path, tensors, warned.append) == 2
    assert (tensors["a"] == 2).all() and len(warned) == 1 and "is damaged" in warned[0]


def test_checkpoints_without_checksums_are_read(tmp_path):
    save(tmp_path, 3)
    path = tmp_path / "nimg000000000003" / "state.json"
    description = json.loads(path.read_text())
    del description["crc32"]
    path.write_text(json.dumps(description))
    assert checkpoint.load_latest(tmp_path, {"a": torch.zeros(4, 4), "b": torch.ones(3)}, print) == 3
