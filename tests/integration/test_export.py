"""Exported runs: diffusers loads them without gesso, and their images are those of gesso."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.encoders import write_clip, write_t5, write_vae
from helpers.images import write_gradient_images
from helpers.run_factory import image_run, with_settings, write_run, write_snapshots
from safetensors.torch import load_file
from torch import Tensor

from gesso import conditioning, interop, recipes, rng, sampling, snapshot
from gesso.api import Run
from gesso.conditioning import Cond
from gesso.config import RunConfig
from gesso.diffusion import samplers
from gesso.export import export_run, native
from gesso.export.pipeline_folder import denoiser_source, pipeline_source
from gesso.export.program import example_inputs
from gesso.models import mp

SEEDS = [0, 3, 63]
PEER = Path(__file__).parents[1] / "helpers" / "pipeline_peer.py"

CASES: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    # name: (recipe, settings of the run, settings of sampling)
    "edm2": ("digits-edm2", {}, {"sample.S_churn": 4, "sample.sampler": "heun"}),
    "ladder": ("digits-edm2", {"net.name": "edm2-ladder", "net.config": "B"}, {}),
    "dit": ("digits-dit", {}, {"sample.guidance": 2, "sample.guidance_interval": "[0.1,2]"}),
    "dit-att": ("digits-dit-att", {}, {"sample.eta": 1, "sample.sampler": "euler"}),
    "pixart": ("digits-pixart", {}, {"sample.guidance": 2, "sample.guide_run": "self", "sample.guide_sigma_rel": 0.1}),
    "mdt": ("digits-mdt", {}, {"sample.guidance_schedule": "power_cosine", "sample.guidance": 3}),
    "mmdit": ("digits-mmdit", {"process.name": "rf"}, {"sample.sampler": "dpm++2m", "sample.shift": 2}),
    "mmdit++": ("digits", {"process.name": "vp"}, {"sample.sampler": "euler", "sample.schedule": "trailing"}),
    "mp-dit": ("digits-mp-dit", {}, {"sample.clip": "true"}),
    "mp-mmdit++": ("digits-mp-mmdit++", {}, {"sample.to_uint8": "truncate"}),
    "unet": ("digits-unet", {}, {"sample.aspect": "2:1"}),
    "text and control": (
        "shapes",
        {"control.variables": "flip,crop,size"},
        {"sample.guidance": 2, "sample.control_guidance": 1.4},
    ),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "source").mkdir()
    write_gradient_images(folder / "source")
    captioned = folder / "captioned"
    captioned.mkdir()
    for i, file in enumerate(sorted((folder / "source").glob("*/*.*"))):
        shutil.copy(file, captioned / f"{i:02d}{file.suffix}")
        (captioned / f"{i:02d}.txt").write_text(["a cat", "a red cat", "", "two dogs run"][i % 4])
    return captioned


@pytest.fixture(scope="module")
def exported(tmp_path_factory, photos):
    """Run folder, settings of sampling and images of the peer, by name of the case."""
    root = tmp_path_factory.mktemp("export")
    runs = {}
    for name, (recipe, settings, sample) in CASES.items():
        run = write_run(root / name / "run", recipe, **settings)
        runs[name] = with_settings(run, **{k: str(v) for k, v in sample.items()})
    text = {"semantic.kind": "text", "semantic.max_tokens": 8, "data.resolution": 32, "data.source": photos}
    for name, encoder, vae, more in (
        ("clip and vae", write_clip(root / "clip"), write_vae(root / "vae", 4), {"semantic.padding": "masked"}),
        (
            "t5 and edm2 vae",
            write_t5(root / "t5"),
            root / "vae",
            {"latent.convention": "edm2", "semantic.padding": "noisy"},
        ),
    ):
        settings = {**text, "semantic.encoder": encoder, "latent.vae": vae, **more}
        runs[name] = write_snapshots(root / name / "run", image_run(settings.pop("data.source"), **settings))
    jobs, results = [], {}
    for name, run in runs.items():
        folder = root / name
        lines = export_run(folder / "run", run, folder / "pipeline", "diffusers")
        assert lines[0].startswith(f"wrote {folder / 'pipeline'}: pipeline.py, ")
        prompts = conditioning.expand_prompts(run, (), SEEDS)
        arguments = {"prompt": prompts} if prompts else {}
        jobs.append(
            {
                "folder": str(folder / "pipeline"),
                "seeds": SEEDS,
                "arguments": arguments,
                "result": str(folder / "images"),
            }
        )
        results[name] = (folder / "run", run, folder / "images")
    (root / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    peer = subprocess.run(
        [sys.executable, PEER, root / "jobs.json"], env=environment, cwd=root, capture_output=True, text=True
    )
    assert peer.returncode == 0, peer.stderr[-3000:]
    return {name: (folder, run, load_file(path)) for name, (folder, run, path) in results.items()}


def sampled_x0(folder: Path, run: RunConfig) -> Tensor:
    """Return x0 of SEEDS, as `gesso sample` computes it before it decodes."""
    seeds = torch.tensor(SEEDS)
    denoiser = Run(folder)._denoiser(run, None)
    labels = conditioning.expand_labels(run, None, SEEDS)
    prompts = conditioning.expand_prompts(run, (), SEEDS)
    cond, _ = sampling.build_cond(run, SEEDS, snapshot.load_control_rows(folder), labels, prompts)
    shape = (run.x0_channels, *(side // run.downsample_factor for side in run.sample_size))
    denoise = sampling.guided_denoiser(denoiser, run, cond, sampling.load_guide(folder, run))
    first = rng.normal(0, seeds, "first noise", shape)
    noise = lambda i: rng.normal(0, seeds, f"noise of step {i}", shape)  # noqa: E731
    return samplers.sample(run.sample, denoiser.process, denoise, first, noise)


@pytest.mark.parametrize("name", [*CASES, "clip and vae", "t5 and edm2 vae"])
def test_exported_pipeline_gives_the_same_images(exported, name):
    folder, run, images = exported[name]
    x0 = sampled_x0(folder, run)
    assert x0.std() > 0.1
    assert (images["latent"] - x0).abs().max() <= 1e-5
    pixels = sampling.open_decoder(run).x0_to_pixels(x0)
    assert images["pt"].shape == pixels.shape and images["pt"].min() >= 0 and images["pt"].max() <= 1
    assert (images["pt"] * 255 - pixels).abs().max() <= 1 + 1e-3
    written = images["bytes"].reshape(len(SEEDS), *pixels.shape[2:], pixels.shape[1]).permute(0, 3, 1, 2)
    # A value next to a rounding boundary may differ by one level.
    assert (written.int() - pixels.int()).abs().max() <= 1 and (written == pixels).float().mean() > 0.999


def test_folder_has_no_local_path(exported):
    folder = exported["clip and vae"][0].parent / "pipeline"
    texts = [path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".py")]
    assert len(texts) > 5 and not any(str(folder.parents[1]) in text for text in texts)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".py", ".safetensors", ".txt"}


def test_sources_are_deterministic_and_do_not_import_gesso(exported):
    sources = {pipeline_source()} | {denoiser_source(run.net) for _, run, _ in exported.values()}
    for source in sources:
        assert "import gesso" not in source and "from gesso" not in source
        compile(source, "source", "exec")
    folder, run, _ = exported["edm2"]
    assert (folder.parent / "pipeline" / "unet" / "gesso_edm2.py").read_text() == denoiser_source(run.net)


def test_loading_needs_consent_to_run_code(exported):
    from diffusers import DiffusionPipeline

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(exported["edm2"][0].parent / "pipeline")


NATIVE = {
    # name: (settings of the run, settings of sampling)
    "pixart": (
        {"net.name": "pixart", "net.pos_embed": "proportional", "process.name": "vp", "semantic.padding": "masked"},
        {"sample.schedule": "trailing", "sample.steps": 4, "sample.guidance": 2},
    ),
    "pixart v": (
        {"net.name": "pixart", "net.pos_embed": "extrapolated", "process.name": "vp", "process.prediction": "v"},
        {"sample.schedule": "ddim", "sample.steps": 4},
    ),
    "sd3": (
        {"net.name": "mmdit", "net.separate_text_weights": "all", "net.pos_embed_max_size": 8, "process.name": "rf"},
        {"sample.schedule": "sd3", "sample.steps": 3, "sample.guidance": 2, "sample.shift": 3},
    ),
    "unet": (
        {
            "net.name": "unet", "net.channels": 16, "net.channel_mult": "[1,2]", "net.num_blocks": 1,
            "net.transformer_depth": "[0,1]",
            "net.channels_per_head": 8, "net.num_heads": "null", "net.norm_num_groups": 8,
            "net.text_projection": "none", "net.pooled_mlp": "none",
            "process.name": "vp",
        },
        {"sample.schedule": "leading", "sample.steps": 4, "sample.guidance": 2},
    ),
}  # fmt: skip


def latent_run(folder: Path, source: Path, settings: dict[str, object], root: Path) -> RunConfig:
    """Write a run on latents of 4 x 4 whose process has sigma_data 1."""
    encoders = {
        "latent.vae": write_vae(root / "vae", 4),
        "semantic.kind": "text",
        "semantic.encoder": write_clip(root / "clip"),
    }
    shared = {"data.resolution": 32, "semantic.max_tokens": 8, **encoders}
    run = image_run(source, **{**shared, **settings}) if settings["net.name"] != "unet" else None
    if run is None:
        values = {"train.batch_size": 8, "train.num_threads": 1, "data.channels": 3, "eval.toy_metrics": "none"}
        values |= {"data.source": source, **shared, **settings}
        run = recipes.resolve("digits", [f"{name}={value}" for name, value in values.items()])[0]
    return write_snapshots(folder, run)


@pytest.mark.parametrize("name", list(NATIVE))
def test_native_pipelines_of_diffusers(tmp_path, photos, name):
    """diffusers' own class on the same noise and text, without code of gesso."""
    from diffusers import DiffusionPipeline

    settings, sample = NATIVE[name]
    run = latent_run(tmp_path / "run", photos, settings, tmp_path)
    run = with_settings(run, **{"sample.sampler": "euler", "sample.guidance": 1, **sample})
    lines = export_run(tmp_path / "run", run, tmp_path / "out", "diffusers-native")
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "out", **dict.fromkeys(native.PIPELINES[type(run.net)].empty)
    )
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ in lines[0] and not list((tmp_path / "out").rglob("*.py"))
    seeds = torch.tensor(SEEDS)
    cond, _ = sampling.build_cond(run, SEEDS, None, None, conditioning.expand_prompts(run, (), SEEDS))
    null = torch.zeros_like(cond.text)
    arguments = {"prompt_embeds": cond.text, "negative_prompt_embeds": null}
    if run.net.name == "pixart":
        mask = torch.ones(cond.text.shape[:2]) if cond.text_mask is None else cond.text_mask.float()
        arguments |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": torch.ones_like(mask)}
        arguments |= {"use_resolution_binning": False, "negative_prompt": None}
    elif run.net.name == "mmdit":
        arguments |= {
            "pooled_prompt_embeds": cond.pooled,
            "negative_pooled_prompt_embeds": torch.zeros_like(cond.pooled),
        }
    images = pipeline(
        **arguments, latents=rng.normal(0, seeds, "first noise", (4, 4, 4)), height=32, width=32, output_type="latent",
        num_inference_steps=run.sample.steps, guidance_scale=run.sample.guidance,
    ).images  # fmt: skip
    x0 = sampled_x0(tmp_path / "run", run)
    assert x0.std() > 0.1 and (images - x0).abs().max() <= 1e-5 * max(1, float(x0.abs().max()))


def test_settings_without_an_equal_in_diffusers_are_named(gesso, tmp_path):
    write_run(tmp_path / "run", "digits-pixart")
    code, _, error = gesso(
        "export", tmp_path / "run", tmp_path / "out", "--format", "diffusers-native", "sample.guidance_interval=[1,2]"
    )
    assert code == 2 and "PixArtAlphaPipeline has no equal of" in error
    for part in ("a run on pixels", "class conditions", "sample.guidance_interval", "process.name="):
        assert part in error
    assert not (tmp_path / "out").exists()
    write_run(tmp_path / "edm2", "digits-edm2")
    error = gesso("export", tmp_path / "edm2", tmp_path / "out", "--format", "diffusers-native")[2]
    assert "diffusers has no pipeline for net.name=edm2, only for dit, mmdit, pixart, unet" in error


def test_export_command(gesso, tmp_path):
    write_run(tmp_path / "run", "digits-dit")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    code, _, error = gesso("export", tmp_path / "run", tmp_path / "other")
    assert code == 2 and "exists and is no pipeline folder" in error
    code, _, error = gesso("export", tmp_path / "run", tmp_path / "out", "--format", "onnx")
    assert code == 2 and "there is no such format; use diffusers, diffusers-native, edm2, torch-export" in error
    code, output, _ = gesso("export", tmp_path / "run", tmp_path / "out", "--sigma-rel", ".1", "--nimg", "640")
    assert code == 0 and "sigma_rel 0.1, image 640" in output
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = Run(tmp_path / "run").denoiser(sigma_rel=0.1).net.state_dict()
    assert all(tensor.equal(stored[f"net.{name}"]) for name, tensor in expected.items())
    assert gesso("export", tmp_path / "run", tmp_path / "out")[0] == 0  # replaces the earlier export


def test_edm2_state_is_read_back(gesso, tmp_path):
    """The published forward pass, which `interop.load_denoiser` follows, gives the same function."""
    write_run(tmp_path / "run", "digits-edm2", **{"net.channels": 64, "net.channels_per_head": 64})
    assert gesso("export", tmp_path / "run", tmp_path / "w.safetensors", "--format", "edm2")[0] == 0
    state = load_file(tmp_path / "w.safetensors")
    assert state["unet.out_gain"].shape == () and any(name.endswith("attn_qkv.weight") for name in state)
    net, _ = interop.load_network(state)
    expected = Run(tmp_path / "run").denoiser().net.state_dict()
    mp.fold_gains_(net)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    code, output, _ = gesso("import", tmp_path / "w.safetensors")
    assert code == 0 and "format: EDM2 (NVlabs/edm2)" in output


def test_networks_that_edm2_does_not_have(gesso, tmp_path):
    write_run(tmp_path / "run", "digits-dit")
    error = gesso("export", tmp_path / "run", tmp_path / "w.safetensors", "--format", "edm2")[2]
    assert "--format edm2 is for net.name=edm2, not dit: use --format diffusers" in error
    write_run(tmp_path / "balance", "digits-edm2", **{"net.residual_balance": 0.4})
    error = gesso("export", tmp_path / "balance", tmp_path / "w.safetensors", "--format", "edm2")[2]
    assert "cannot represent net.residual_balance=0.4" in error


@pytest.mark.parametrize("recipe", ["digits-edm2", "digits-mdt", "shapes"])
def test_exported_program_is_the_same_function(tmp_path, recipe):
    run = write_run(tmp_path / "run", recipe)
    export_run(tmp_path / "run", run, tmp_path / "d.pt2", "torch-export")
    program = torch.export.load(tmp_path / "d.pt2").module()
    denoiser = Run(tmp_path / "run").denoiser()
    tensors = example_inputs(run)
    names = list(tensors)[2:]
    for B in (2, 5):
        x, s, *conditions = (tensor[torch.arange(B) % 2] for tensor in tensors.values())
        with torch.no_grad():
            expected = denoiser(x, s, Cond(**dict(zip(names, conditions, strict=True))))
            actual = program(x, s, *conditions)
        assert expected.std() > 0.01
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
