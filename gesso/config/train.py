"""How a run is trained: loss, optimizer, ranks, precision. Times are counted in images. No torch here."""

import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from gesso.config.base import Count, Positive, Probability, Settings


class Loss(Settings):
    """Factors on |D - x0|^2, and how elements are joined into the loss whose gradient is taken."""

    weighting: Literal["native", "uniform", "min-snr", "uncertainty", "uncertainty-uniform"] = "native"
    """native: MSE of the network's own target; uniform: 1; min-snr: min(SNR, 5); uncertainty: native / e^u + u (EDM2 Eq. 21);
    uncertainty-uniform: 1 / e^u + u, the same with lambda = 1 (Appendix B.2)"""
    reduction: Literal["mean", "sum"] = "mean"
    """over the C*H*W elements of a sample, u(s) included; the batch is averaged in both. sum: EDM and EDM2, whose optim.eps,
    train.loss_scale and optim.clip are meant for gradients of that size, C*H*W times those of the mean; mean: DiT, MDT, SD3,
    PixArt, diffusers. All losses in the log are means over elements, whichever is trained with"""

    @property
    def uncertain(self) -> bool:
        """Whether u(s) is learned beside the network."""
        return self.weighting.startswith("uncertainty")


class Group(Settings):
    """Settings of some parameters alone."""

    match: str
    """a glob of names as snapshots have them, such as blocks.0.* or *.bias; those of the learned uncertainty begin with
    uncertainty. The first glob that fits a name decides"""
    lr: PositiveFloat = 1.0
    """factor on the rate of all others"""
    betas: tuple[Probability, Probability] | None = None
    """null: those of all others"""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """null: that of all others. Biases and gains have it too where it is given; weights on the sphere never"""


class Optim(Settings):
    """Adam or AdamW, and the learning rate as a function of images seen."""

    name: Literal["adam", "adamw"] = "adam"
    lr: PositiveFloat = 1e-3
    tuned_at_batch: Positive | None = None
    """the batch that lr was found for; null: whatever train.batch_size is"""
    scaling: Literal["none", "sqrt", "linear"] = "none"
    """what lr becomes at k times that batch: lr; sqrt(k) lr, which suits Adam (Malladi et al. 2022); k lr. All else is counted
    in images and stays"""
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    """added to the root of Adam's second moment: what it is small against depends on loss.reduction"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """for matrices and kernels; weights on the sphere, gains and biases have none"""
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """inverse_sqrt: lr / sqrt(max(nimg/ref_images, 1)) (EDM2 Eq. 67); cosine: to 0 at train.total_images"""
    ref_images: Positive = 10_000_000
    """where inverse_sqrt starts to fall: t_ref * batch size"""
    warmup_images: Annotated[Count, Field(ge=0)] = 0
    """linear warm-up over the first images"""
    clip: PositiveFloat | None = None
    """largest gradient norm, after the projection onto the tangent planes, of the loss that loss.reduction says: under sum it
    is C*H*W times that under mean (16,384 for 64x64x4). grad_norm in log.jsonl is this norm, before clipping"""
    state: Literal["full", "8bit"] = "full"
    """8bit: Adam's averages in 8 bits with a factor for every 256 (Dettmers et al. 2022), 2 bytes for a weight instead of 8;
    needs bitsandbytes (pip install 'gesso[bits]')"""
    groups: tuple[Group, ...] = ()
    """rates, betas and decay of some parameters: [{"match": "*.bias", "lr": 2, "betas": [0.9, 0.95], "weight_decay": 0}]"""

    def peak(self, batch_size: int, scaling: str | None = None) -> float:
        """lr at a batch size, by the scaling of the settings or another."""
        ratio = batch_size / (self.tuned_at_batch or batch_size)
        return self.lr * {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[scaling or self.scaling]

    @model_validator(mode="after")
    def _scales(self) -> "Optim":
        if self.scaling != "none" and self.tuned_at_batch is None:
            raise ValueError(
                f"optim.scaling={self.scaling} needs the batch that optim.lr was found for: set optim.tuned_at_batch=2048"
            )
        decays = self.weight_decay or any(group.weight_decay for group in self.groups)
        if self.state == "8bit" and self.name == "adam" and decays:
            raise ValueError("optim.state=8bit decays as AdamW does: set optim.name=adamw")
        return self


class Train(Settings):
    """How long, in which portions, on what."""

    total_images: Positive = 200_000
    """rounded up to whole batches"""
    batch_size: Positive = 128
    seed: NonNegativeInt = 0
    log_images: Positive = 2_000
    """a line of log.jsonl every so many images"""
    snapshot_images: Positive = 20_000
    """a snapshot of each EMA every so many images"""
    state_images: Positive = 20_000
    """a state to resume from every so many images"""
    dtype: Literal["float32", "float64"] = "float32"
    """of weights, averages and optimizer"""
    precision: Literal["full", "bfloat16", "float16"] = "full"
    """that products are computed in (autocast); full is dtype. Weights, norms, loss and gradients stay in dtype. A processor
    computes 16 bits slowly: set full there"""
    loss_scale: PositiveFloat | Literal["dynamic"] = "dynamic"
    """of float16: a constant factor on the loss that loss.reduction says, or one that halves at an overflow and doubles after
    2,000 good steps, from 2^16 on the mean over elements. EDM2's published code has 1 by default, on the sum; the constants of
    its paper (Figures 16 to 22) belong to the sum too. 1 is no scaling, and goes with any precision"""
    tf32: bool = False
    """let GPUs round the factors of float32 products to 10 bits"""
    nonfinite: Literal["stop", "skip", "zero"] = "stop"
    """a gradient that is not finite ends the run, or the step is left out, or the bad values become 0 (EDM2); counted
    in log.jsonl, and 20 such steps in a row end the run in any case"""
    sharding: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """over several ranks (torchrun): each has all weights, or a share of them; hsdp: shared within a node only"""
    micro_batch: Positive | None = None
    """samples of a rank that go through the network at once; null: its share of the batch, or what the GPU's memory holds"""
    recompute: bool = False
    """compute activations again in backward instead of keeping them (activation checkpointing, block by block)"""
    compile: bool = False
    """torch.compile, block by block"""
    deterministic: bool = False
    """only algorithms that give the same bits each time, on a GPU too"""
    timeout: Positive = 600
    """seconds that ranks wait for one another"""
    keep_states: Positive = 2
    """the last so many states are kept"""
    milestone_images: Positive | None = None
    """and those at every so many images, for good"""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1"""
    threads: Positive | None = None
    """CPU threads; torch's own choice when not given"""

    @model_validator(mode="after")
    def _precise(self) -> "Train":
        if self.precision != "full" and self.dtype == "float64":
            raise ValueError(f"train.precision={self.precision} beside train.dtype=float64: set train.dtype=float32")
        if self.precision != "float16" and self.loss_scale not in ("dynamic", 1):
            raise ValueError(
                f"train.loss_scale={self.loss_scale:g} is for train.precision=float16: set train.loss_scale=1 with {self.precision}"
            )
        return self
