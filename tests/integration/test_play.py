"""The playground without a browser: its images are those of `gesso sample`, and so is the command that it prints."""

import io
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import run_cli
from helpers.run_factory import write_run
from PIL import Image

import gesso
from gesso.play.page import NO_RUN, Playground, write_animation
from gesso.play.player import PlaySettings, controls_of, encode_gif, picture, play, sample_command, sample_settings


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> gesso.Run:
    folder = tmp_path_factory.mktemp("play") / "di gits"
    write_run(folder, "digits", **{"control.variables": "flip,size", "dropout.control": 0.1, "dropout.both": 0.1})
    return gesso.load_run(folder)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> gesso.Run:
    folder = tmp_path_factory.mktemp("play") / "shapes"
    write_run(folder, "shapes")
    return gesso.load_run(folder)


def images_of_command(command: str, out: Path) -> torch.Tensor:
    """Run a printed command; return its images in the order of their seeds."""
    words = shlex.split(command)
    assert words[:2] == ["gesso", "sample"]
    run_cli(*words[1:], "--out", out)
    pictures = [np.array(Image.open(path)) for path in sorted(out.glob("*.png"))]
    return torch.stack([torch.from_numpy(p.reshape(*p.shape[:2], -1)).permute(2, 0, 1) for p in pictures])


@pytest.mark.parametrize(
    "settings",
    [
        PlaySettings(),
        PlaySettings(label="7", seed=11, num_images=3),
        PlaySettings(label="10", guidance=1.0),  # no class
        PlaySettings(label="3", guidance=2.5, control_guidance=1.25, sigma_rel=0.08, steps=4, sampler="euler"),
        PlaySettings(label="2", control={"flip": "yes", "size": "8x12"}, sampler="dpm++2m", steps=5),
    ],
    ids=["defaults", "seeds", "no class", "all sliders", "control"],
)
def test_images_are_those_of_the_printed_command(digits, settings, tmp_path):
    result = play(digits, settings)
    assert result.images.shape == (settings.num_images, 1, 8, 8)
    assert result.images.equal(images_of_command(result.command, tmp_path / "out"))


def test_images_of_a_prompt_are_those_of_the_printed_command(shapes, tmp_path):
    settings = PlaySettings(prompt="--a 'red' star & a blue ring", guidance=2.0, num_images=2)
    result = play(shapes, settings)
    assert result.images.equal(images_of_command(result.command, tmp_path / "out"))
    assert result.images.equal(shapes.sample(prompts=[settings.prompt], seeds=[0, 1], guidance=2.0))
    captions = play(shapes, PlaySettings(num_images=2))  # captions of the training images
    assert captions.images.equal(shapes.sample(seeds=[0, 1])) and not captions.images.equal(result.images)


def test_the_command_has_only_changed_settings(digits):
    assert sample_command(digits, PlaySettings(steps=3, guidance=digits.config.sample.guidance)) == (
        f"gesso sample {shlex.quote(str(digits.folder))} --seeds=0"
    )
    command = sample_command(digits, PlaySettings(label="7", num_images=4, guidance=3), "gesso --code my_recipe.py")
    assert command.startswith("gesso --code my_recipe.py sample ")
    assert command.endswith(" --label=7 --seeds=0-3 sample.guidance=3")


def test_settings_of_other_samplers_and_half_lives_are_reset(tmp_path):
    write_run(tmp_path / "run", "digits", **{"sample.sampler": "heun", "sample.S_churn": 10, "sample.halflife": 300})
    run = gesso.load_run(tmp_path / "run")
    changes = sample_settings(run.config, PlaySettings(sampler="euler", sigma_rel=run.config.sample.sigma_rel))
    assert changes == {
        "sample.sampler": "euler", "sample.S_churn": 0.0, "sample.halflife": None,
        "sample.rampup": None, "sample.sigma_rel": run.config.sample.sigma_rel,
    }  # fmt: skip
    result = play(run, PlaySettings(sampler="euler", sigma_rel=0.06))
    assert result.images.equal(images_of_command(result.command, tmp_path / "out"))


def test_every_setting_changes_the_images(digits):
    base = PlaySettings(label="3", guidance=2.0)
    variants = [
        PlaySettings(label="4", guidance=2.0), PlaySettings(label="3", guidance=4.0),
        PlaySettings(label="3", guidance=2.0, seed=1), PlaySettings(label="3", guidance=2.0, sigma_rel=0.1),
        PlaySettings(label="3", guidance=2.0, steps=5), PlaySettings(label="3", guidance=2.0, sampler="heun"),
        PlaySettings(label="3", guidance=2.0, control={"flip": "yes"}),
        PlaySettings(label="3", guidance=2.0, control_guidance=3.0),
    ]  # fmt: skip
    images = play(digits, base).images
    for variant in variants:
        assert not play(digits, variant).images.equal(images), variant


def test_runs_start_from_equal_noise(digits, tmp_path):
    write_run(tmp_path / "other", "digits-dit")
    other = gesso.load_run(tmp_path / "other")
    captured = []
    for run in (digits, other):
        run.denoiser().register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0].clone()))
        play(run, PlaySettings(label="3", seed=5, guidance=1.0))
    calls = len(captured) // 2
    assert captured[0].equal(captured[calls]) and not captured[1].equal(captured[calls + 1])


def test_frames_do_not_change_the_images_and_end_with_them(digits):
    settings = PlaySettings(label="7", num_images=5, steps=6)
    plain = play(digits, settings)
    calls = []
    result = play(digits, settings, with_frames=True, progress=lambda done, total: calls.append((done, total)))
    assert plain.frames == [] and result.images.equal(plain.images)
    assert len(result.frames) == 6 and result.frames[-1].equal(result.images)
    assert all(frame.shape == result.images.shape for frame in result.frames)
    # The first estimate is the blurred mean of the class; it differs from the image.
    assert not result.frames[0].equal(result.images)
    assert calls == [(5, 5)]


def test_frames_of_several_batches_are_joined(tmp_path):
    write_run(tmp_path / "run", "digits", **{"sample.batch_size": 2})
    run = gesso.load_run(tmp_path / "run")
    calls = []
    settings = PlaySettings(label="7", num_images=5)
    result = play(run, settings, with_frames=True, progress=lambda done, total: calls.append((done, total)))
    assert [len(frame) for frame in result.frames] == [5] * 3 and calls == [(2, 5), (4, 5), (5, 5)]
    assert result.images.equal(run.sample(labels=[7], seeds=range(5)))


def test_networks_of_recent_ema_lengths_stay_in_memory(digits):
    run = gesso.load_run(digits.folder)
    run.max_denoisers = 2
    first, second = run.denoiser(sigma_rel=0.06), run.denoiser(sigma_rel=0.07)
    assert run.denoiser(sigma_rel=0.06) is first  # now 0.07 is the oldest
    run.denoiser(sigma_rel=0.08)
    assert run.denoiser(sigma_rel=0.06) is first and run.denoiser(sigma_rel=0.07) is not second


def test_notes_warn_of_lengths_that_the_snapshots_do_not_determine(digits):
    assert len(play(digits, PlaySettings()).notes) == 1
    assert "cannot reconstruct" in play(digits, PlaySettings(sigma_rel=0.25)).notes[1]


def test_controls_follow_the_run(digits, shapes, tmp_path):
    controls = controls_of(digits.config)
    assert [label for _, label in controls.labels] == [None, *map(str, range(11))]
    assert controls.labels[-1] == ("no class", "10") and not controls.has_prompt
    assert controls.has_guidance and controls.has_control_guidance
    assert controls.control == {"flip": "yes or no", "size": "HEIGHTxWIDTH such as 512x512"}
    text = controls_of(shapes.config)
    assert text.has_prompt and text.labels == [] and text.control == {} and not text.has_control_guidance
    write_run(tmp_path / "run", "digits", **{"dropout.both": 0, "dropout.semantic": 0, "sample.guidance": 1})
    plain = controls_of(gesso.load_run(tmp_path / "run").config)
    assert not plain.has_guidance and plain.labels[-1][0] != "no class"


def test_animation_and_picture(digits):
    result = play(digits, PlaySettings(label="7", num_images=2), with_frames=True)
    with Image.open(io.BytesIO(encode_gif([result.frames]))) as animation:
        assert animation.n_frames == len(result.frames) and animation.info["loop"] == 0
        durations = []
        for i, frame in enumerate(result.frames):
            animation.seek(i)
            durations.append(animation.info["duration"])
            assert np.array_equal(np.asarray(animation.convert("L")), np.asarray(picture(frame)))
    assert durations == [120, 120, 1000]
    assert min(picture(result.images).size) >= 160


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (PlaySettings(label="eleven"), "no such class"),
        (PlaySettings(prompt="a cat"), "trained with classes"),
        (PlaySettings(control={"crop": "full"}), "not trained with crop"),
        (PlaySettings(control={"size": "large"}), "write HEIGHTxWIDTH"),
        (PlaySettings(steps=0), "sample.steps"),
    ],
)
def test_errors_are_those_of_the_library(digits, settings, message):
    with pytest.raises(gesso.UsageError, match=message):
        play(digits, settings)


# The page, as far as it needs no gradio (test_play_page.py shows it in a browser).


@pytest.fixture(scope="module")
def playground(digits, shapes) -> Playground:
    return Playground([gesso.load_run(digits.folder), gesso.load_run(shapes.folder)], "gesso --code my.py")


def test_defaults_show_what_the_command_without_settings_samples(playground):
    for name, run in playground.runs.items():
        values = playground.defaults(name)
        assert sample_settings(run.config, playground.settings_for(name, values)) == {}
    assert playground.defaults("di gits").other_run == "shapes" and playground.defaults("shapes").other_run == NO_RUN
    assert Playground(list(playground.runs.values())[:1]).defaults("di gits").other_run == NO_RUN


def test_two_runs_share_the_settings_that_both_have(playground, tmp_path):
    values = playground.defaults("di gits")._replace(
        label="3", guidance=2.30000001, steps=4, seed=7, num_images=2, control=("yes", "")
    )
    first, second = playground.settings_for("di gits", values), playground.settings_for("shapes", values)
    assert first == PlaySettings(
        label="3", seed=7, num_images=2, guidance=2.3, control_guidance=values.control_guidance,
        control={"flip": "yes"}, sigma_rel=values.sigma_rel, steps=4, sampler="euler",
    )  # fmt: skip
    assert second == PlaySettings(
        seed=7, num_images=2, guidance=2.3, sigma_rel=values.sigma_rel, steps=4, sampler="euler"
    )
    shown = playground.show(values)
    commands = shown.commands.splitlines()
    assert commands[0] == sample_command(playground.runs["di gits"], first, "gesso --code my.py")
    assert commands[1] == sample_command(playground.runs["shapes"], second, "gesso --code my.py")
    assert shown.num_frames == 4 and all(shown.pictures)
    for last, current in zip(shown.pictures_at(4), shown.pictures, strict=True):
        assert np.array_equal(last, current)
    assert not np.array_equal(shown.pictures_at(1)[1], shown.pictures[1])
    with Image.open(write_animation(shown, tmp_path)) as animation:
        assert animation.n_frames == 4 and animation.width == sum(p.width for p in shown.pictures)


def test_errors_stand_on_their_side_as_text(playground, tmp_path):
    shown = playground.show(playground.defaults("di gits")._replace(label="<b>11", steps=2))
    assert shown.pictures[0] is None and shown.pictures[1] is not None
    assert "&lt;b&gt;11" in shown.notes[0] and "no such class" in shown.notes[0] and "<b>11" not in shown.notes[0]
    assert shown.commands.startswith("gesso --code my.py sample") and "shapes" in shown.commands
    with pytest.raises(gesso.UsageError, match="record the denoising"):
        write_animation(playground.show(playground.defaults("di gits")._replace(with_frames=False)), tmp_path)


def test_a_half_life_is_replaced_only_when_the_slider_moves(tmp_path):
    write_run(tmp_path / "run", "digits", **{"sample.halflife": 300})
    half = Playground([gesso.load_run(tmp_path / "run")])
    values = half.defaults("run")
    assert half.settings_for("run", values).sigma_rel is None
    assert half.settings_for("run", values._replace(sigma_rel=0.07)).sigma_rel == 0.07


def test_runs_of_equal_names_are_told_apart(digits, tmp_path):
    write_run(tmp_path / "di gits", "digits")
    assert list(Playground([digits, gesso.load_run(tmp_path / "di gits")]).runs) == ["di gits", f"{tmp_path}/di gits"]


def test_missing_gradio_is_explained(gesso_text, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, output = gesso_text("play", digits.folder)
    assert code == 2 and "the playground needs gradio: pip install" in output
    assert gesso_text("play", digits.folder / "nothing")[0] == 2
