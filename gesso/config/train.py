"""Settings of training: loss, optimizer, ranks and precision. Durations are in images."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from gesso.config.base import BatchSize, Count, PositiveCount, Seconds, Seed, Settings

DecayRate = Annotated[float, Field(ge=0, lt=1)]

WEIGHTINGS = ("native", "uniform", "min-snr", "uncertainty", "uncertainty-uniform")


def _check_weighting(value: str) -> str:
    if value not in WEIGHTINGS and not value.startswith("custom:"):
        raise ValueError(f"allowed are {', '.join(WEIGHTINGS)}, and custom:NAME for a loss of gesso.extend")
    return value


class LossConfig(Settings):
    """Settings of the loss: weight of |D - x0|^2 by noise level, and reduction over elements."""

    weighting: Annotated[str, AfterValidator(_check_weighting)] = "native"
    """weight lambda(s) of |D - x0|^2: native is the MSE of the network's target; uniform is 1; min-snr is min(SNR, 5);
    uncertainty is native / e^u + u with a learned u(s) (EDM2 Eq. 21); uncertainty-uniform is 1 / e^u + u (EDM2
    Appendix B.2); custom:NAME is a loss of gesso.extend"""
    reduction: Literal["mean", "sum"] = "mean"
    """reduction over the C*H*W elements of a sample, including u(s); the batch is always averaged. sum: EDM and EDM2,
    whose optim.eps, train.loss_scale and optim.max_grad_norm are for gradients that are C*H*W times larger; mean: DiT,
    MDT, SD3, PixArt, diffusers. Logged losses are means over elements in both cases"""

    @property
    def learns_uncertainty(self) -> bool:
        """True if u(s) is trained together with the network."""
        return self.weighting.startswith("uncertainty")


class ParamGroupConfig(Settings):
    """Optimizer settings for some of the parameters."""

    match: str
    """glob of parameter names as in snapshots, such as blocks.0.* or *.bias; names of the learned uncertainty begin
    with uncertainty. The first glob that matches a name applies"""
    lr_multiplier: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """factor on the learning rate"""
    betas: tuple[DecayRate, DecayRate] | None = None
    """Adam's betas; null: optim.betas"""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """weight decay, also for biases and gains that match, never for normalized weights; null: optim.weight_decay"""


class OptimConfig(Settings):
    """Settings of Adam or AdamW and of the learning rate as a function of images seen."""

    name: Literal["adam", "adamw"] = "adam"
    """optimizer; adamw has decoupled weight decay"""
    lr: Annotated[float, Field(gt=0, le=1e6)] = 1e-3
    """peak learning rate at optim.base_batch_size"""
    base_batch_size: PositiveCount | None = None
    """batch size that optim.lr was tuned for; null: train.batch_size"""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """learning rate at k times optim.base_batch_size: none keeps lr; sqrt is sqrt(k) lr, recommended for Adam (Malladi
    et al. 2022); linear is k lr. Durations in images do not change"""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.99)
    """Adam's decay rates of the first and second moment"""
    eps: PositiveFloat = 1e-8
    """constant added to the root of Adam's second moment; its effect depends on the gradient size, see
    loss.reduction"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """weight decay of matrices and convolution kernels; normalized weights, gains and biases have none"""
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """learning rate schedule: constant; inverse_sqrt is lr / sqrt(max(nimg/ref_images, 1)) (EDM2 Eq. 67); cosine decays
    to 0 at train.total_images"""
    ref_images: PositiveCount = 10_000_000
    """images after which inverse_sqrt starts to decay: t_ref * batch size of EDM2"""
    warmup_images: Annotated[Count, Field(ge=0)] = 0
    """length of the linear warm-up, in images"""
    max_grad_norm: PositiveFloat | None = None
    """bound to which gradients are clipped, after projection onto the tangent space of normalized weights; null: no
    clipping. With loss.reduction=sum gradients are C*H*W times larger than with mean (16,384 for 64x64x4). grad_norm in
    log.jsonl is the norm before clipping"""
    state_dtype: Literal["full", "8bit"] = "full"
    """dtype of Adam's moments: full is train.dtype; 8bit stores 8 bits with a factor per 256 values (Dettmers et al.
    2022), 2 bytes per weight in place of 8; needs pip install 'gesso-diffusion[bits]'"""
    param_groups: tuple[ParamGroupConfig, ...] = ()
    """optimizer settings by parameter name, such as
    [{"match": "*.bias", "lr_multiplier": 2, "betas": [0.9, 0.95], "weight_decay": 0}]"""

    def peak_lr(self, batch_size: int, lr_scaling: str | None = None) -> float:
        """Return the peak learning rate at a batch size, with optim.lr_scaling or the given rule."""
        ratio = batch_size / (self.base_batch_size or batch_size)
        return self.lr * {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[lr_scaling or self.lr_scaling]

    @model_validator(mode="after")
    def _check_scaling(self) -> "OptimConfig":
        if self.lr_scaling != "none" and self.base_batch_size is None:
            raise ValueError(
                f"optim.lr_scaling={self.lr_scaling} needs the batch size that optim.lr was tuned for: set "
                "optim.base_batch_size, for example 2048"
            )
        decays = self.weight_decay or any(group.weight_decay for group in self.param_groups)
        if self.state_dtype == "8bit" and self.name == "adam" and decays:
            raise ValueError("optim.state_dtype=8bit has decoupled weight decay only: set optim.name=adamw")
        return self


class TrainConfig(Settings):
    """Settings of the training loop: length, batch size, intervals, precision, distribution."""

    total_images: PositiveCount = 200_000
    """length of training in images, rounded up to full batches"""
    batch_size: BatchSize = 128
    """number of images per optimizer step, over all ranks"""
    seed: Seed = 0
    """seed of initial weights, sample order, augmentation and noise"""
    log_every: PositiveCount = 2_000
    """interval of lines in log.jsonl, in images"""
    snapshot_every: PositiveCount = 20_000
    """interval of snapshots of each tracked EMA, in images"""
    checkpoint_every: PositiveCount = 20_000
    """interval of checkpoints to resume from, in images"""
    dtype: Literal["float32", "float64"] = "float32"
    """dtype of weights, EMAs and optimizer"""
    precision: Literal["full", "bfloat16", "float16"] = "full"
    """autocast precision of matrix products; full is train.dtype. Weights, norms, loss and gradients stay in
    train.dtype. CPUs compute 16 bits slowly: use full there"""
    loss_scale: PositiveFloat | Literal["dynamic"] = "dynamic"
    """loss scale for train.precision=float16: a constant factor on the loss of loss.reduction, or dynamic, which starts
    at 2^16 on the mean over elements, halves at an overflow and doubles after 2,000 finite steps. EDM2's code has 1 on
    the sum by default; the constants of its paper (Figures 16 to 22) are for the sum too. 1 is no scaling and is
    allowed with any precision"""
    tf32: bool = False
    """let GPUs round the factors of float32 products to 10 bits"""
    on_nonfinite: Literal["stop", "skip", "zero"] = "stop"
    """action at a gradient that is not finite: stop training, skip the step, or set the values to zero (EDM2). Counted
    in log.jsonl; 20 such steps in a row always stop training"""
    sharding: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """distribution over ranks (torchrun): ddp keeps all weights on each rank; fsdp shards them over all ranks; hsdp
    shards them within a node"""
    micro_batch_size: BatchSize | None = None
    """number of samples per rank in one forward pass (gradient accumulation); null: the rank's part of the batch, or as
    many as fit in the GPU's memory"""
    activation_checkpointing: bool = False
    """recompute the activations of each block in the backward pass to save memory"""
    compile: bool = False
    """apply torch.compile to each block"""
    deterministic: bool = False
    """use deterministic algorithms only, also on GPUs"""
    rank_timeout_s: Seconds = 600
    """seconds that a rank waits for the others before training stops"""
    keep_checkpoints: PositiveCount = 2
    """number of latest checkpoints to keep"""
    milestone_every: PositiveCount | None = None
    """interval of checkpoints that are never deleted, in images; null: none"""
    device: str = "auto"
    """device: auto (a GPU if available), cpu, cuda, cuda:1"""
    num_threads: Annotated[Count, Field(gt=0, le=4096)] | None = None
    """number of CPU threads; null: PyTorch's default"""

    @model_validator(mode="after")
    def _check_precision(self) -> "TrainConfig":
        if self.precision != "full" and self.dtype == "float64":
            raise ValueError(f"train.precision={self.precision} needs float32 weights: set train.dtype=float32")
        if self.precision != "float16" and self.loss_scale not in ("dynamic", 1):
            raise ValueError(
                f"train.loss_scale={self.loss_scale:g} is for train.precision=float16: set train.loss_scale=1 with "
                f"train.precision={self.precision}"
            )
        return self
