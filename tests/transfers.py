"""Runs of every network at any size and condition, their weights in a file, and what transfer makes of them."""

from pathlib import Path

import torch
from conftest import awake
from networks import LADDER, TRANSFORMER, UNET

from gesso import ema, snapshot
from gesso.config import (
    EDM,
    EDM2,
    MDT,
    Controls,
    Data,
    DiT,
    DiTAtt,
    EDM2Ladder,
    Latent,
    MMDiT,
    MMDiTpp,
    MPDiT,
    MPMMDiTpp,
    Net,
    PixArt,
    Run,
    Sample,
    Semantic,
    Train,
    UNet,
)
from gesso.config.init import Init
from gesso.diffusion import denoiser as diffusion
from gesso.nets import mp
from gesso.train import source, transfer

NETS: dict[str, Net] = {
    "edm2": EDM2(**LADDER | dict(channels=16)),
    **{f"ladder {step}": EDM2Ladder(step=step, **LADDER) for step in "ABCDEFG"},
    "unet": UNet(**UNET, context=24),
    "dit": DiT(**TRANSFORMER),
    "dit-att": DiTAtt(**TRANSFORMER),
    "pixart": PixArt(**TRANSFORMER),
    "mdt": MDT(**TRANSFORMER | dict(depth=3), decoder=1),
    "mmdit": MMDiT(**TRANSFORMER),
    "mmdit all": MMDiT(**TRANSFORMER, text_weights="all"),
    "mmdit SD3": MMDiT(**TRANSFORMER, text_weights="all", max_grid=20),
    "mmdit++": MMDiTpp(**TRANSFORMER),
    "mmdit++ all": MMDiTpp(**TRANSFORMER, text_weights="all"),
    "mp-dit": MPDiT(**TRANSFORMER),
    "mp-mmdit++": MPMMDiTpp(**TRANSFORMER),
}
U_NETS = [name for name in NETS if name.startswith(("edm2", "ladder", "unet"))]
ON_SPHERE = ("edm2", "ladder D", "ladder E", "ladder F", "ladder G", "mp-dit", "mp-mmdit++")
KINDS = ("none", "label", "text")


def takes(name: str, kind: str) -> bool:
    return kind == "none" or kind in NETS[name].accepts


def run_of(
    name: str,
    kind: str = "none",
    resolution: int = 16,
    classes: tuple[str, ...] = ("a", "b", "c"),
    channels: int = 3,
    variables: tuple[str, ...] = (),
    latents: int | None = None,
    pooled: int = 10,
    seed: int = 0,
    **more,
) -> Run:
    """A run whose data have been opened, in float64. latents: their channels; then resolution is theirs times 8."""
    vae = Latent(vae="none", channels=latents) if latents else Latent()
    n = latents or channels
    data = Data(
        source="digits", resolution=resolution, channels=channels, num_classes=len(classes), class_names=classes,
        mean=(0.0,) * n, std=(1.0,) * n,
    )  # fmt: skip
    return Run(
        data=data, latent=vae, net=more.pop("net", NETS[name]), process=more.pop("process", EDM()),
        semantic=Semantic(kind=kind, width=12, pooled_width=pooled or None), control=Controls(variables=variables),
        train=Train(dtype="float64", seed=seed), sample=more.pop("sample", Sample()), init=Init(**more),
    )  # fmt: skip


def weights_of(run: Run, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random ones, none of them zero, on the sphere."""
    torch.manual_seed(seed)
    net = awake(diffusion.build(run).net, seed).double()
    mp.put_on_sphere(mp.sphere_weights(net))
    return net.state_dict()


def written(folder: Path, run: Run, name: str = "source") -> Path:
    """A snapshot of a run with such weights."""
    path = folder / f"{name}.safetensors"
    snapshot.write(path, weights_of(run), 640, ema.Power(0.1), run)
    return path


def begun(run: Run) -> tuple[Run, diffusion.Denoiser, list[str]]:
    run, denoiser, said = transfer.begun(run, source.opened(run))
    return run, denoiser.eval(), said


def original(path: Path) -> diffusion.Denoiser:
    """The network of a snapshot, in float64."""
    weights, run, _ = snapshot.read(path)
    denoiser = diffusion.build(run).double()
    denoiser.net.load_state_dict(weights)
    return denoiser.eval()
