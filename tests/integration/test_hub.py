"""Runs and data sets on the Hugging Face Hub: `gesso push`, hub:OWNER/NAME, model cards without local paths."""

import json
import re
import shutil

import pytest
import torch
import yaml
from helpers.hub_server import running_hub
from helpers.images import write_gradient_images
from helpers.run_factory import QUIET_CONSOLE, small_run, write_run

import gesso
from gesso import config, hub, share, snapshot
from gesso.data.sources.registry import open_source
from gesso.errors import UsageError
from gesso.training.run_folder import start_training


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with running_hub(tmp_path, monkeypatch) as handler:
        yield handler


@pytest.fixture
def trained(tmp_path):
    """Train on a folder of images with class folders, so that the run records a local path."""
    write_gradient_images(tmp_path / "secret-place" / "photos")
    run = small_run(
        "digits",
        **{"data.source": str(tmp_path / "secret-place" / "photos"), "train.total_images": 64, "sample.steps": 2,
           "eval.toy_metrics": "none"},
    )  # fmt: skip
    start_training(run, tmp_path / "trained", False, QUIET_CONSOLE, print)
    return tmp_path / "trained"


def push(folder, *options, **fields):
    return share.push(folder, share.PushArgs("me/model", **fields), lambda text: None)


@pytest.mark.parametrize("all_snapshots", [False, True])
def test_push_and_load_give_the_same_images(server, trained, all_snapshots):
    assert push(trained, all_snapshots=all_snapshots).endswith("/me/model")
    pushed = server.root / "me" / "model"
    count = len(list((trained / "snapshots").iterdir()))
    assert count > 2 and len(list((pushed / "snapshots").iterdir())) == (count if all_snapshots else 2)
    shutil.rmtree(trained.parent / "secret-place")
    loaded = gesso.load_run("hub:me/model")
    assert loaded.folder.as_posix() == "runs/me--model"
    original = gesso.load_run(trained)
    assert loaded.sample(seeds=range(3)).equal(original.sample(seeds=range(3)))
    fetched = len(server.fetched)
    assert gesso.load_run("hub:me/model").folder == loaded.folder and len(server.fetched) == fetched
    assert gesso.load_run("hub:me/model@v1").folder.name == "me--model@v1"


def test_no_file_has_a_local_path(server, trained):
    push(trained)
    place = str(trained.parent)
    for path in (server.root / "me" / "model").rglob("*"):
        assert path.is_dir() or place.encode() not in path.read_bytes(), path
    run = config.load_config(server.root / "me" / "model" / "run.yaml")
    assert run.data.source == "photos" and run.environment == config.load_config(trained / "run.yaml").environment
    for entry in snapshot.list_snapshots(server.root / "me" / "model"):
        tensors, recorded, _ = snapshot.read(entry.path)
        original = snapshot.read(trained / "snapshots" / entry.path.name)[0]
        assert recorded.data.source == "photos" and all(tensors[name].equal(original[name]) for name in original)


def test_card(server, trained):
    metrics = {"fid": {"values": [3.25, 3.5], "best": 3.25, "mean": 3.375}}
    protocol = {"num_samples": 500, "steps": 2, "guidance": 1.5, "reference": str(trained.parent / "secret-place")}
    content = {"format": "gesso metrics 1", "evaluations": {"a": {"protocol": protocol, "metrics": metrics}}}
    (trained / "metrics.json").write_text(json.dumps(content))
    push(trained, license="cc-by-nc-4.0")
    card = (server.root / "me" / "model" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "library_name": "gesso", "license": "cc-by-nc-4.0", "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion"],
    }  # fmt: skip
    assert "- fid: 3.25 (num_samples 500, steps 2, guidance 1.5, reference secret-place)" in card
    net = gesso.load_run(trained).denoiser().net
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in card
    assert "64 images seen, from random weights" in card and "`photos`, " in card and "![samples](samples.png)" in card
    assert not re.search(r"\n\n\n|\{\{|\{%", card)
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code, scope)  # as a reader of the card does
    assert scope["images"].shape[0] == 4 and scope["images"].dtype == torch.uint8


def test_code_of_the_user_is_uploaded_but_not_run(server, trained):
    (trained / "code").mkdir()
    (trained / "code" / "mine.py").write_text("raise SystemExit('executed')")
    push(trained, samples=False)
    loaded = gesso.load_run("hub:me/model")
    assert (loaded.folder / "code" / "mine.py").is_file()
    assert not (server.root / "me" / "model" / "samples.png").exists()


def test_private_repositories_and_failures(server, trained, monkeypatch):
    push(trained, private=True, samples=False)
    assert server.created[0]["visibility"] == "private"
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(
        UsageError, match=r"me/model: the upload failed: .*401.*log in with hf auth login, or set HF_TOKEN"
    ):
        push(trained, samples=False)
    with pytest.raises(UsageError, match="write hub:OWNER/NAME"):
        share.push(trained, share.PushArgs("model"))
    for uri, message in {
        "hub:nobody/nothing": "hub:nobody/nothing: the download failed",
        "hub:me/model@v9": "hub:me/model@v9: the download failed",
        "hub:me": "write hub:OWNER/NAME",
        "hub:../x": "write hub:OWNER/NAME",
        "hub:a/..": "write hub:OWNER/NAME",
    }.items():
        with pytest.raises(UsageError, match=re.escape(message)) as error:
            gesso.load_run(uri)
        assert "\n" not in str(error.value)


def test_repository_without_a_run(server, tmp_path):
    (server.root / "me" / "other").mkdir(parents=True)
    (server.root / "me" / "other" / "README.md").write_text("not a run")
    with pytest.raises(UsageError, match=r"hub:me/other has no run of gesso: it has no run\.yaml"):
        hub.fetch_run("hub:me/other")
    assert not (tmp_path / "runs" / "me--other").exists() and not list((tmp_path / "runs").iterdir())


def test_initial_weights_from_the_hub(server, trained, tmp_path):
    push(trained, samples=False)
    fields = {"data.source": str(tmp_path / "secret-place" / "photos"), "train.total_images": 32, "sample.steps": 2,
              "eval.toy_metrics": "none"}  # fmt: skip
    for i, source in enumerate(("hub:me/model@0.1", "hub:me/model@v1@0.1@64", f"{trained}@0.1")):
        start_training(
            small_run("digits", **fields, **{"init.source": source}), tmp_path / str(i), False, QUIET_CONSOLE, print
        )
    first, *others = (snapshot.list_snapshots(tmp_path / str(i))[-1].path for i in range(3))
    weights = snapshot.read(first)[0]
    for path in others:
        assert all(tensor.equal(weights[name]) for name, tensor in snapshot.read(path)[0].items())


def test_data_set_from_the_hub(server, tmp_path):
    write_gradient_images(server.root / "datasets" / "me" / "pictures" / "train")
    source = open_source("hub:me/pictures")
    local = open_source(str(server.root / "datasets" / "me" / "pictures"))
    assert len(source) == len(local) > 0
    with pytest.raises(UsageError, match="hub:me/none: the download failed"):
        open_source("hub:me/none")


def test_commands(server, trained, gesso):
    status, output, _ = gesso("push", trained, "me/model", "--no-samples", "--license", "mit")
    assert status == 0 and "uploading" in output and "uploaded: http://127.0.0.1" in output
    status, output, _ = gesso("sample", "hub:me/model", "--seeds", "0-1", "sample.steps=2")
    assert status == 0 and "runs/me--model" in output
    status, _, error = gesso("sample", "hub:me/none")
    assert status == 2 and error.startswith("gesso: hub:me/none: the download failed")


def test_hub_data_of_a_recorded_run_is_confirmed(server, tmp_path):
    write_run(tmp_path / "run", "digits")
    recorded = config.load_config(tmp_path / "run" / "run.yaml")
    foreign = recorded.model_copy(update={"data": recorded.data.model_copy(update={"source": "hub:me/pictures"})})
    with pytest.raises(UsageError, match=r"the recorded run has data\.source=hub:me/pictures.*nothing was fetched"):
        config.addresses.confirm_addresses(foreign, [], False)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("/home/me/photos", "photos"), ("~/photos", "photos"), ("../photos", "photos"), ("photos", "photos"),
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"), ("s3://bucket/cache", "s3://bucket/cache"),
        ("hub:me/pictures", "hub:me/pictures"), ("shapes:5000", "shapes:5000"), (3, 3), (None, None),
        ({"a": ["/x/y", {"/home/me/b": 1}]}, {"a": ["y", {"b": 1}]}),
    ],
)  # fmt: skip
def test_without_paths(value, expected):
    assert share.without_paths(value) == expected
