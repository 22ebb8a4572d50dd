"""Adam and AdamW, in 32 or 8 bits, with parameter groups and a learning rate that depends on images seen."""

import difflib
import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gesso import models
from gesso.config import OptimConfig, ParamGroupConfig, RunConfig, TrainConfig
from gesso.diffusion import denoiser as diffusion
from gesso.diffusion import process as processes
from gesso.errors import UsageError, install_command
from gesso.models import mp


def learning_rate(config: OptimConfig, train: TrainConfig, nimg: int) -> float:
    """Return the learning rate of the step at nimg images. With warm-up, the first step has rate 0, as in EDM2."""
    rate = config.peak_lr(train.batch_size)
    if config.schedule == "inverse_sqrt":
        rate /= math.sqrt(max(nimg / config.ref_images, 1))  # EDM2 Eq. 67
    elif config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(nimg / train.total_images, 1)))
    if config.warmup_images:
        rate *= min(nimg / config.warmup_images, 1)
    return rate


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times the multiplier of the group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


def build_optimizer(config: OptimConfig, modules: nn.ModuleDict) -> torch.optim.Optimizer:
    """Return the optimizer with initialized state, so that a stored state can be loaded into it.

    Weight decay applies to matrices and kernels, but not to normalized weights, gains, biases and norms, unless
    optim.param_groups overrides this.

    Raises:
        UsageError: A group of optim.param_groups has no effect, or bitsandbytes is missing.
    """
    groups = param_groups(config, modules)
    if config.state_dtype == "8bit":
        return adamw_8bit(config, groups)
    optimizer_class = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    optimizer = optimizer_class(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    for parameter in modules.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def adamw_8bit(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW with 8-bit state for every tensor of 4,096 values or more."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UsageError(
            f"optim.state_dtype=8bit needs bitsandbytes: {install_command('bits')}, or set optim.state_dtype=full"
        ) from None

    class ResumableAdamW8bit(AdamW8bit):
        """AdamW8bit with the step count as a tensor, which is stored and loaded like the rest of its state."""

        def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
            """Update one parameter."""
            state = self.state[p]
            state["step"] = int(state["count"])
            super().update_step(group, p, gindex, pindex)
            state["count"] += 1

    optimizer = ResumableAdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, i, j)
            optimizer.state[parameter]["count"] = torch.zeros(())
    return optimizer


def check_optimizer_config(run: RunConfig) -> None:
    """Raise UsageError for optimizer settings that do not fit the network. The data set must be open."""
    if run.optim.param_groups:
        process = processes.build_process(run.process)
        with torch.device("meta"):
            modules = nn.ModuleDict({"net": models.build_network(run.net, run.input_spec)})
            if uncertainty := diffusion.build_uncertainty(run, process):
                modules["uncertainty"] = uncertainty
        param_groups(run.optim, modules)
    if run.optim.state_dtype == "8bit":
        adamw_8bit(run.optim, [{"params": [nn.Parameter(torch.zeros(1))]}])


def param_groups(config: OptimConfig, modules: nn.ModuleDict) -> list[dict[str, Any]]:
    """Return groups of parameters with equal settings; parameters of no configured group come first.

    The first configured group whose pattern matches applies to a parameter.

    Raises:
        UsageError: A configured group has no effect.
    """
    sphere_ids = {id(weight) for weight in mp.sphere_weights(modules)}
    groups: dict[tuple, list[nn.Parameter]] = {}
    matched: dict[ParamGroupConfig, list[bool]] = {group: [] for group in config.param_groups}
    parameters = {name.removeprefix("net."): parameter for name, parameter in modules.named_parameters()}
    for name, parameter in parameters.items():
        on_sphere = id(parameter) in sphere_ids
        group = next((g for g in config.param_groups if fnmatchcase(name, g.match)), None)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        lr_multiplier, betas = 1.0, config.betas
        if group:
            matched[group].append(on_sphere)
            lr_multiplier, betas = group.lr_multiplier, group.betas or betas
            decay = decay if group.weight_decay is None else group.weight_decay
        key = (group is not None, lr_multiplier, betas, 0.0 if on_sphere else decay)
        groups.setdefault(key, []).append(parameter)
    for group, on_sphere_flags in matched.items():
        _check_group(group, on_sphere_flags, list(parameters))
    return [
        {"params": groups[key], "lr_multiplier": key[1], "betas": key[2], "weight_decay": key[3]}
        for key in sorted(groups, key=lambda key: key[0])
    ]


def _check_group(group: ParamGroupConfig, on_sphere: list[bool], names: list[str]) -> None:
    """Raise UsageError if a group has no effect.

    Args:
        group: The configured group.
        on_sphere: For each of its parameters, True if it is normalized.
        names: Names of all parameters.
    """
    prefix = f"optim.param_groups: match={group.match}"
    if not on_sphere:
        if any(fnmatchcase(name, group.match) for name in names):
            raise UsageError(f"{prefix} has no effect: earlier groups match all its parameters; put it before them")
        raise UsageError(f"{prefix} matches no parameter of this network; {suggest_names(group.match, names)}")
    if group.weight_decay and all(on_sphere):
        raise UsageError(
            f"{prefix}, weight_decay={group.weight_decay:g}: all its weights are normalized, and have no weight decay; "
            "remove weight_decay"
        )


def suggest_names(glob: str, names: list[str]) -> str:
    """Return a question that suggests parameter names similar to a glob."""
    similar = difflib.get_close_matches(glob.strip("*.?"), names, n=3, cutoff=0.4) or names[:3]
    return f"did you mean {' or '.join(similar)}?"


def named_optimizer_state(optimizer: torch.optim.Optimizer, modules: nn.ModuleDict) -> dict[str, Tensor]:
    """Return the optimizer's tensors by parameter name, without the constant table of 8-bit values."""
    return {
        f"{name}.{key}": value
        for name, parameter in modules.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and not key.startswith("qmap")
    }
