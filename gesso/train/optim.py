"""Adam and AdamW with the learning rate as a function of images seen."""

import math

import torch
from torch import Tensor, nn

from gesso.config import Optim, Train
from gesso.nets import mp


def learning_rate(optim: Optim, train: Train, nimg: int) -> float:
    """The rate of the step that starts at nimg images. With warm-up the first step has rate 0, as EDM2's."""
    rate = optim.lr
    if optim.schedule == "inverse_sqrt":
        rate /= math.sqrt(max(nimg / optim.ref_images, 1))  # EDM2 Eq. 67
    elif optim.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(nimg / train.total_images, 1)))
    if optim.warmup_images:
        rate *= min(nimg / optim.warmup_images, 1)
    return rate


def build(optim: Optim, modules: nn.ModuleDict) -> torch.optim.Optimizer:
    """The optimizer with its state made at once, so that a stored state can be read into it.

    Decay goes to matrices and kernels; weights on the sphere, gains, biases and norms have none.
    """
    on_sphere = {id(w) for w in mp.sphere_weights(modules)}
    decayed, free = [], []
    for parameter in modules.parameters():
        (decayed if parameter.ndim > 1 and id(parameter) not in on_sphere else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": free, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    made = kind([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    for parameter in modules.parameters():
        made.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return made


def named_state(optimizer: torch.optim.Optimizer, modules: nn.ModuleDict) -> dict[str, Tensor]:
    """The optimizer's tensors under the names of their parameters."""
    return {
        f"{name}.{key}": value
        for name, parameter in modules.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
