"""Messages on settings and paths that are typed slightly wrong, and commands that can be copied."""

import shlex
from pathlib import Path

import pytest
from helpers.cli import assert_refused
from helpers.images import write_image_folders
from helpers.run_factory import small_run, with_settings, write_run
from PIL import Image
from rich.console import Console

from gesso import config, recipes
from gesso.errors import UsageError
from gesso.evaluation import ema_export
from gesso.evaluation.image_sets import open_image_set
from gesso.training import run_folder
from gesso.training.logging import ProgressBar
from gesso.training.transfer_config import class_mapping

SMALL = (
    "net.hidden_size=32", "net.depth=1", "net.num_heads=2", "train.total_images=16", "train.batch_size=4",
    "train.num_threads=1",
)  # fmt: skip
COMBINED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    "setting, message",
    [
        ("net=dit", "net=dit: net is a group of settings; did you mean net.name=dit?"),
        ("optim=adamw", "did you mean optim.name=adamw?"),
        ("train=5", "train is a group of settings; such as train.total_images=..."),
        ("seed=3", "seed=3: no such setting; did you mean train.seed=3 or eval.seed=3?"),
        ("lr=1e-3", "did you mean optim.lr=1e-3?"),
        ("total_images=100", "did you mean train.total_images=100?"),
        ("totl_images=100", "did you mean train.total_images?"),
        ("train.lr=1e-3", "no such setting; did you mean optim.lr?"),
        ("foo=1", "there are: recipe, data, latent, net"),
    ],
)
def test_settings_typed_slightly_wrong(setting, message):
    with pytest.raises(UsageError) as refused:
        recipes.resolve("digits", [setting])
    assert message in str(refused.value)


@pytest.mark.parametrize("path", ["1e5", "123", "cats [new]", "[1,2]", "true", "1,2", "010", "a=b"])
def test_paths_are_no_yaml(path):
    run = recipes.resolve("digits", [f"data.source={path}", f"init={path}", f"eval.reference={path}"])[0]
    assert (run.data.source, run.init.source, run.eval.reference) == (path, path, path)
    assert config.validate(config.to_dict(run)) == run
    assert recipes.resolve(f"folder:{path}", [])[0].data.source == path


def test_null_resets_a_path():
    assert small_run(**{"eval.reference": "null"}).eval.reference is None


@pytest.mark.parametrize("name", ["1e5", "cats [new]"])
def test_path_that_looks_like_a_value_is_trained_on(gesso, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image_folders(tmp_path / name, {".": 4})
    tiny = ["net.hidden_size=32", "net.depth=1", "net.num_heads=2", "data.resolution=8", "train.total_images=16"]
    code, out, err = gesso("train", f"folder:{name}", *tiny, "train.batch_size=16")
    assert code == 0, err
    assert config.load_config(Path("runs") / name / "run.yaml").data.source == str(tmp_path / name)
    commands = [line.strip() for line in out.splitlines() if line.strip().startswith("gesso ")]
    assert len(commands) == 3 and all(shlex.split(c)[2] == f"runs/{name}" for c in commands)


def test_notes_and_bars_show_brackets(capsys, monkeypatch, tmp_path):
    from gesso.data.in_memory import load_in_memory
    from gesso.data.sources import open_source

    run = small_run()

    def open_dataset(*arguments):
        dataset = load_in_memory(open_source("digits"), run.data)
        dataset.notes = ["nothing read from cats [new]"]
        return dataset

    monkeypatch.setattr(run_folder, "open_dataset", open_dataset)
    run_folder.open_dataset_for_run(run, Console(width=200))
    assert "nothing read from cats [new]" in capsys.readouterr().out
    with ProgressBar(Console(width=200, force_terminal=True), 3, 0, "reading cats [new]") as bar:
        bar.update(3, "at [/x]")
    output = capsys.readouterr().out
    assert "reading cats [new]" in output and "at [/x]" in output


def test_folder_prefix_is_optional_where_a_source_is_named(gesso, tmp_path):
    write_image_folders(tmp_path / "photos", {".": 4})
    assert small_run(**{"data.source": f"folder:{tmp_path}/photos"}).data.source == f"{tmp_path}/photos"
    assert open_image_set(f"folder:{tmp_path}/photos").num_images == 4
    assert gesso("inspect", f"folder:{tmp_path}/photos", "--out", tmp_path / "sheet.png")[0] == 0
    assert_refused(gesso("train", f"folder:{tmp_path}/nowhere", "--out", tmp_path / "run"), "gesso: folder:/")
    assert_refused(gesso("train", "digits", tmp_path / "photos"), f"gesso train folder:{tmp_path}/photos")


def test_suggested_commands_are_quoted(gesso, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = write_run(Path("my run"))
    code, out, _ = gesso("ema", "my run", "--sigma-rel", "0.07")
    assert code == 0 and "gesso sample 'my run' sample.sigma_rel=0.07" in out
    assert "'my run'" in ema_export._next_command(Path("my run"), ema_export.TraditionalProfile(50), Path("x"))
    assert_refused(gesso("sample", "no run"), "--out 'no run'")
    assert run.recipe == "digits"


@pytest.mark.parametrize(
    "settings, notes",
    [
        (["sample.S_noise=1.1"], ["sample.S_noise=1.1 has no effect with sample.S_churn=0"]),
        (["sample.S_noise=1.1", "sample.S_churn=5", "sample.sampler=heun"], []),
        (
            ["sample.guidance=1", "sample.guided_channels=1"],
            ["sample.guided_channels=1 has no effect with sample.guid"],
        ),
        (["sample.guidance_power=2"], ["no effect with sample.guidance_schedule=constant"]),
        (["sample.size_range=[8,9]"], ["no effect with sample.size_conditioning=train"]),
        (["sample.rampup=0.1"], ["sample.rampup=0.1 has no effect with sample.halflife=null"]),
        (["sample.steps=4"], []),
    ],
)
def test_unused_settings_of_sample_are_noted(settings, notes):
    trained = small_run()
    run = config.resolve(config.to_dict(trained), settings)[0]
    lines = config.unused_sample_settings(trained, run)
    assert len(lines) == len(notes) and all(n in line for n, line in zip(notes, lines, strict=True)), lines


def test_unused_settings_are_printed(gesso, tmp_path):
    write_run(tmp_path / "run")
    code, out, _ = gesso("sample", tmp_path / "run", "sample.S_noise=1.1", "--seeds", "0")
    assert code == 0 and "note: sample.S_noise=1.1 has no effect with sample.S_churn=0" in out


def test_learning_rate_of_another_network_is_noted():
    notes = recipes.resolve("digits", ["net.name=dit"])[1]
    assert any("was chosen for net.name=mmdit++: set optim.lr for dit" in note for note in notes)
    assert not any("optim.lr" in note for note in recipes.resolve("digits", ["net.name=dit", "optim.lr=1e-3"])[1])
    assert not any("optim.lr" in note for note in recipes.resolve("digits", ["net.depth=2"])[1])


def with_class_names(run, *names):
    run = with_settings(run, **{"data.num_classes": len(names)})
    return run.model_copy(update={"data": run.data.model_copy(update={"class_names": names})})


def test_class_names_of_macos_are_those_of_linux(tmp_path):
    run = small_run(**{"data.fingerprint": "a"})
    linux, macos, other = (with_class_names(run, name, "tea") for name in (COMBINED, DECOMPOSED, "cafe"))
    config.save_config(linux, tmp_path / "run.yaml")
    run_folder.prepare_run_folder(tmp_path, macos, "cpu")
    with pytest.raises(UsageError, match=r"data\.class_names"):
        run_folder.prepare_run_folder(tmp_path, other, "cpu")


def test_initial_weights_find_classes_in_any_normalization():
    from types import SimpleNamespace

    run = with_class_names(small_run(), "tea", DECOMPOSED)
    source = with_class_names(small_run(), COMBINED, "tea")
    assert class_mapping(run, SimpleNamespace(run=source, input_spec=source.input_spec)) == (1, 0)


def test_missing_images_are_named_by_their_option(gesso, photos):
    code, _, error = gesso("evaluate", "--images", "no-such", "--ref", photos, "--metrics", "fid")
    assert code == 2 and error.startswith("gesso: --images no-such: there is no such folder or file")
    code, _, error = gesso("evaluate", "--images", photos, "--resolution", 8, "--ref", "no-such", "--metrics", "fid")
    assert code == 2 and error.startswith("gesso: --ref no-such: there is no such folder or file")


def test_unknown_table(gesso):
    code, _, error = gesso("reproduce", "edm2/99")
    assert code == 2 and error.startswith("gesso: there is no table 'edm2/99'; did you mean ")
    assert error.endswith("? (gesso reproduce list shows all tables)\n")


def test_a_flat_channel_is_named(gesso, tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (10 * i, 255 - i, 7)).save(tmp_path / "photos" / f"{i}.png")
    arguments = ("train", f"folder:{tmp_path / 'photos'}", "data.resolution=8", *SMALL, "--out", tmp_path / "run")
    code, _, error = gesso(*arguments)
    assert code == 1 and "channel 2 of 3 has one value in all 4 images" in error and "data.mean and data.std" in error
    code, _, error = gesso(*arguments, "data.mean=[0,0,0]", "data.std=[.5,.5,.5]")
    assert code == 0, error
