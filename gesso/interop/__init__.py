"""Other projects' weights, as plain dicts of tensors, in and out of our networks.

net, notes = gesso.interop.load(state_dict)  # heads=..., resolution=... where the weights do not tell them
denoiser, notes = gesso.interop.denoiser(state_dict)  # the same under the process that the weights were trained under
cfg, inputs, weights, notes, process = gesso.interop.recognise(state_dict)  # the same, not yet built
name, config, state_dict = gesso.interop.to_diffusers(net, cfg, inputs)
"""

from collections.abc import Mapping

from torch import Tensor, nn

from gesso import nets
from gesso.config import DiT, Inputs, MMDiT, Net, PixArt, UNet
from gesso.diffusion import process as processes
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import RunError, UsageError
from gesso.interop import dit, edm2, mdt, pixart, sd3, unet
from gesso.interop.found import ASSUMED, NATIVE, PROPORTIONAL, Found
from gesso.nets import mp

READERS = (edm2, dit, mdt, pixart, sd3, unet)
"""Modules with `matches(keys)` and `convert(state, heads) -> Found`, asked in order."""
WRITERS = {DiT: dit.to_diffusers, PixArt: pixart.to_diffusers, MMDiT: sd3.to_diffusers, UNet: unet.to_diffusers}
"""(weights, cfg, inputs) -> class name, configuration, weights."""
SINGLE_FILE = "model.diffusion_model."
"""Where SD1.5, SDXL and SD3 in one file have the network, beside the VAE and text encoders."""


def recognise(state: Mapping[str, Tensor], heads: int | None = None, resolution: int | None = None) -> Found:
    """Whose weights these are: settings of our network, its tensors as far as they are there, and notes.

    heads: attention heads of a network, which no shape tells without qk-norm; None: those of the published
    size. resolution: height and width of x in training, which is used where the weights do not tell it; of PixArt and
    diffusers' DiT it makes positions on other grids theirs. Raises UsageError when the source is unknown, or heads are needed or do not fit; RunError where a tensor
    that tells the settings is missing.
    """
    inside = {name.removeprefix(SINGLE_FILE): v for name, v in state.items() if name.startswith(SINGLE_FILE)}
    network = inside or state
    keys = set(network)
    for reader in READERS:
        if reader.matches(keys):
            found = reader.convert(network, heads)
            if len(network) < len(state):
                found.notes["left behind"] = f"{len(state) - len(network)} tensors outside {SINGLE_FILE}*"
            return _at(found, resolution) if resolution and found.notes.get("resolution") == ASSUMED else found
    shown = ", ".join(sorted(keys)[:3])
    raise UsageError(f"weights of no project that gesso knows (tensors such as {shown})")


def _at(found: Found, resolution: int) -> Found:
    """Return settings and notes with the resolution of training, which the weights do not tell."""
    cfg, notes = found.cfg, {name: text for name, text in found.notes.items() if name != "resolution"}
    if notes.get("positions", "").startswith(NATIVE):
        cfg, notes["positions"] = cfg.model_copy(update={"positions": "proportional"}), PROPORTIONAL
    return found._replace(cfg=cfg, inputs=found.inputs._replace(resolution=resolution), notes=notes)


def load(
    state: Mapping[str, Tensor], heads: int | None = None, resolution: int | None = None
) -> tuple[nn.Module, dict[str, str]]:
    """Our network with these weights, in evaluation mode, and notes.

    Raises what `recognise` does, and RunError that lists what is missing or unknown.
    """
    found = recognise(state, heads, resolution)
    return _built(found), found.notes


def denoiser(
    state: Mapping[str, Tensor], heads: int | None = None, resolution: int | None = None
) -> tuple[Denoiser, dict[str, str]]:
    """The denoiser of these weights, under their own process, for sampling, and notes.

    Raises what `load` does.
    """
    found = recognise(state, heads, resolution)
    net = _built(found).requires_grad_(False)
    mp.fold(net)
    return Denoiser(net, processes.build(found.process), found.cfg.embedding), found.notes


def _built(found: Found) -> nn.Module:
    net = nets.build(found.cfg, found.inputs)
    if wrong := nets.misfit(net, found.weights):
        raise RunError(f"{found.notes['source']}: {wrong}")
    net.load_state_dict(dict(found.weights))
    return net.eval()


def to_diffusers(net: nn.Module, cfg: Net, inputs: Inputs) -> tuple[str, dict, dict[str, Tensor]]:
    """Name of a diffusers class, its configuration, and the state dict of such a model that is the same function.

    The same at the training resolution, and on other grids where net.positions=proportional: so diffusers has the
    positions of DiT and PixArt. Its DiT computes with other time frequencies (`dit.SPACING`). No two tensors share memory. Raises
    UsageError that names what diffusers cannot hold.
    """
    if type(cfg) not in WRITERS:
        known = ", ".join(sorted(kind().name for kind in WRITERS))
        raise UsageError(f"diffusers has no class for net.name={cfg.name}; it has one for {known}")
    return WRITERS[type(cfg)](net.state_dict(), cfg, inputs)
