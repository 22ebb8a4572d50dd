"""The networks, all with one signature: net(x, c_noise, progress, cond) -> F.

x (B, C, H, W) scaled by c_in; c_noise (B,) for the network's kind of time embedding; progress (B,), 0
clean to 1 noise; cond a Cond of the same batch. F has the shape of x.
"""

from torch import nn

from gesso.config import EDM2, MMDiTpp, Net
from gesso.nets.edm2 import EDM2Net
from gesso.nets.mmdit import MMDiTppNet

NETS: dict[type, type[nn.Module]] = {EDM2: EDM2Net, MMDiTpp: MMDiTppNet}


def build(cfg: Net, channels: int, resolution: int, num_classes: int) -> nn.Module:
    """The network that `cfg` describes, with fresh weights from torch's global generator.

    resolution: height and width that it is trained at; num_classes 0: no class condition.
    """
    return NETS[type(cfg)](cfg, channels, resolution, num_classes)
