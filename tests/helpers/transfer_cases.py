"""Runs of every network at any size and condition, snapshots of them, and transfer from a snapshot."""

from pathlib import Path

import torch
from helpers.network_cases import LADDER_SHAPE, TRANSFORMER_SHAPE, UNET_SHAPE, randomize_constants_

from gesso import ema, snapshot
from gesso.config import (
    ControlConfig,
    DataConfig,
    DiTAttConfig,
    DiTConfig,
    EDM2Config,
    EDM2LadderConfig,
    EDMConfig,
    LatentConfig,
    MDTConfig,
    MMDiTConfig,
    MMDiTppConfig,
    MPDiTConfig,
    MPMMDiTppConfig,
    NetConfig,
    PixArtConfig,
    RunConfig,
    SampleConfig,
    SemanticConfig,
    TrainConfig,
    UNetConfig,
)
from gesso.config.initialization import InitConfig
from gesso.diffusion import denoiser as diffusion
from gesso.models import mp
from gesso.training import init_source, transfer

NETS: dict[str, NetConfig] = {
    "edm2": EDM2Config(**LADDER_SHAPE | dict(channels=16)),
    **{f"ladder {step}": EDM2LadderConfig(config=step, **LADDER_SHAPE) for step in "ABCDEFG"},
    "unet": UNetConfig(**UNET_SHAPE, context_dim=24),
    "dit": DiTConfig(**TRANSFORMER_SHAPE),
    "dit-att": DiTAttConfig(**TRANSFORMER_SHAPE),
    "pixart": PixArtConfig(**TRANSFORMER_SHAPE),
    "mdt": MDTConfig(**TRANSFORMER_SHAPE | dict(depth=3), decoder_layers=1),
    "mmdit": MMDiTConfig(**TRANSFORMER_SHAPE),
    "mmdit all": MMDiTConfig(**TRANSFORMER_SHAPE, separate_text_weights="all"),
    "mmdit SD3": MMDiTConfig(**TRANSFORMER_SHAPE, separate_text_weights="all", pos_embed_max_size=20),
    "mmdit++": MMDiTppConfig(**TRANSFORMER_SHAPE),
    "mmdit++ all": MMDiTppConfig(**TRANSFORMER_SHAPE, separate_text_weights="all"),
    "mp-dit": MPDiTConfig(**TRANSFORMER_SHAPE),
    "mp-mmdit++": MPMMDiTppConfig(**TRANSFORMER_SHAPE),
}
U_NETS = [name for name in NETS if name.startswith(("edm2", "ladder", "unet"))]
ON_SPHERE = ("edm2", "ladder D", "ladder E", "ladder F", "ladder G", "mp-dit", "mp-mmdit++")
SEMANTIC_KINDS = ("none", "label", "text")


def accepts(name: str, kind: str) -> bool:
    """Return whether a network of NETS takes a kind of semantic condition."""
    return kind == "none" or kind in NETS[name].accepts


def make_run(
    name: str,
    kind: str = "none",
    resolution: int = 16,
    classes: tuple[str, ...] = ("a", "b", "c"),
    channels: int = 3,
    variables: tuple[str, ...] = (),
    latents: int | None = None,
    pooled: int = 10,
    seed: int = 0,
    **options,
) -> RunConfig:
    """Return a run in float64, as after opening its dataset.

    Args:
        name: Network of NETS.
        kind: Semantic condition.
        resolution: Of images; 8 times that of latents.
        classes: Class names.
        channels: Channels of images.
        variables: Control variables.
        latents: Channels of latents; None for pixels.
        pooled: Dimension of pooled text; 0 for none.
        seed: train.seed.
        options: `net`, `process` and `sample` replace these settings; all others are settings of `init`.
    """
    vae = LatentConfig(vae="none", channels=latents) if latents else LatentConfig()
    n = latents or channels
    data = DataConfig(
        source="digits", resolution=resolution, channels=channels, num_classes=len(classes), class_names=classes,
        mean=(0.0,) * n, std=(1.0,) * n,
    )  # fmt: skip
    return RunConfig(
        data=data, latent=vae, net=options.pop("net", NETS[name]), process=options.pop("process", EDMConfig()),
        semantic=SemanticConfig(kind=kind, embed_dim=12, pooled_dim=pooled or None),
        control=ControlConfig(variables=variables),
        train=TrainConfig(dtype="float64", seed=seed), sample=options.pop("sample", SampleConfig()),
        init=InitConfig(**options),
    )  # fmt: skip


def random_weights(run: RunConfig, seed: int = 5) -> dict[str, torch.Tensor]:
    """Return random weights, none of them zero, normalized where the network needs it."""
    torch.manual_seed(seed)
    net = randomize_constants_(diffusion.build_denoiser(run).net, seed).double()
    mp.normalize_weights_(mp.sphere_weights(net))
    return net.state_dict()


def write_snapshot(folder: Path, run: RunConfig, name: str = "source") -> Path:
    """Write a snapshot of a run with random weights; return its path."""
    path = folder / f"{name}.safetensors"
    snapshot.write(path, random_weights(run), 640, ema.PowerProfile(0.1), run)
    return path


def transfer_to(run: RunConfig) -> tuple[RunConfig, diffusion.Denoiser, list[str]]:
    """Initialize a run from its source; return the run, the denoiser and the lines of the report."""
    run, denoiser, report = transfer.init_from_source(run, init_source.open_init_source(run))
    return run, denoiser.eval(), report


def load_source(path: Path) -> diffusion.Denoiser:
    """Return the denoiser of a snapshot in float64."""
    weights, run, _ = snapshot.read(path)
    denoiser = diffusion.build_denoiser(run).double()
    denoiser.net.load_state_dict(weights)
    return denoiser.eval()
