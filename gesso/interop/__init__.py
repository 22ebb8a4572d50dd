"""Import and export weights of other projects, as plain dicts of tensors.

net, notes = gesso.interop.load_network(state_dict)  # num_heads=, resolution= if they cannot be inferred
denoiser, notes = gesso.interop.load_denoiser(state_dict)  # with the process that the weights were trained under
imported = gesso.interop.detect_format(state_dict)  # settings and tensors only
class_name, config, state_dict = gesso.interop.to_diffusers(net, cfg, inputs)
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from gesso import models
from gesso.config import DiTConfig, InputSpec, MMDiTConfig, NetConfig, PixArtConfig, UNetConfig
from gesso.diffusion import process as processes
from gesso.diffusion.denoiser import Denoiser
from gesso.errors import RunError, UsageError
from gesso.interop import dit, edm2, mdt, pixart, sd3, unet
from gesso.interop.mapping import NOTE_ASSUMED_RESOLUTION, NOTE_PROPORTIONAL, NOTE_UNKNOWN_BASE, ImportedModel
from gesso.models import mp

FORMATS = (edm2, dit, mdt, pixart, sd3, unet)
"""Modules with `matches(keys)` and `import_weights(state, num_heads)`; the first that matches is used."""
EXPORTERS: dict[type, Callable[..., tuple[str, dict, dict[str, Tensor]]]] = {
    DiTConfig: dit.to_diffusers,
    PixArtConfig: pixart.to_diffusers,
    MMDiTConfig: sd3.to_diffusers,
    UNetConfig: unet.to_diffusers,
}
"""Functions (weights, cfg, inputs) -> class name, configuration, weights, by the settings class."""
SINGLE_FILE_PREFIX = "model.diffusion_model."
"""Prefix of the network in single files of SD1.5, SDXL and SD3, which also hold the VAE and the text encoders."""


def detect_format(
    state: Mapping[str, Tensor], num_heads: int | None = None, resolution: int | None = None
) -> ImportedModel:
    """Return settings, tensors under gesso's names, and notes, for the weights of a known project.

    Args:
        state: The state dict.
        num_heads: Attention heads; None infers them from qk-norm or the published size.
        resolution: Height and width of x in training, for weights without a position table. For PixArt and diffusers'
            DiT, positions on other grids then equal those of the source.

    Raises:
        UsageError: The project is unknown, or num_heads is needed or does not fit.
        RunError: A tensor that defines the settings is missing or has an impossible shape.
    """
    prefix = SINGLE_FILE_PREFIX
    network = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)} or state
    keys = set(network)
    module = next((module for module in FORMATS if module.matches(keys)), None)
    if module is None:
        examples = ", ".join(sorted(keys)[:3])
        raise UsageError(f"the weights belong to no project that gesso knows (tensors such as {examples})")
    try:
        imported = module.import_weights(network, num_heads)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise RunError(f"the weights have shapes that fit no network of {module.__name__} ({reason})") from None
    imported = imported._replace(weights={name: tensor.float() for name, tensor in imported.weights.items()})
    if len(network) < len(state):
        imported.notes["ignored"] = f"{len(state) - len(network)} tensors outside {prefix}*"
    if resolution and imported.notes.get("resolution") == NOTE_ASSUMED_RESOLUTION:
        return _with_resolution(imported, resolution)
    return imported


def _with_resolution(imported: ImportedModel, resolution: int) -> ImportedModel:
    """Return the imported model with the resolution of training, which cannot be inferred from its weights."""
    cfg, notes = imported.cfg, {name: text for name, text in imported.notes.items() if name != "resolution"}
    if notes.get("positions", "").startswith(NOTE_UNKNOWN_BASE):
        cfg, notes["positions"] = cfg.model_copy(update={"pos_embed": "proportional"}), NOTE_PROPORTIONAL
    return imported._replace(cfg=cfg, inputs=imported.inputs._replace(resolution=resolution), notes=notes)


def load_network(
    state: Mapping[str, Tensor], num_heads: int | None = None, resolution: int | None = None
) -> tuple[nn.Module, dict[str, str]]:
    """Return the network with these weights, in evaluation mode, and notes.

    Raises:
        UsageError: As for `detect_format`.
        RunError: Tensors are missing or unknown; the message lists them.
    """
    imported = detect_format(state, num_heads, resolution)
    return _build(imported), imported.notes


def load_denoiser(
    state: Mapping[str, Tensor], num_heads: int | None = None, resolution: int | None = None
) -> tuple[Denoiser, dict[str, str]]:
    """Return the denoiser of these weights under their process, and notes; errors as for `load_network`."""
    imported = detect_format(state, num_heads, resolution)
    net = _build(imported).requires_grad_(False)
    mp.fold_gains_(net)
    return Denoiser(net, processes.build_process(imported.process), imported.cfg.noise_embedding), imported.notes


def _build(imported: ImportedModel) -> nn.Module:
    net = models.build_network(imported.cfg, imported.inputs)
    if wrong := models.state_dict_mismatch(net, imported.weights):
        raise RunError(f"{imported.notes['source']}: {wrong}")
    net.load_state_dict(dict(imported.weights))
    return net.eval()


def to_diffusers(net: nn.Module, cfg: NetConfig, inputs: InputSpec) -> tuple[str, dict, dict[str, Tensor]]:
    """Return the class name, configuration and state dict of an equivalent diffusers model.

    It is equivalent at the training resolution, and on other grids with net.pos_embed=proportional, the positions of
    diffusers' DiT and PixArt. diffusers' DiT has other time frequencies (`dit.NOTE_TIME_FREQUENCIES`). No two tensors
    share memory.

    Raises:
        UsageError: diffusers cannot represent a setting; the message names it.
    """
    if type(cfg) not in EXPORTERS:
        supported = ", ".join(sorted(settings().name for settings in EXPORTERS))
        raise UsageError(f"diffusers has no class for net.name={cfg.name}; it has classes for {supported}")
    return EXPORTERS[type(cfg)](net.state_dict(), cfg, inputs)
