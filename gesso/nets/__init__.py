"""The networks, all with one signature: net(x, c_noise, progress, cond) -> F.

x (B, C, H, W) scaled by c_in; c_noise (B,) for the network's kind of time embedding; progress (B,), 0
clean to 1 noise; cond a Cond of the same batch. F has the shape of x.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from gesso.config import (
    EDM2,
    MDT,
    DiT,
    DiTAtt,
    EDM2Ladder,
    Inputs,
    MMDiT,
    MMDiTpp,
    MPDiT,
    MPMMDiTpp,
    Net,
    PixArt,
    UNet,
)
from gesso.nets import dit, edm2, edm2_ladder, mdt, mmdit, mp, mp_transformer, unet
from gesso.nets.dit import DiTAttNet, DiTNet, PixArtNet
from gesso.nets.edm2 import EDM2Net
from gesso.nets.edm2_ladder import EDM2LadderNet
from gesso.nets.mdt import MDTNet
from gesso.nets.mmdit import MMDiTNet, MMDiTppNet
from gesso.nets.mp_transformer import MPDiTNet, MPMMDiTppNet
from gesso.nets.unet import UNetNet

NETS: dict[type, type[nn.Module]] = {
    EDM2: EDM2Net,
    EDM2Ladder: EDM2LadderNet,
    UNet: UNetNet,
    DiT: DiTNet,
    DiTAtt: DiTAttNet,
    PixArt: PixArtNet,
    MDT: MDTNet,
    MMDiT: MMDiTNet,
    MMDiTpp: MMDiTppNet,
    MPDiT: MPDiTNet,
    MPMMDiTpp: MPMMDiTppNet,
}

BLOCKS = (
    dit.AdaBlock, dit.TokenBlock, dit.CrossBlock, dit.SingleBlock, edm2.Block, edm2_ladder.Block, mdt.Block,
    mmdit.JointBlock, mp_transformer.MPBlock, unet.Block,
)  # fmt: skip

WEIGHTED = (nn.Linear, nn.Conv2d, mp.MPWeight, edm2_ladder.FreeLayer)


def build(cfg: Net, inputs: Inputs) -> nn.Module:
    """The network that `cfg` describes, with fresh weights from torch's global generator.

    Raises ValueError when the network does not take what `inputs` promises it.
    """
    given = {
        "label": inputs.num_classes,
        "text": inputs.text_width,
        "pooled": inputs.pooled_width,
        "control": inputs.control.high + inputs.control.low,
    }
    refused = [name for name, count in given.items() if count and name not in cfg.accepts]
    if refused:
        raise ValueError(f"{cfg.name} takes no {', '.join(refused)}; it takes: {', '.join(sorted(cfg.accepts))}")
    if inputs.num_classes and inputs.text_width:
        raise ValueError("a network is conditioned on classes or on text, not on both")
    return NETS[type(cfg)](cfg, inputs)


def blocks(net: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, in order: what is compiled, computed again or sharded one by one."""
    return [module for module in net.modules() if isinstance(module, BLOCKS)]


def weighted(block: nn.Module) -> list[nn.Module]:
    """The modules in a block whose `weight` is a matrix (features in the last dimension) or a kernel (features in dimension 1)."""
    return [module for module in block.modules() if isinstance(module, WEIGHTED)]


def misfit(net: nn.Module, weights: Mapping[str, Tensor]) -> str | None:
    """What keeps `weights` from being the state of `net`: the first names that are missing, unknown or of another shape."""
    own = net.state_dict()
    wrong = {
        "missing": sorted(own.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - own.keys()),
        "of another shape": sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape),
    }
    said = [f"{len(names)} {what} ({', '.join(names[:4])})" for what, names in wrong.items() if names]
    return "; ".join(said) or None
