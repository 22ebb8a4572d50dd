"""Papers' ways of measuring, as settings over a run."""

import math

import pytest
from helpers.run_factory import tiny_run

from gesso import config, recipes, sampling
from gesso.errors import UsageError
from gesso.evaluation import protocols


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol")
    config.save_config(tiny_run(), path / "run.yaml")
    return path


def at(resolution: int):
    return lambda run: run.model_copy(update={"data": run.data.model_copy(update={"resolution": resolution})})


def test_what_the_papers_say(folder):
    run = protocols.apply_protocol(folder, "berrada", [])
    assert (run.eval.num_samples, run.eval.metrics, run.eval.protocol) == (50_000, ("fid",), "berrada")
    assert (run.sample.sampler, run.sample.steps, run.sample.eta) == ("euler", 250, 0)
    assert sampling.guidance_scale(at(256)(run)) == 1.5 and sampling.guidance_scale(at(512)(run)) == 2.0
    run = protocols.apply_protocol(folder, "edm2", [])
    assert (
        (run.eval.num_repeats, run.eval.repeated, run.eval.resize) == (3, ("fid",), "adm")
        and run.eval.metrics == ("fid", "fd_dinov2")
        and run.eval.labels == "random"
    )
    assert run.sample.sampler == "heun" and 2 * run.sample.steps - 1 == 63
    run = protocols.apply_protocol(folder, "dit", [])
    assert (run.sample.to_uint8, run.eval.resize, run.eval.inception) == ("round", "adm", "torch-fidelity")
    adm = protocols.apply_protocol(folder, "adm", [])
    assert (adm.sample.to_uint8, adm.eval.resize, adm.eval.inception) == ("truncate", "adm", "torch-fidelity")
    assert run.sample.guidance == 1.5 and run.sample.eta == 1 and sampling.guidance_scale(at(512)(run)) == 1.5
    assert run.sample.guided_channels is None  # pixels have three channels
    assert (run.sample.variance, run.sample.guidance_schedule) == ("small", "constant")
    run = protocols.apply_protocol(folder, "berrada-coco", ["eval.reference=coco"])
    assert (run.sample.steps, sampling.guidance_scale(at(512)(run))) == (25, 5.0)
    assert run.eval.num_samples == 40_504 and run.eval.metrics == ("fid", "clip") and run.eval.prompts == "coco"
    run = protocols.apply_protocol(folder, "sd3", ["eval.reference=coco", "eval.prompts=mine"])
    assert run.eval.metrics == ("fd_clip", "clip") and run.eval.prompts == "mine"


@pytest.mark.parametrize("name", protocols.PROTOCOLS)
def test_every_protocol_is_a_run_that_could_be_measured(name, folder):
    run = protocols.apply_protocol(
        folder, name, ["eval.reference=somewhere", "sample.batch_size=7", "sample.sigma_rel=0.05"]
    )
    images = 40_504 if name in ("berrada-coco", "sd3") else 50_000
    assert run.eval.protocol == name and run.eval.num_samples == images and run.eval.metrics
    assert (run.sample.batch_size, run.sample.sigma_rel, run.eval.reference) == (7, 0.05, "somewhere")


def test_what_departs_is_marked(folder):
    run = protocols.apply_protocol(folder, "berrada", ["eval.num_samples=1000", "sample.steps=20"])
    assert run.eval.protocol == "berrada, but eval.num_samples sample.steps"
    assert (run.eval.num_samples, run.sample.steps, run.sample.sampler) == (1000, 20, "euler")
    assert protocols.apply_protocol(folder, None, ["sample.steps=20"]).eval.protocol is None


def test_published_samplers_of_dit_mdt_and_sd3(tmp_path):
    """Protocols set variance, indices, guidance of three channels, power-cosine guidance and SD3's levels."""
    run = tiny_run()
    latent = {"latent": {"vae": "some VAE"}, "data": {"resolution": 64, "channels": 3, "mean": None, "std": None}}
    net = {"name": "dit", "hidden_size": 32, "depth": 1, "num_heads": 1, "learned_variance": True}
    other = {"sampler": "euler", "schedule": "trailing", "eta": 0.5, "guided_channels": 2, "guidance_power": 2}
    for name, process in (("vp", {"name": "vp", "betas": "linear"}), ("rf", {"name": "rf"})):
        tree = config.to_dict(run) | {"net": net, "process": process}
        tree["data"] |= latent["data"]
        tree |= {"latent": latent["latent"], "sample": other | ({"schedule": "linear"} if name == "rf" else {})}
        tree["eval"] |= {"toy_metrics": "none"}
        config.save_config(config.validate(tree), tmp_path / "run.yaml")
        if name == "rf":
            sample = protocols.apply_protocol(tmp_path, "sd3", ["eval.reference=coco"]).sample
            assert (sample.schedule, sample.steps, sample.guidance, sample.eta) == ("sd3", 25, 5.0, 0)
            continue
        sample = protocols.apply_protocol(tmp_path, "dit", []).sample
        assert (sample.schedule, sample.steps, sample.eta, sample.variance) == ("respaced", 250, 1, "learned")
        assert (sample.guided_channels, sample.guidance, sample.guidance_schedule) == (3, 1.5, "constant")
        sample = protocols.apply_protocol(tmp_path, "mdt", []).sample
        assert (sample.guidance, sample.guidance_schedule, sample.guidance_power) == (3.8, "power_cosine", 4.0)
        sample = protocols.apply_protocol(tmp_path, "adm", []).sample
        assert (sample.guided_channels, sample.variance) == (None, "learned")
        assert protocols.apply_protocol(tmp_path, "berrada", []).sample.schedule is None
        marked = protocols.apply_protocol(tmp_path, "dit", ["sample.schedule=trailing"]).eval.protocol
        assert marked == "dit, but sample.schedule"


def test_error_messages(folder):
    for name, output in (
        ("sd3", "COCO's validation images with captions: set eval.reference"),
        ("berada", "did you mean berrada"),
        ("berrada-val", "the validation set: set eval.reference"),
    ):
        with pytest.raises(UsageError, match=output):
            protocols.apply_protocol(folder, name, [])
    with pytest.raises(UsageError, match="fixed by training"):
        protocols.apply_protocol(folder, "adm", ["net.hidden_size=64"])


@pytest.mark.parametrize("name", ["berrada", "berrada-val", "berrada-in22k", "berrada-coco"])
def test_the_papers_protocols_measure_both_averages(name, folder):
    """sigma_rel of the run, and .9999 per step: half of it is left after ln(1/2) / ln(.9999) steps."""
    output = ["eval.reference=somewhere"]
    run = protocols.apply_protocol(folder, name, output)
    steps = run.eval.halflives[0] / run.train.batch_size
    assert (
        len(run.eval.halflives) == 1 and 0.9999**steps == pytest.approx(0.5, rel=1e-5) and run.sample.halflife is None
    )
    alone = protocols.apply_protocol(folder, name, [*output, "eval.halflives=[]"])
    assert alone.eval.halflives == () and alone.eval.protocol == f"{name}, but eval.halflives"
    assert protocols.apply_protocol(folder, name, [*output, "sample.halflife=1000"]).sample.halflife == 1000


@pytest.mark.parametrize("name", [n for n in recipes.RECIPES if n.startswith(("in1k", "cc12m", "in22k", "table-"))])
def test_recipes_track_what_the_protocol_measures(name):
    run = recipes.RECIPES[name]()
    if name != "table-a2":  # without EMA
        assert run.ema.halflives == (round(run.train.batch_size * math.log(0.5) / math.log(0.9999)),)
        assert 0.10 in run.ema.sigma_rels and run.sample.sigma_rel == 0.10
        assert protocols.berrada(run)[1] == f"eval.halflives=[{run.ema.halflives[0]}]"
