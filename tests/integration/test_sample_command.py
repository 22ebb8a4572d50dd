"""`gesso sample`: classes by seed, labels as typed, images written as they are made, folders of nothing but samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import assert_refused
from helpers.run_factory import small_run, with_settings, write_run
from PIL import Image

from gesso import conditioning, config, sample_files, sampling
from gesso.errors import StoppedError, UsageError
from gesso.evaluation import run_sampler
from gesso.evaluation.image_sets import open_image_set
from gesso.sample_files import SampleArgs

ACCENT, COMBINED, DECOMPOSED = "caf\u00e9", "caf\u00e9", "cafe\u0301"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "digits"
    write_run(path, **{"sample.batch_size": 4, "sample.steps": 2})
    return path


def read_images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def named_run(*names: str, **settings: object):
    run = with_settings(small_run(), **{"data.num_classes": len(names), **settings})
    return run.model_copy(update={"data": run.data.model_copy(update={"class_names": names})})


def test_class_and_image_are_functions_of_the_seed(gesso, folder, tmp_path):
    for options in ([], ["--label", "3,5,8"]):
        name = "all" if not options else "some"
        code, out, _ = gesso("sample", folder, *options, "--seeds", "0-6", "--out", tmp_path / name)
        assert code == 0
        code, out, _ = gesso("sample", folder, *options, "--seeds", "5", "--out", tmp_path / f"{name}-single")
        assert f"class '{8 if options else 5}'" in out
        single, several = (tmp_path / d / "seed000005.png" for d in (f"{name}-single", name))
        assert single.read_bytes() == several.read_bytes()


def test_python_sampling_follows_the_seed_or_pairs_conditions(folder):
    import gesso as package

    run = package.load_run(folder)
    assert run.sample(seeds=[5])[0].equal(run.sample(seeds=range(7))[5])
    assert run.sample(labels=[3, 5, 8], seeds=[7])[0].equal(run.sample(labels=[5], seeds=[7])[0])  # 7 mod 3 = 1
    pairs = run.sample(labels=[1, 2], seeds=[7, 8])  # one for each seed
    assert pairs[0].equal(run.sample(labels=[1], seeds=[7])[0])


# Labels as typed.

FOLDERS = tuple(sorted(str(i) for i in range(12)))  # 0, 1, 10, 11, 2, ...


@pytest.mark.parametrize("text", ["2", "02", "2-2", " 2 "])
def test_numbers_mean_names_where_names_are_numbers(text):
    assert conditioning.parse_labels(named_run(*FOLDERS), text) == [FOLDERS.index("2")]


@pytest.mark.parametrize(
    "names, text, expected",
    [
        (FOLDERS, "9-11", ["9", "10", "11"]),
        (("01", "02", "10"), "1-2,10", ["01", "02", "10"]),
        (("1", "2", "3"), "3", ["3"]),
        (("n7", "n8", "n9"), "1", ["n8"]),
        (("red, round", "red", "blue"), "red, round", ["red, round"]),
        (("red, round", "red", "blue"), "blue,red, round,red", ["blue", "red, round", "red"]),
        (("cat ", "dog"), "cat", ["cat "]),
        (("cat ", "cat", "dog"), "cat ,cat", ["cat ", "cat"]),
        (("2-5", "a", "b"), "2-5", ["2-5"]),
        ((COMBINED, "tea"), DECOMPOSED, [COMBINED]),
        ((DECOMPOSED, "tea"), COMBINED, [DECOMPOSED]),
    ],
)
def test_labels_reach_every_class(names, text, expected):
    run = named_run(*names)
    assert [names[i] for i in conditioning.parse_labels(run, text)] == expected


@pytest.mark.parametrize(
    "names, text, message",
    [
        (("1", "2", "3"), "0", "label 0: no class has this name, and classes with numbers as names are selected by"),
        (("1", "01", "b"), "001", "label 1 may be '1' or '01': write the name"),
        (("a", "b"), "99999999999999999999", "below 2^63"),
        (tuple(f"class {i}" for i in range(1000)), "?", "and 940 more"),
    ],
)
def test_labels_without_a_class(names, text, message):
    with pytest.raises(UsageError, match=message.replace("^", r"\^")):
        conditioning.parse_labels(named_run(*names), text)


def test_null_class_by_number():
    run = named_run(*map(str, range(10)))
    assert conditioning.parse_labels(run, "10,9") == [10, 9]
    assert conditioning.describe_classes(run, [10, 9, 10]) == "none (10), '9' (9)"


def test_untrained_classes_are_not_drawn_by_default():
    run = named_run("a", "b", "c", **{"data.untrained_classes": "[0]"})
    assert conditioning.expand_labels(run, None, range(4)) == [1, 2, 1, 2]
    assert conditioning.parse_labels(run, "0") == [0]
    for labels in ("round_robin", "random"):
        drawn = run_sampler.sample_labels(with_settings(run, **{"eval.labels": labels}), range(40))
        assert set(drawn) == {1, 2}


def test_untrained_classes_are_recorded_and_reported(capsys):
    from rich.console import Console

    from gesso.data.in_memory import InMemoryDataset
    from gesso.training import run_folder

    pixels = torch.arange(4 * 64, dtype=torch.uint8).reshape(4, 1, 8, 8)
    data = InMemoryDataset(
        "x", pixels, torch.tensor([1, 2, 2, 1]), torch.full((4, 2), 8), [""] * 4, ("none", "cat", "dog")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "open_dataset", lambda *a: data)
        run, _ = run_folder.open_dataset_for_run(small_run(), Console(width=200))
    assert run.data.untrained_classes == (0,)
    assert "note: 1 of 3 classes has no images: 'none' (0)" in capsys.readouterr().out


# Files.


def test_memory_is_bounded_by_a_batch_and_images_are_written_at_once(folder, monkeypatch, tmp_path):
    real, present = sampling.generate, []

    def generate(denoiser, run, seeds, cond, *rest):
        present.append((len(seeds), len(cond.label), len(list(tmp_path.glob("out/*.png")))))
        return real(denoiser, run, seeds, cond, *rest)

    monkeypatch.setattr(sampling, "generate", generate)
    progress: list[tuple[int, int]] = []
    run = config.load_config(folder / "run.yaml")
    sample_files.sample_to_folder(
        folder, run, SampleArgs(seeds="0-9"), tmp_path / "out", lambda done, total: progress.append((done, total))
    )
    assert present == [(4, 4, 0), (4, 4, 4), (2, 2, 8)] and progress == [(4, 10), (8, 10), (10, 10)]


def test_interrupted_sampling_keeps_images_and_continues(gesso, folder, monkeypatch, tmp_path):
    gesso("sample", folder, "--seeds", "0-9", "--out", tmp_path / "whole")
    save, count = sampling.save_png, []

    def interrupt(image, path, record=None):
        count.append(path)
        if len(count) == 6:
            raise KeyboardInterrupt
        save(image, path, record)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "save_png", interrupt)
        code, _, err = gesso("sample", folder, "--seeds", "0-9", "--out", tmp_path / "part")
    assert code == 130 and "of 10 images are in" in err and "the same command samples the others" in err
    written = {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in read_images(tmp_path / "part")}
    assert 4 <= len(written) < 10
    code, out, _ = gesso("sample", folder, "--seeds", "0-9", "--out", tmp_path / "part")
    assert code == 0 and f"wrote {10 - len(written)} images" in out and f"({len(written)} were there already)" in out
    assert read_images(tmp_path / "part") == read_images(tmp_path / "whole")
    assert all((tmp_path / "part" / name).stat().st_mtime_ns == time for name, time in written.items())


def test_stop_is_an_error_with_the_exit_code_of_the_signal(folder, monkeypatch, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "generate", stop)
    with pytest.raises(StoppedError, match="stopped: 0 of 2 images") as stopped:
        run = config.load_config(folder / "run.yaml")
        sample_files.sample_to_folder(folder, run, SampleArgs(seeds="0-1"), tmp_path / "out")
    assert stopped.value.exit_code == 130


def test_sample_folder_holds_nothing_but_samples(gesso, folder, tmp_path):
    out = tmp_path / "out"
    assert gesso("sample", folder, "--seeds", "0-8", "--out", out)[0] == 0
    assert sorted(read_images(out)) == [f"seed{i:06d}.png" for i in range(9)]
    assert open_image_set(str(out)).num_images == 9
    assert (tmp_path / "out-sheet.png").is_file()
    (out / "photo.jpg").write_bytes(b"x")
    assert_refused(gesso("sample", folder, "--seeds", "9", "--out", out), "contains other files (photo.jpg)")
    assert (out / "photo.jpg").read_bytes() == b"x"


def test_folder_of_samples_has_one_kind(gesso, folder, tmp_path):
    out = tmp_path / "out"
    assert gesso("sample", folder, "--seeds", "0-1", "--label", "3", "--out", out)[0] == 0
    before = read_images(out)
    for arguments in (["--label", "4", "--seeds", "1"], ["sample.steps=3", "--seeds", "7"], ["--seeds", "0"]):
        refused = gesso("sample", folder, *arguments, "--out", out)
        assert_refused(refused, "is not a sample of these weights, settings and conditions: choose another --out")
    assert read_images(out) == before
    assert gesso("sample", folder, "--seeds", "2-3", "--label", "4", "sample.batch_size=1", "--out", out)[0] == 0
    assert len(read_images(out)) == 4


def test_other_weights_do_not_join_a_folder(gesso, folder, tmp_path):
    write_run(tmp_path / "other", **{"sample.steps": 2, "train.seed": 5})
    assert gesso("sample", folder, "--seeds", "0-1", "sample.steps=2", "--out", tmp_path / "out")[0] == 0
    assert_refused(gesso("sample", tmp_path / "other", "--seeds", "2", "--out", tmp_path / "out"), "these weights")


def test_sheet_has_a_limit(gesso, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(sample_files, "MAX_SHEET_IMAGES", 4)
    code, out, _ = gesso("sample", folder, "--seeds", "0-8", "--out", tmp_path / "out")
    assert code == 0 and "a sheet of the first 4" in out
    with Image.open(tmp_path / "out-sheet.png") as sheet:
        assert np.asarray(sheet).shape == (52, 202)  # one row of four


def test_default_folders_of_samples_hold_samples_only(gesso, folder):
    assert gesso("sample", folder, "--label", "1", "--seeds", "0-1")[0] == 0
    assert sorted(path.name for path in (folder / "samples" / "label1-nimg640").iterdir()) == [
        "seed000000.png",
        "seed000001.png",
    ]
    assert all(path.is_dir() for path in (folder / "samples").iterdir())
    assert (folder / "sheets" / "label1-nimg640.png").is_file()
