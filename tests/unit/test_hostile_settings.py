"""Settings of other people: absurd values are refused with one line each, before any work."""

import random

import pytest
import torch
from helpers import fuzz
from helpers.run_factory import small_run, write_run

from gesso import config, recipes
from gesso.config import InputSpec, yaml_files
from gesso.data.normalization import Normalizer
from gesso.errors import GessoError, NonFiniteSamplesError, UsageError
from gesso.models import build_network


@pytest.mark.parametrize(
    "setting",
    [
        "train.seed=18446744073709551616", "train.seed=-1", "eval.seed=18446744073709551616",
        "train.total_images=1e999",
        "train.total_images=1e300", "train.batch_size=1e9", "sample.batch_size=1e12", "optim.betas=[0.9,1]",
        "optim.betas=[1,1]",
        'optim.param_groups=[{"match": "*", "betas": [1, 1]}]', "process.rho=1e-12", "process.sigma_max=1e30",
        "process.sigma_min=1e-30", "process.P_mean=1e6", "process.P_std=1e9", "process.sigma_data=1e-30",
        "process.resolution_scale=1e30", "sample.guidance=1e30", "sample.guidance=1e999",
        "sample.control_guidance=-1e9",
        "sample.steps=1e9", "sample.shift=1e30", "sample.S_noise=1e30", "net.hidden_size=1e12",
        "net.hidden_size=4000000",
        "net.depth=1000000", "net.num_heads=[1]", "net.name=[1]", "net.name={}", "net=3", "process=[1]",
        "process.name={}",
        "data.resolution=1e9", "data.num_classes=1000000", "sample.aspect=1:9999999999", "sample.aspect=1:65",
        "train.rank_timeout_s=1e15", "recipe={}", "train.num_threads=1e9",
        "optim.lr=1e30",
        "data.std=[1e-300]", "data.mean=[1e300]",
    ],
)  # fmt: skip
def test_absurd_settings_are_refused(setting):
    with pytest.raises(UsageError) as caught:
        recipes.resolve("digits", [setting])
    assert len(str(caught.value).splitlines()) <= 3 and setting.split("=")[0].split(".")[0] in str(caught.value)


@pytest.mark.parametrize("setting", ["process.beta_end=0.99", "process.timesteps=100000"])
def test_noise_without_any_signal_is_refused(setting):
    with pytest.raises(UsageError, match="leave no signal after"):
        recipes.resolve("digits", ["process.name=vp", setting])


def test_the_largest_seed_is_not_the_smallest():
    assert recipes.resolve("digits", [f"train.seed={2**64 - 1}"])[0].train.seed == 2**64 - 1


ALIASES = "".join(f"y{i}: &{'x' * (i + 2)} [*{'x' * (i + 1)}, *{'x' * (i + 1)}]\n" for i in range(40))
"""Each list holds the one before twice."""


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 100_000, "- " * 5000, "? " * 3000, "a: &a [*a]", "a: !!python/object:os.system x", "\t",
        "a: !!int x", "a: !!binary é", "x: &x [1, 1]\n" + ALIASES,
    ],
)  # fmt: skip
def test_hostile_yaml(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError):
        yaml_files.load_yaml(tmp_path / "x.yaml")
    with pytest.raises(UsageError) as caught:
        recipes.resolve("digits", [str(tmp_path / "x.yaml")])
    assert len(str(caught.value).splitlines()) == 1


def test_yaml_with_few_aliases_is_read():
    assert yaml_files.parse_yaml("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}


def test_a_large_yaml_file_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"#" * (5 * 2**20))
    with pytest.raises(UsageError, match="more than 4 MiB"):
        recipes.resolve("digits", [str(tmp_path / "x.yaml")])


def test_a_network_beyond_the_memory_is_refused():
    net = small_run(**{"net.hidden_size": 65536, "net.depth": 1000}).net
    with pytest.raises(UsageError, match="do not fit into"):
        build_network(net, InputSpec(1, 8))


# Samples that are not finite.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("vae", [None, "somewhere"])
def test_samples_that_are_not_finite_are_no_images(value, vae):
    run = small_run()
    data = run.data.model_copy(update={"mean": (0.0,), "std": (0.5,)})
    normalizer = Normalizer(data, run.latent.model_copy(update={"vae": vae}), 0.5, "cpu")
    x0 = torch.zeros(4, 1, 8, 8)
    x0[1, 0, 3, 3] = value
    with pytest.raises(NonFiniteSamplesError, match=r"1 of 4 samples have NaN or infinity(?s:.*)sample.precision=full"):
        normalizer.x0_to_pixels(x0)  # through a VAE: before it is loaded


def test_commands_fail_on_nan(tmp_path, gesso, monkeypatch):
    from gesso.diffusion import samplers

    write_run(tmp_path)
    monkeypatch.setattr(samplers, "sample", lambda cfg, process, denoise, first, *_: first * float("nan"))
    for arguments in (["sample", tmp_path, "--seeds", "0"], ["evaluate", tmp_path]):
        code, _, err = gesso(*arguments)
        assert code == 1 and "have NaN or infinity" in err and len(err.strip().splitlines()) <= 3
    assert not list(tmp_path.glob("samples/**/*.png")) and not (tmp_path / "metrics.json").exists()


# Random settings.


def resolve_random_settings(seed: int, count: int, folder) -> int:
    """Resolve random settings of all recipes; return the number of valid ones."""
    generator, names, num_valid = random.Random(seed), fuzz.setting_names(), 0
    for _ in range(count):
        arguments = fuzz.random_arguments(generator, names, folder)
        try:
            run, _ = recipes.resolve(arguments[0], arguments[1:])
            config.to_annotated_yaml(run)
            num_valid += run.sample_size[0] > 0 and run.input_spec.channels > 0
        except GessoError as error:
            assert error.exit_code == 2 and 1 <= len(str(error).splitlines()) <= 60, error
        except Exception as error:
            raise AssertionError(f"{arguments}") from error
    return num_valid


def test_random_settings(tmp_path):
    assert resolve_random_settings(0, 100, tmp_path) > 0


@pytest.mark.slow
def test_many_random_settings(tmp_path):
    assert resolve_random_settings(1, 10_000, tmp_path) > 500
