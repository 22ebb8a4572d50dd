"""Write EMA weights under the names of NVlabs/edm2, for tools that read its state dicts."""

from pathlib import Path

import torch

from gesso import ema, models, snapshot
from gesso.config import EDM2Config, EDM2LadderConfig, EDMConfig, RunConfig
from gesso.diffusion.denoiser import network_inputs
from gesso.diffusion.process import build_process
from gesso.errors import RunError, UsageError
from gesso.interop import edm2
from gesso.models import mp
from gesso.safetensors_io import write_tensors


def write_state(folder: Path, run: RunConfig, out: Path, nimg: int | None) -> list[str]:
    """Write a safetensors file with EDM2's names; return a report as lines.

    Args:
        folder: Run folder.
        run: Settings of the run.
        out: File to write.
        nimg: Number of images that the weights were trained on; None is the last snapshot.

    Raises:
        UsageError: The network is not CONFIG G of EDM2, or has something that EDM2's does not.
        RunError: The weights belong to another network.
    """
    if isinstance(run.net, EDM2LadderConfig) or not isinstance(run.net, EDM2Config):
        raise UsageError(f"--format edm2 is for net.name=edm2, not {run.net.name}: use --format diffusers")
    if not isinstance(run.process, EDMConfig) or run.process.resolution_scale != 1:
        raise UsageError(
            f"--format edm2 is for process.name=edm without a resolution_scale, but this run has "
            f"process.name={run.process.name}: use --format diffusers"
        )
    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: --format edm2 writes one file, so name it FILE.safetensors")
    profile = ema.sampling_profile(run.sample)
    weights, _, nimg, fits = snapshot.reconstruct_from_run(folder, [profile], nimg)
    inputs = network_inputs(run, build_process(run.process))
    with torch.device("meta"):
        net = models.build_network(run.net, inputs)
    if mismatch := models.state_dict_mismatch(net, weights[0]):
        raise RunError(f"the weights belong to another network: {mismatch}")
    sphere = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, mp.MPWeight)}
    normalized = {name: mp.unit_rms(tensor) if name in sphere else tensor for name, tensor in weights[0].items()}
    metadata = {"format": "pt", "sigma_data": str(run.process.sigma_data)}
    write_tensors(out, edm2.export_state(normalized, run.net, inputs), metadata)
    return [
        f"wrote {out}, image {nimg:,} ({fits[0]})",
        f"  sigma_data {run.process.sigma_data:g}; without the uncertainty function logvar_*, unused in sampling",
    ]
