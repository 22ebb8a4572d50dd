"""Write a run as a pipeline folder that diffusers loads, with gesso's own code in it.

The folder does not need gesso: `pipeline.py` and the module of the denoiser are bundled from gesso's sources
(`gesso.export.bundle`), so that its images are those of `gesso sample`.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

import gesso
from gesso import atomic_io, conditioning, ema, sampling, snapshot
from gesso.config import EDM2Config, EDM2LadderConfig, NetConfig, RunConfig, UNetConfig
from gesso.data.encoders.text import TransformerTextEncoder, build_text_encoder
from gesso.diffusion.denoiser import Denoiser, network_inputs
from gesso.errors import UsageError
from gesso.export.bundle import Symbol, bundle
from gesso.models import NETWORKS
from gesso.safetensors_io import write_tensors

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
MINIMUM_DIFFUSERS = "0.32.0"
DERIVED_SETTINGS = ("size_multiple", "widths", "embedding_width", "dropout")
"""Attributes of a network's settings that its code reads besides the fields."""
NUM_CONTROL_ROWS = 64
"""Number of seeds whose default control variables the pipeline has."""


def write_pipeline(folder: Path, run: RunConfig, out: Path, nimg: int | None) -> list[str]:
    """Write the pipeline folder of a run; return a report as lines.

    Args:
        folder: Run folder.
        run: Settings of the run; `sample.*` become the defaults of the pipeline.
        out: Folder to write; an earlier export in it is replaced.
        nimg: Number of images that the weights were trained on; None is the last snapshot.

    Raises:
        UsageError: `out` holds something else, the run needs a VAE or text encoder that cannot be loaded, or its
            weights cannot be reconstructed.
    """
    check_output(out)
    sampling.check_sampling(run)
    profile = ema.sampling_profile(run.sample)
    weights, _, nimg, fits = snapshot.reconstruct_from_run(folder, [profile], nimg)
    name = component_name(run.net)
    index = model_index("GessoPipeline", custom=True)
    with atomic_io.atomic_dir(out) as target:
        denoiser = snapshot.denoiser_from_weights(weights[0], run)
        index[name] = write_denoiser(target / name, denoiser, run)
        guide = sampling.load_guide(folder, run)
        if guide is not None:
            index["guide"] = write_denoiser(target / "guide", guide, guide_settings(folder, run))
        index |= write_encoders(target, run)
        index["settings"] = pipeline_settings(folder, run)
        atomic_io.write_text(target / "pipeline.py", pipeline_source())
        atomic_io.write_json(target / "model_index.json", index)
    lines = [f"wrote {out}: pipeline.py, {name}" + "".join(f", {part}" for part in sorted(index) if part in PARTS)]
    if fits[0].squared_error > sampling.MAX_PROFILE_ERROR**2:
        lines.append(f"warning: the stored snapshots cannot reconstruct {profile} accurately: {fits[0]}")
    return [
        *lines,
        f"  {sampling.describe_sampling(run)}, image {nimg:,} ({fits[0]})",
        "load it without gesso:",
        f'  DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True)',
    ]


PATH_SETTINGS = {"_name_or_path", "name_or_path"}
"""Settings of models and tokenizers that record where they were loaded from."""
PARTS = ("guide", "vae", "text_encoder", "tokenizer")
"""Components besides the denoiser."""


def check_output(out: Path) -> None:
    """Raise UsageError if `out` holds anything but an earlier export."""
    if out.exists() and not (out / "model_index.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is no pipeline folder: name a new folder, or remove it")


def component_name(cfg: NetConfig) -> str:
    """Return diffusers' name of the component that a network is."""
    return "unet" if isinstance(cfg, EDM2Config | EDM2LadderConfig | UNetConfig) else "transformer"


def model_index(class_name: str, custom: bool) -> dict[str, Any]:
    """Return the start of model_index.json; `custom` is for a class in pipeline.py."""
    try:
        version = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError:
        version = MINIMUM_DIFFUSERS
    return {"_class_name": ["pipeline", class_name] if custom else class_name, "_diffusers_version": version}


def write_denoiser(folder: Path, denoiser: Denoiser, run: RunConfig) -> list[str]:
    """Write code, settings and weights of a denoiser; return its entry in model_index.json."""
    module = "gesso_" + run.net.name.replace("-", "_").replace("++", "pp")
    settings = run.net.model_dump() | {
        name: getattr(run.net, name) for name in DERIVED_SETTINGS if hasattr(run.net, name)
    }
    inputs = network_inputs(run, denoiser.process)
    description = {
        "_class_name": "GessoDenoiser",
        "net_config": settings,
        "input_spec": inputs._asdict() | {"control": inputs.control._asdict()},
        "process_config": run.process.model_dump(),
        "time_embedding": run.net.noise_embedding,
    }
    weights = {f"net.{name}": tensor for name, tensor in denoiser.net.state_dict().items()}
    write_tensors(folder / WEIGHTS_FILE, weights, {"format": "pt"})
    atomic_io.write_text(folder / f"{module}.py", denoiser_source(run.net))
    atomic_io.write_json(folder / "config.json", description)
    return [module, "GessoDenoiser"]


def denoiser_source(cfg: NetConfig) -> str:
    """Return the module of the denoiser of a network, which does not import gesso."""
    network = NETWORKS[type(cfg)]
    constants = {
        "NETWORK": Symbol(network.__module__, network.__name__),
        "NETWORK_SETTINGS": Symbol(type(cfg).__module__, type(cfg).__name__),
    }
    roots = [Symbol("gesso.export.denoiser_module", "GessoDenoiser")]
    return bundle(f"Denoiser of {cfg.name}, exported by gesso {gesso.__version__}.", roots, constants)


def pipeline_source() -> str:
    """Return the module of the pipeline, which does not import gesso."""
    roots = [Symbol("gesso.export.pipeline_module", "GessoPipeline")]
    return bundle(f"Sampling pipeline, exported by gesso {gesso.__version__}.", roots)


def guide_settings(folder: Path, run: RunConfig) -> RunConfig:
    """Return the settings of the run of the guiding network."""
    assert run.sample.guide_run is not None
    source = folder if run.sample.guide_run == "self" else Path(run.sample.guide_run)
    return snapshot.config_of(snapshot.list_snapshots(source)[-1])


def write_encoders(folder: Path, run: RunConfig) -> dict[str, list[str]]:
    """Write the VAE and the text encoder of a run; return their entries in model_index.json."""
    entries: dict[str, list[str]] = {}
    if run.latent.vae:
        vae = sampling.open_decoder(run, torch.device("cpu")).vae.model
        vae.save_pretrained(folder / "vae", safe_serialization=True)
        entries["vae"] = ["diffusers", type(vae).__name__]
    if run.semantic.kind == "text":
        encoder = build_text_encoder(run.semantic)
        if isinstance(encoder, TransformerTextEncoder):
            for name, part in (("text_encoder", encoder.loaded.model), ("tokenizer", encoder.loaded.tokenizer)):
                part.save_pretrained(folder / name)
                entries[name] = ["transformers", type(part).__name__]
    remove_local_paths(folder)
    return entries


def remove_local_paths(folder: Path) -> None:
    """Remove the folders that libraries record in the settings that they save."""
    for path in folder.glob("*/*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.keys() & PATH_SETTINGS:
            atomic_io.write_json(path, {name: value for name, value in values.items() if name not in PATH_SETTINGS})


def pipeline_settings(folder: Path, run: RunConfig) -> dict[str, Any]:
    """Return the settings of a run that sampling reads, as plain values without local paths."""
    sample = run.sample.model_dump() | {"guide_run": None, "guidance_base_resolution": None}
    sample["guidance"] = sampling.guidance_scale(run)
    semantic = run.semantic.model_dump()
    semantic["encoder"] = "words" if semantic["encoder"] == "words" else "text_encoder"
    columns = run.control.column_names("high") + run.control.column_names("low")
    rows = None
    if columns:
        stored, n = snapshot.load_control_rows(folder), NUM_CONTROL_ROWS
        seeds = range(n)
        labels = conditioning.expand_labels(run, None, seeds)
        prompts = conditioning.expand_prompts(run, (), seeds)
        cond, _ = sampling.build_cond(run, seeds, stored, labels, prompts)
        parts = [part for part in (cond.control_high, cond.control_low) if part is not None]
        rows = torch.cat(parts, dim=1).tolist()
    return json.loads(
        json.dumps(
            {
                "sample": sample,
                "data": {name: getattr(run.data, name) for name in ("resolution", "mean", "std", "class_names")},
                "latent": {"convention": run.latent.convention if run.latent.vae else None},
                "num_classes": run.input_spec.num_classes,
                "trained_classes": conditioning.trained_classes(run),
                "semantic": semantic,
                "x0_channels": run.x0_channels,
                "downsample_factor": run.downsample_factor,
                "sample_size": run.sample_size,
                "control_columns": columns,
                "num_high_control": len(run.control.column_names("high")),
                "control_rows": rows,
                "control_needs_semantic": not run.learned_without(semantic=True),
            }
        )
    )
