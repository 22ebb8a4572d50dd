"""Networks F = net(x, c_noise, progress, cond), all with the same signature.

x (B, C, H, W) is scaled by c_in; c_noise (B,) suits the network's kind of time embedding; progress (B,) is 0 at clean
and 1 at noise; cond is a Cond of the same batch. F has the shape of x.
"""

import inspect
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gesso import extensions
from gesso.config import (
    CustomNetConfig,
    DiTAttConfig,
    DiTConfig,
    EDM2Config,
    EDM2LadderConfig,
    InputSpec,
    MDTConfig,
    MMDiTConfig,
    MMDiTppConfig,
    MPDiTConfig,
    MPMMDiTppConfig,
    NetConfig,
    PixArtConfig,
    TransformerConfig,
    UNetConfig,
)
from gesso.errors import UsageError
from gesso.models import dit, edm2, edm2_ladder, mdt, mmdit, mp, mp_transformer, unet
from gesso.models.dit import DiT, DiTAtt, PixArt
from gesso.models.edm2 import EDM2
from gesso.models.edm2_ladder import EDM2Ladder
from gesso.models.mdt import MDT
from gesso.models.mmdit import MMDiT, MMDiTpp
from gesso.models.mp_transformer import MPDiT, MPMMDiTpp
from gesso.models.unet import UNet

NETWORKS: dict[type, type[nn.Module]] = {
    EDM2Config: EDM2,
    EDM2LadderConfig: EDM2Ladder,
    UNetConfig: UNet,
    DiTConfig: DiT,
    DiTAttConfig: DiTAtt,
    PixArtConfig: PixArt,
    MDTConfig: MDT,
    MMDiTConfig: MMDiT,
    MMDiTppConfig: MMDiTpp,
    MPDiTConfig: MPDiT,
    MPMMDiTppConfig: MPMMDiTpp,
}

BLOCK_TYPES = (
    dit.DiTBlock, dit.InContextBlock, dit.CrossAttnBlock, dit.PixArtBlock, edm2.Block, edm2_ladder.Block, mdt.Block,
    mmdit.JointBlock, mp_transformer.MPBlock, unet.Block,
)  # fmt: skip

WEIGHTED_TYPES = (nn.Linear, nn.Conv2d, mp.MPWeight, edm2_ladder.UnnormalizedLayer)


def build_network(cfg: NetConfig, inputs: InputSpec) -> nn.Module:
    """Return the network of the settings `net.*`; initial weights come from torch's global generator.

    Raises:
        ValueError: The network does not accept a condition of `inputs`.
    """
    conditions = {
        "label": inputs.num_classes,
        "text": inputs.text_dim,
        "pooled": inputs.pooled_dim,
        "control": inputs.control.num_high + inputs.control.num_low,
    }
    rejected = [name for name, size in conditions.items() if size and name not in cfg.accepts]
    if rejected:
        raise ValueError(f"{cfg.name} takes no {', '.join(rejected)}; it takes: {', '.join(sorted(cfg.accepts))}")
    if inputs.num_classes and inputs.text_dim:
        raise ValueError("a network takes classes or text, not both")
    if isinstance(cfg, CustomNetConfig):
        return _build_custom_network(cfg, inputs)
    _check_memory(cfg, inputs)
    return NETWORKS[type(cfg)](cfg, inputs)


def _check_memory(cfg: TransformerConfig | EDM2Config | EDM2LadderConfig | UNetConfig, inputs: InputSpec) -> None:
    """Raise UsageError if the largest layers alone exceed the memory of the machine, before anything is allocated."""
    if torch.get_default_device().type == "meta":
        return
    if isinstance(cfg, TransformerConfig):
        count = cfg.hidden_size * (4 * cfg.hidden_size * cfg.depth + inputs.num_classes)
    else:
        widths = [cfg.channels * multiplier for multiplier in cfg.channel_mult]
        count = 18 * cfg.num_blocks * sum(width**2 for width in widths)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * count > memory:
        raise UsageError(
            f"a network with these settings net.* has more than {count:.2g} weights, which do not fit into the "
            f"{memory / 2**30:.0f} GiB of this machine: set a smaller width, depth or number of classes"
        )


def _build_custom_network(cfg: CustomNetConfig, inputs: InputSpec) -> nn.Module:
    """Return a network of gesso.extend. Raises UsageError if it is not loaded or takes other options."""
    if cfg.network not in extensions.NETWORKS:
        raise extensions.missing("net.network", cfg.network, extensions.NETWORKS)
    build, options = extensions.NETWORKS[cfg.network], dict(cfg.options)
    try:
        inspect.signature(build).bind(inputs, **options)
    except TypeError as error:
        raise UsageError(f"net.options={options} do not fit net.network={cfg.network}: {error}") from None
    net = build(inputs, **options)
    if not isinstance(net, nn.Module):
        raise UsageError(f"net.network={cfg.network} returned {type(net).__name__}, not a torch.nn.Module")
    return net


def list_blocks(net: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network in order: the units of compilation, activation checkpointing and sharding.

    A network of the user names the classes of its blocks in an attribute `block_types`.
    """
    types = (*BLOCK_TYPES, *getattr(net, "block_types", ()))
    return [module for module in net.modules() if isinstance(module, types)]


def weighted_layers(block: nn.Module) -> list[nn.Module]:
    """Return the modules of a block whose `weight` is a matrix (..., features) or a kernel (c_out, features, k, k)."""
    return [module for module in block.modules() if isinstance(module, WEIGHTED_TYPES)]


def state_dict_mismatch(net: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """Return why `weights` cannot be the state of `net` (missing, unknown or misshaped names), or None if they can."""
    state = net.state_dict()
    wrong = {
        "missing": sorted(state.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - state.keys()),
        "of another shape": sorted(k for k in state.keys() & weights.keys() if state[k].shape != weights[k].shape),
    }
    parts = [f"{len(names)} {problem} ({', '.join(names[:4])})" for problem, names in wrong.items() if names]
    return "; ".join(parts) or None
