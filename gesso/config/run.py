"""Complete configuration of a run. Durations are in images."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from gesso.config.base import (
    Count,
    Edge,
    Guidance,
    PositiveCount,
    PositiveFraction,
    Probability,
    Seconds,
    Seed,
    Settings,
    SigmaRel,
    Width,
    parse_list,
    source_path,
)
from gesso.config.conditioning import ControlConfig, Dropout, SemanticConfig
from gesso.config.initialization import InitConfig
from gesso.config.monitoring import MonitorConfig
from gesso.config.net import ControlSpec, InputSpec, MMDiTConfig, NetConfig, TransformerConfig, UNetConfig
from gesso.config.process import EDMConfig, ProcessConfig
from gesso.config.sample import SampleConfig
from gesso.config.train import LossConfig, OptimConfig, TrainConfig

MAX_CLASSES = 100_000
"""Maximum number of classes."""
Resize = Literal["lanczos", "adm", "bicubic"]
"""Filter that resizes images (data/crops.py)."""


class DataConfig(Settings):
    """Training images and their preparation."""

    source: Annotated[str, AfterValidator(source_path)] = "digits"
    """digits, digits-mixed-resolution, shapes, shapes-class (shapes:5000 for 5,000 images), or a path: a folder with a
    sub-folder per class, a folder with captions, EDM2's zip, webdataset tars, parquet files, or a cache
    (docs/data.md). PATH#val is a held-out split, PATH#classes the sub-folders as classes"""
    resolution: Edge = 8
    """height and width in pixels; other images are resized on the shorter edge and centre-cropped"""
    channels: Literal[1, 3] = 3
    """number of channels: 1 grey, 3 RGB"""
    flip: bool = False
    """mirror each sample with probability 1/2; the draw is keyed to the sample"""
    crop_scale: tuple[PositiveFraction, PositiveFraction] | None = None
    """range of the area of random crops, as a share of the largest box of the output's aspect: .9,1 global, .4,.6
    local, .4,1 mix (Berrada et al. Section 3.4). null: the largest box, centred"""
    resize: Resize = "lanczos"
    """filter that resizes images: lanczos (Pillow, one pass); adm (ADM's code, with which EDM2 and DiT prepare
    ImageNet: halved by a box filter while at least twice too large, then bicubic; EXIF orientation and transparency
    ignored); bicubic (antialiased in floating point, as clean-fid). The images of a cache keep the filter it was
    written with"""
    shuffle_window_shards: PositiveCount | None = None
    """number of cache shards that are shuffled together, so that few are needed at once (object storage); null: all"""
    num_validation: Annotated[Count, Field(ge=0)] = 0
    """number of images for the validation loss, the same for every train.seed: of the split val or test if the source
    has one, else excluded from training"""
    max_unreadable: Probability = 0.01
    """maximum share of unreadable images, which are skipped and listed; above it the run stops"""
    num_images: Count | None = None
    """number of images; recorded when the source is opened"""
    num_classes: Annotated[Count, Field(ge=0, le=MAX_CLASSES)] | None = None
    """number of classes; recorded when the source is opened; 0 trains without labels"""
    class_names: tuple[str, ...] | None = None
    """names of the classes; recorded when the source is opened"""
    untrained_classes: tuple[int, ...] | None = None
    """indices of classes without images, which samples do not show by default; recorded when the source is opened;
    null: none"""
    example_captions: tuple[str, ...] | None = None
    """captions of some images, used as default prompts; recorded when the source is opened"""
    fingerprint: str | None = None
    """hash of all pixels and labels; training does not resume with different images"""
    buckets: tuple[tuple[Edge, Edge], ...] | None = None
    """height and width of each aspect-ratio bucket of a cache; recorded when it is opened; null: square images"""
    mean: tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...] | None = None
    """mean per channel of pixels in [-1, 1] or of raw latents: x0 = (raw - mean) * sigma_data / std; null: measured, or
    for latents see latent.normalization"""
    std: tuple[Annotated[float, Field(gt=1e-9, le=1e9)], ...] | None = None
    """standard deviation per channel; see data.mean"""

    @model_validator(mode="after")
    def _check_crop_scale(self) -> "DataConfig":
        if self.crop_scale and self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"data.crop_scale={self.crop_scale} falls: give the smaller share first")
        return self


class LatentConfig(Settings):
    """Latent space of a VAE in place of pixels."""

    vae: str | None = None
    """folder or hub id of a diffusers AutoencoderKL, such as stabilityai/sd-vae-ft-mse; null: train on pixels"""
    convention: Literal["dit", "edm2"] = "dit"
    """input and normalization of the VAE: dit has pixels in [-1, 1] and the VAE's scale and shift; edm2 has pixels in
    [0, 1] and a fixed mean and standard deviation per channel"""
    normalization: Literal["vae", "measured"] = "vae"
    """data.mean and data.std if not set: vae takes those of latent.convention; measured computes them from the
    latents"""
    channels: Width = 4
    """channels of a latent; checked when the VAE or the cache is opened"""
    downsample_factor: Annotated[int, Field(gt=0, le=1024)] = 8
    """pixels per latent position along each edge; checked when the VAE or the cache is opened"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """dtype of the VAE's computation"""


class EmaConfig(Settings):
    """Exponential moving averages of the weights that training tracks (EDM2 Section 3)."""

    sigma_rels: tuple[SigmaRel, ...] = (0.05, 0.10)
    """relative lengths of tracked power-function EMAs; from two of them any other length can be reconstructed"""
    halflives: tuple[PositiveCount, ...] = ()
    """half-lives of tracked traditional EMAs, in images (EDM2 CONFIG A: 50M)"""
    rampup: Annotated[float, Field(gt=0, lt=0.69)] | None = None
    """maximum half-life of traditional EMAs as a share of the images seen (ema_rampup_ratio, 0.05 in EDM's code, 0.09
    in EDM2's). null: constant half-life"""
    device: Literal["same", "cpu"] = "same"
    """memory of the EMAs: same as the weights, or cpu, to which every step then copies the weights"""
    snapshot_dtype: Literal["same", "float16"] = "same"
    """dtype of snapshot files: same as the weights, or float16 as in EDM2 (Appendix C), sufficient for lengths of 0.03
    and more. The EMAs are always tracked in the dtype of the weights, since 16 bits would round small updates to zero
    (benchmarks/ema_float16.py)"""

    @model_validator(mode="after")
    def _check_lengths(self) -> "EmaConfig":
        lengths = [*(round(s, 4) for s in self.sigma_rels), *self.halflives]
        if not lengths or len(set(lengths)) < len(lengths):
            raise ValueError(
                "ema.sigma_rels and ema.halflives need at least one length and no duplicates (to four decimals)"
            )
        return self


class EvalConfig(Settings):
    """Settings of `gesso evaluate`."""

    toy_metrics: Literal["digits", "shapes", "none"] = "none"
    """metrics without download, used if eval.metrics is empty: digits uses a small digit classifier; shapes reads drawn
    shapes and compares them with the caption or class; none writes samples and nearest training images only"""
    halflives: tuple[PositiveCount, ...] = ()
    """half-lives in images of traditional EMAs that are evaluated in addition to the one that sample.* selects"""
    num_splits: Annotated[Count, Field(ge=1, le=10_000)] = 5
    """number of random halves of the training images over which frechet_distance and its floor are averaged"""
    metrics: Annotated[tuple[str, ...], BeforeValidator(parse_list)] = ()
    """metrics of eval.num_samples samples. Inception: fid, kid, is, pr (precision, recall, density, coverage); DINOv2:
    fd_dinov2, kd_dinov2, pr_dinov2; CLIP: clip, fd_clip; lpips between samples conditioned on different sizes. Toy
    data: fd_digits, digits_feature_distance (in place of lpips), class_accuracy (digits), fd_shapes, shape_accuracy
    (shapes). loss: validation loss, without samples. Empty: eval.toy_metrics"""
    nimg: PositiveCount | None = None
    """number of images that the evaluated weights were trained on; null: the last snapshot"""
    num_samples: Annotated[Count, Field(ge=2)] = 50_000
    """number of samples"""
    diversity_prompts: Annotated[Count, Field(ge=2)] = 10_000
    """number of prompts, or of classes with noise, over which lpips is averaged, with five samples each"""
    validation_source: str | None = None
    """images of the validation loss, written as data.source; null: monitor.validation_source or data.num_validation"""
    validation_pairs: PositiveCount = 10_000
    """number of (image, noise level) pairs in metric loss; monitor.validation_pairs is for training's log"""
    num_repeats: Annotated[Count, Field(gt=0, le=1000)] = 1
    """number of evaluations with different seeds (EDM2 reports the best of three)"""
    repeated: Annotated[tuple[str, ...], BeforeValidator(parse_list)] = ()
    """metrics of eval.metrics that are repeated; the others are computed once. Empty: all"""
    reference: str | None = None
    """reference images, written as data.source; null: the training images"""
    resize: Resize | None = None
    """filter that resizes the reference images, as data.resize; null: data.resize of the run"""
    prompts: str | None = None
    """source whose captions are the prompts; null: data.source"""
    labels: Literal["round_robin", "random"] = "round_robin"
    """labels of samples: round_robin cycles through all classes; random draws them by seed"""
    weights_dir: str | None = None
    """folder with the weight files of feature networks; null: PyTorch's cache, to which they are downloaded"""
    inception: Literal["torch-fidelity", "pytorch-fid", "nvidia"] = "torch-fidelity"
    """implementation of FID's Inception: torch-fidelity (resizing of TensorFlow 1, as ADM), pytorch-fid (resizing
    between pixel centres) or nvidia (TorchScript file, as EDM2)"""
    kid_subset: Annotated[int, Field(ge=2, le=10**6)] = 1000
    """number of samples in each of the 100 subsets over which kid and kd_dinov2 are averaged"""
    lpips: Literal["alex", "vgg"] = "alex"
    """network of lpips: AlexNet or VGG16"""
    dinov2: str = "facebook/dinov2-large"
    """folder or hub id of the DINOv2 model"""
    clip: str = "openai/clip-vit-large-patch14"
    """folder or hub id of the CLIP model"""
    protocol: str | None = None
    """name of the evaluation protocol; recorded by gesso evaluate --protocol"""
    rank_timeout_s: Seconds = 3600
    """seconds that the first rank waits for the samples of the others"""
    sweep_sigma_rels: tuple[SigmaRel, ...] = (0.02, 0.035, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
    """relative EMA lengths of the quality curve of eval.toy_metrics=digits"""
    sweep_guidance: Guidance = 1.0
    """guidance scale of that curve"""
    sweep_steps: Annotated[Count, Field(gt=0, le=100_000)] = 20
    """number of sampling steps of that curve"""
    seed: Seed = 0
    """seed of random labels and of the splits of real images"""


class RunConfig(Settings):
    """Complete configuration of a run: data, network, training, sampling and evaluation."""

    recipe: str = "custom"
    """name of the recipe that the run was created from"""
    data: DataConfig = DataConfig()
    latent: LatentConfig = LatentConfig()
    net: NetConfig
    process: ProcessConfig = EDMConfig()
    semantic: SemanticConfig = SemanticConfig()
    control: ControlConfig = ControlConfig()
    dropout: Dropout = Dropout()
    init: InitConfig = InitConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    ema: EmaConfig = EmaConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()
    environment: dict[str, str | int] = {}
    """record of versions, threads and commit; it has no effect"""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        for block in ("data", "sample"):
            self._check_resolution(block, getattr(self, block).resolution)
        for name in ("pos_embed_base", "pos_embed_span"):
            pixels, unit = getattr(self.net, name, None), self.net.size_multiple * self.downsample_factor
            if pixels and pixels % unit:
                raise ValueError(f"net.{name}={pixels} is not a multiple of {unit}, the pixels of a token")
        if self.latent.vae and self.data.channels != 3:
            raise ValueError(f"data.channels={self.data.channels}, but latent.vae needs RGB: set data.channels=3")
        for name in ("mean", "std"):
            values = getattr(self.data, name)
            if values is not None and len(values) != self.x0_channels:
                block = "latent" if self.latent.vae else "data"
                raise ValueError(
                    f"data.{name} has {len(values)} values, but {block}.channels={self.x0_channels}: "
                    "give one value per channel"
                )
        if self.optim.state_dtype == "8bit" and (self.train.sharding != "ddp" or self.train.dtype != "float32"):
            raise ValueError(
                f"optim.state_dtype=8bit does not work with train.sharding={self.train.sharding}, "
                f"train.dtype={self.train.dtype}: set train.sharding=ddp train.dtype=float32, or optim.state_dtype=full"
            )
        self._check_conditions()
        self._check_guidance()
        self._check_sampler()
        self._check_monitor()
        self._check_toy_metrics()
        return self

    def _check_toy_metrics(self) -> None:
        if self.eval.toy_metrics == "shapes" and self.data.source.startswith("digits"):
            raise ValueError(
                f"eval.toy_metrics=shapes reads the drawings of data.source=shapes, not {self.data.source}: "
                "set eval.toy_metrics=none"
            )
        if self.eval.toy_metrics == "digits" and (self.data.resolution, self.data.channels) != (8, 1):
            raise ValueError(
                "eval.toy_metrics=digits reads grey 8x8 images only; set eval.toy_metrics=none for "
                f"data.resolution={self.data.resolution}, data.channels={self.data.channels}"
            )

    def _check_monitor(self) -> None:
        monitor, total = self.monitor, self.train.total_images
        if self.data.num_validation and monitor.validation_source:
            raise ValueError("data.num_validation and monitor.validation_source exclude each other: set only one")
        if (self.data.num_validation or monitor.validation_source) and (monitor.validate_every or 0) > total:
            raise ValueError(
                f"monitor.validate_every={monitor.validate_every} is above train.total_images={total}: it would "
                "never run; set it lower, or to null"
            )
        if monitor.evaluate_every and self.eval.toy_metrics == "none":
            raise ValueError(
                f"monitor.evaluate_every={monitor.evaluate_every} measures what eval.toy_metrics says, which is none "
                "(eval.metrics are for gesso evaluate): set monitor.evaluate_every=null"
            )

    def _check_resolution(self, block: str, resolution: int | None) -> None:
        net, setting, factor = self.net, f"{block}.resolution={resolution}", self.downsample_factor
        unit = net.size_multiple * factor
        if resolution and resolution % unit:
            latent = f" at latent.downsample_factor={factor}" if factor > 1 else ""
            raise ValueError(f"{setting} is not a multiple of {unit}, which net.name={net.name}{latent} needs")
        if not isinstance(net, MMDiTConfig) or not net.pos_embed_max_size:
            return
        limit, table = (
            net.patch_size * net.pos_embed_max_size * factor,
            f"net.pos_embed_max_size={net.pos_embed_max_size}",
        )
        if resolution and resolution > limit:
            raise ValueError(f"{setting} is above {limit}, the maximum of {table}")
        if block == "sample" and max(self.sample_size) > limit:
            height, width = self.sample_size
            raise ValueError(
                f"sample.aspect={self.sample.aspect} is {height}x{width}, above {limit}, the maximum of {table}"
            )

    def _check_conditions(self) -> None:
        net, kind = self.net, self.semantic.kind
        if kind == "text" and "text" not in net.accepts:
            raise ValueError(f"net.name={net.name} takes no text: set semantic.kind=label, or choose another net.name")
        if self.control.variables and "control" not in net.accepts:
            raise ValueError(f"net.name={net.name} takes no control variables: set control.variables=[]")
        shared = isinstance(net, UNetConfig) and net.pooled_mlp == "shared" and kind == "text"
        if shared and self.control.variables and self.control.mlp == "split":
            raise ValueError(
                "net.pooled_mlp=shared embeds pooled text and control variables with one MLP: "
                "set control.mlp=joint and control.schedule=uniform, or net.pooled_mlp=separate"
            )

    def _check_guidance(self) -> None:
        sample, has_semantic = self.sample, self.input_spec.num_classes or self.semantic.kind == "text"
        if sample.guidance != 1 and sample.guide_run is None and self.data.num_classes is not None and not has_semantic:
            raise ValueError(
                f"sample.guidance={sample.guidance} has nothing to guide towards, as the run has neither classes nor "
                "text: set sample.guidance=1, or a guiding network with sample.guide_run"
            )
        drops_conditions = sample.guide_run in (None, "self") and sample.guide_conditioning == "none"
        if sample.guidance != 1 and drops_conditions:
            keep = bool(self.control.variables) and sample.keep_control
            if not self.learned_without(semantic=True, control=not sample.keep_control):
                also = " and control variables" if self.control.variables and not keep else ""
                raise ValueError(
                    f"sample.guidance={sample.guidance} needs a network that also learned without label or text{also}"
                    + (", with control variables (sample.keep_control=true): " if keep else ": ")
                    + f"set dropout.{'semantic' if keep else 'both'} above 0 in training, a guiding network with "
                    + f"sample.guide_run, {'sample.keep_control=false, ' if keep else ''}or sample.guidance=1"
                )
        if sample.guided_channels and sample.guided_channels > self.x0_channels:
            raise ValueError(
                f"sample.guided_channels={sample.guided_channels} is above the {self.x0_channels} channels of x0: "
                f"set it to {self.x0_channels} or less, or to null"
            )
        controls = self.control.variables and self.learned_without(control=True)
        if sample.control_guidance != 1 and not controls:
            raise ValueError(
                f"sample.control_guidance={sample.control_guidance} needs a network that learned with and without "
                "control variables: set control.variables and dropout.control in training, or sample.control_guidance=1"
            )

    def _check_sampler(self) -> None:
        sample = self.sample
        if sample.clip and self.latent.vae:
            raise ValueError("sample.clip=true clips to the range of pixels, not of latents: set sample.clip=false")
        if sample.variance != "small" and self.process.name != "vp":
            raise ValueError(
                f"sample.variance={sample.variance} is for process.name=vp, not {self.process.name}: "
                "set sample.variance=small"
            )
        if sample.variance == "learned" and not getattr(self.net, "learned_variance", False):
            raise ValueError(
                "sample.variance=learned needs imported weights with net.learned_variance=true (dit, mdt, pixart): "
                "set sample.variance=small"
            )

    def learned_without(self, *, semantic: bool = False, control: bool = False) -> bool:
        """Return True if some training samples drop the given conditions and keep the other one if the run has it."""
        has_semantic = self.semantic.kind == "text" or (self.semantic.kind == "label" and self.data.num_classes != 0)
        has_control, dropout = bool(self.control.variables), self.dropout
        semantic, control = semantic and has_semantic, control and has_control
        if semantic and control:
            return dropout.both > 0
        if semantic:
            return dropout.semantic > 0 or (dropout.both > 0 and not has_control)
        return not control or dropout.control > 0 or (dropout.both > 0 and not has_semantic)

    @property
    def x0_channels(self) -> int:
        """Channels C of x0."""
        return self.latent.channels if self.latent.vae else self.data.channels

    @property
    def elements(self) -> int:
        """Number of elements C*H*W of a square x0 at data.resolution: the ratio of loss.reduction=sum to mean."""
        return self.x0_channels * (self.data.resolution // self.downsample_factor) ** 2

    @property
    def downsample_factor(self) -> int:
        """Pixels per position of x0 along each edge."""
        return self.latent.downsample_factor if self.latent.vae else 1

    @property
    def pos_embed_base(self) -> int | None:
        """Return net.pos_embed_base in pixels; None if it is data.resolution or the network has no such setting."""
        return self.net.pos_embed_base if isinstance(self.net, TransformerConfig) else None

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width to sample at, in pixels."""
        sample, side = self.sample, self.sample.resolution or self.data.resolution
        if sample.aspect is None:
            return side, side
        aspect = sample.aspect_value
        if self.data.buckets and sample.resolution is None:
            return min(self.data.buckets, key=lambda size: abs(math.log(size[1] / size[0] / aspect)))
        unit = self.net.size_multiple * self.downsample_factor
        height, width = (max(1, round(side * factor / unit)) * unit for factor in (aspect**-0.5, aspect**0.5))
        return height, width

    @property
    def input_spec(self) -> InputSpec:
        """Input shapes of the network. Complete only after the data and the text encoder have been opened.

        `control.step_threshold` is still a sigma; `diffusion.denoiser` converts it to progress of the process.
        """
        control, semantic, factor = self.control, self.semantic, self.downsample_factor
        text, span = semantic.kind == "text", getattr(self.net, "pos_embed_span", None)
        pooled = text and isinstance(self.net, MMDiTConfig | UNetConfig) and self.net.pooled_mlp != "none"
        return InputSpec(
            channels=self.x0_channels,
            resolution=self.data.resolution // factor,
            num_classes=(self.data.num_classes or 0) if semantic.kind == "label" else 0,
            text_dim=(semantic.embed_dim or 0) if text else 0,
            pooled_dim=(semantic.pooled_dim or 0) if pooled else 0,
            control=ControlSpec(
                num_high=len(control.column_names("high")),
                num_low=len(control.column_names("low")),
                mlp=control.mlp,
                schedule=control.schedule,
                alpha=control.alpha,
                step_threshold=control.step_sigma,
            ),
            pos_embed_base=self.pos_embed_base // factor if self.pos_embed_base else None,
            pos_embed_span=span // factor if span else None,
        )
