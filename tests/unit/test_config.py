"""Settings: merging, validation and error messages."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gesso import config, recipes
from gesso.config.base import parse_count
from gesso.errors import UsageError


def resolve(*arguments, name="digits"):
    return recipes.resolve(name, list(arguments))[0]


def error_message(*arguments, name="digits") -> str:
    with pytest.raises(UsageError) as info:
        recipes.resolve(name, list(arguments))
    return str(info.value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("200k", 200_000),
        ("1e6", 1_000_000),
        ("1.5M", 1_500_000),
        ("64", 64),
        ("2E3", 2000),
    ],
)
def test_counts_with_suffixes_and_exponents(text, value):
    assert resolve(f"train.total_images={text}").train.total_images == value


@given(st.integers(0, 10**12))
def test_counts_of_any_size(n):
    assert parse_count(str(n)) == n and parse_count(n) == n


@pytest.mark.parametrize("text", ["1.5", "1.2.3", ".", "k", "many", "1e-3", "true", "-3", "", "0x10", "nan"])
def test_invalid_counts(text):
    assert "train.total_images" in error_message(f"train.total_images={text}")


def test_values_are_json_or_text_for_the_schema():
    assert resolve("data.flip=no").data.flip is False
    assert resolve("data.source=010").data.source == "010"
    assert resolve("data.source=no").data.source == "no"
    assert resolve("optim.betas=[0.8,0.9]").optim.betas == (0.8, 0.9)
    assert resolve("optim.max_grad_norm=null").optim.max_grad_norm is None
    assert resolve("optim.lr=1e-4").optim.lr == 1e-4


def test_overrides_are_validated_together():
    """Two settings that are valid only together are accepted in any order."""
    run = resolve("data.resolution=9", "net.patch_size=3", "eval.toy_metrics=none", "data.source=x")
    assert (run.data.resolution, run.net.patch_size) == (9, 3)


def test_all_errors_are_reported_with_path_value_and_nearest_name():
    message = error_message(
        "net.hiden_size=96", "train.batch_size=many", "sample.sampler=eule", "trian.seed=1", "optim.lr=-1"
    )
    assert message.startswith("5 settings are wrong")
    assert "net.hiden_size = 96: no such setting; did you mean net.hidden_size?" in message
    assert 'train.batch_size = "many": should be a whole number' in message
    assert "sample.sampler = \"eule\": allowed are 'euler', 'heun' or 'dpm++2m'" in message
    assert "did you mean train?" in message
    assert "optim.lr = -1: should be greater than 0" in message


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("train.seed.x=3", "train.seed is the single value 0"),
        ("net.name=edm3", "did you mean edm2?"),
        ("process.name=ddpm", "there are: edm, vp"),
        ("sample.sigma_rel=0.3", "less than 0.288"),
        ("data.resolution=9", "not a multiple of 2"),
        ("net.num_heads=5", "not a multiple of net.num_heads=5"),
        ("ema.sigma_rels=[]", "at least one length"),
        ("process.sigma_min=100", "not below process.sigma_max"),
        ("dropout.both=0", "sample.guidance=1.5 needs"),
        ("total_images=3", "no such setting"),
        ("just text", "is not a setting"),
        ("=3", "is not a setting"),
        ("train..seed=3", "is not a setting"),
        ("net=3", "net"),
        ("train=3", "train"),
        ("optim.lr=nan", "finite"),
        ("missing.yaml", "there is no file"),
    ],
)
def test_one_wrong_setting(argument, expected):
    message = error_message(argument)
    assert expected in message
    assert len(message.splitlines()) <= 3


def test_unknown_recipe():
    assert "did you mean digits?" in error_message(name="digit")


def test_folder_without_its_prefix_is_explained(tmp_path):
    assert f"folder:{tmp_path}" in error_message(name=str(tmp_path))


def test_folder_shorthand():
    run = resolve("data.resolution=16", name="folder:/some/where")
    assert (run.recipe, run.data.source, run.data.resolution) == ("folder", "/some/where", 16)


def test_another_network_keeps_common_settings():
    run, notes = recipes.resolve("digits", ["net.name=edm2", "net.channels=64", "net.dropout=0.1", "process.name=vp"])
    assert run.net == config.EDM2Config(channels=64, dropout=0.1)
    assert run.process == config.VPConfig()
    assert any("net.name=edm2" in note and "hidden_size" in note for note in notes)
    same, notes = recipes.resolve("digits", ["net.name=mmdit++"])
    assert same == recipes.resolve("digits", [])[0] and notes == []


def test_yaml_round_trip(tmp_path):
    run = resolve("train.seed=3", name="digits-edm2")
    config.save_config(run, tmp_path / "run.yaml")
    assert config.load_config(tmp_path / "run.yaml") == run
    assert resolve(name=str(tmp_path / "run.yaml")) == run
    assert resolve(name=str(tmp_path)) == run
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["train"]["seed"] == 3


def test_later_settings_override_yaml_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {seed: 7, batch_size: 64}\noptim: {lr: 1e-4}\n")
    run = resolve(str(tmp_path / "mine.yaml"), "train.seed=8")
    assert (run.train.seed, run.train.batch_size, run.optim.lr) == (8, 64, 1e-4)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [", "just words", ""])
def test_yaml_without_settings_is_rejected(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert str(path) in error_message(str(path))


def test_differences():
    a, b = resolve(), resolve("train.seed=1", "process.name=vp")
    rows = {path: (old, new) for path, old, new in config.differences(a, b)}
    assert rows["train.seed"] == (0, 1) and rows["process.name"] == ("edm", "vp")
    assert rows["process.timesteps"] == (None, 1000)
    assert config.differences(a, a) == []


def test_runs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        resolve().train.seed = 3


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_recipes_are_complete_and_documented(name):
    run = recipes.RECIPES[name]()
    assert run.recipe == name
    assert config.validate(config.to_dict(run)) == run
    assert f"gesso train {name}" in recipes.RECIPES[name].__doc__
