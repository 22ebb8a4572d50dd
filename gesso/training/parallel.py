"""The training loss as a module, with activation checkpointing, compilation and sharding applied in this order."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gesso import models
from gesso.conditioning import Cond
from gesso.config import MDTConfig, RunConfig, TrainConfig
from gesso.diffusion import denoiser as diffusion
from gesso.training.ranks import Ranks


class LossModule(nn.Module):
    """Training loss as a module, as DDP needs."""

    def __init__(self, denoiser: diffusion.Denoiser, uncertainty: diffusion.Uncertainty | None, weighting: str):
        super().__init__()
        self.denoiser, self.uncertainty, self.weighting = denoiser, uncertainty, weighting

    def forward(
        self, x0: Tensor, s: Tensor, eps: Tensor, cond: Cond, masked: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return the losses (B,).

        Args:
            x0: Images or latents (B, C, H, W).
            s: Noise levels (B,).
            eps: Noise, as x0.
            cond: Conditions.
            masked: Noise and token mask of MDT's second loss term; None for other networks.
        """

        def loss(eps: Tensor, keep: Tensor | None = None) -> Tensor:
            return diffusion.loss(
                self.denoiser, self.denoiser.process, x0, s, eps, cond, self.weighting, self.uncertainty, keep
            )

        return loss(eps) if masked is None else loss(eps) + loss(*masked)


def parallelize(loss_module: LossModule, run: RunConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """Compile, checkpoint and distribute the loss module; return the module to call.

    Parameters of `loss_module` keep their names; with FSDP they become DTensors.
    """
    cfg, net = run.train, loss_module.denoiser.net
    for block in models.list_blocks(net):
        compile_and_checkpoint_block(block, cfg)
    if ranks.world_size == 1:
        return loss_module
    if cfg.sharding == "ddp":
        # Buffers are constants that are equal on all ranks.
        constants = [name for name, _ in loss_module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss_module, constants)
        return DistributedDataParallel(loss_module, gradient_as_bucket_view=True)
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # nothing changes the view in place
    mesh = ranks.build_mesh(cfg.sharding, device)
    for block in models.list_blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    if isinstance(run.net, MDTConfig):
        register_fsdp_forward_method(net, "forward_masked")
    if loss_module.uncertainty:
        fully_shard(loss_module.uncertainty, mesh=mesh)
    return loss_module


def compile_and_checkpoint_block(block: nn.Module, cfg: TrainConfig) -> None:
    """Compile a block and checkpoint its activations by the settings.

    The compiled block is inside the checkpoint: torch silently does not compile a checkpoint.
    """
    if cfg.compile:
        # The compiler's fusion of reductions computes wrong gradients of modulations that all samples share (torch 2.10
        # to 2.13, pytorch/pytorch#193061). The variable is read when the compiler is first imported.
        os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")
        # One graph per width of a U-Net and per shape: torch's default limit of 8 would leave the rest uncompiled.
        torch._dynamo.config.recompile_limit = 256
        block.forward = torch.compile(block.forward, dynamic=False)
    if cfg.activation_checkpointing:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


@contextlib.contextmanager
def gradient_sync(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Reduce gradients over ranks only in the last of several passes."""
    if isinstance(module, DistributedDataParallel):
        with contextlib.nullcontext() if is_last else module.no_sync():
            yield
        return
    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.set_requires_gradient_sync(is_last, recurse=False)
    yield
