"""The complete description of a run. Times are counted in images. No torch here."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, model_validator

from gesso.config.base import Count, Positive, Probability, Settings, Share, SigmaRel, parse_words
from gesso.config.condition import Controls, Dropout, Semantic, joint_dropout
from gesso.config.init import Init
from gesso.config.net import Control, Inputs, MMDiT, Net, Transformer, UNet
from gesso.config.process import EDM, Process
from gesso.config.sample import Sample
from gesso.config.train import Loss, Optim, Train
from gesso.config.watch import Watch

Resize = Literal["lanczos", "adm", "bicubic"]
"""how a picture becomes smaller or larger (data/crops.py)"""


class Data(Settings):
    """Which images, and how they become x0."""

    source: str = "digits"
    """digits, digits-coarse, shapes, shapes-class (shapes:5000 for as many), or a path: a folder whose sub-folders are the
    classes, a folder with captions, EDM2's zip, webdataset tars, parquet files (data/sources.py)"""
    resolution: Positive = 8
    """height and width in pixels; larger or oblong images are resized on the shorter edge and centre-cropped"""
    channels: Literal[1, 3] = 3
    """1 grey, 3 RGB"""
    flip: bool = False
    """mirror half of the samples, keyed to the sample"""
    crop_scale: tuple[Share, Share] | None = None
    """null: the largest box of the output's aspect, in the middle; else a box of its own for each sample, at
    random, whose area is a share of that one in this range: .9,1 global, .4,.6 local, .4,1 mix (Berrada et al. Section 3.4)"""
    resize: Resize = "lanczos"
    """lanczos: Pillow's Lanczos filter, once; adm: the pixels of ADM's code, which EDM2 and DiT prepare ImageNet with: halved by a
    box filter while twice too large, then bicubic, EXIF orientation and transparency ignored; bicubic: antialiased, in floating
    point, as clean-fid's. What a cache holds is settled when it is written"""
    window: Positive | None = None
    """files of a cache whose images are shuffled together, so that few are needed at a time (object storage); null: all"""
    held_out: Annotated[Count, Field(ge=0)] = 0
    """images kept from training for the validation loss (watch), the same ones whatever train.seed"""
    max_unreadable: Probability = 0.01
    """share of unreadable images that are skipped and named before the run is refused"""
    num_images: Count | None = None
    """counted when the source is opened"""
    num_classes: Annotated[Count, Field(ge=0)] | None = None
    """counted when the source is opened; 0 trains without labels"""
    class_names: tuple[str, ...] | None = None
    """read when the source is opened"""
    examples: tuple[str, ...] | None = None
    """some of its captions, read when the source is opened: prompts for samples where the user names none"""
    fingerprint: str | None = None
    """of all pixels and labels, so that a run is never resumed on other images"""
    buckets: tuple[tuple[Positive, Positive], ...] | None = None
    """height and width of the pictures of a cache with aspect-ratio buckets, read when it is opened; null: squares"""
    mean: tuple[float, ...] | None = None
    """per channel, of pixels in [-1, 1] or of raw latents: x0 = (raw - mean) * sd / std; measured when not given"""
    std: tuple[PositiveFloat, ...] | None = None
    """as mean; of latents both are the VAE's own where latent.constants says so"""

    @model_validator(mode="after")
    def _rises(self) -> "Data":
        if self.crop_scale and self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"data.crop_scale={self.crop_scale} falls")
        return self


class Latent(Settings):
    """Latents in the place of pixels: which VAE made them, and how they become x0 (data/vae.py)."""

    vae: str | None = None
    """null: x0 is pixels. Else a folder or hub id of a diffusers AutoencoderKL, such as stabilityai/sd-vae-ft-mse"""
    convention: Literal["dit", "edm2"] = "dit"
    """dit: pixels in [-1, 1] go in, scale and shift are the VAE's; edm2: pixels in [0, 1], fixed mean and std per channel"""
    constants: Literal["vae", "measured"] = "vae"
    """data.mean and std where not given: those of the convention, or measured on the latents"""
    channels: Positive = 4
    """of a latent; checked when the VAE or the cache is opened"""
    factor: Positive = 8
    """pixels per latent, along either edge; checked as channels"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """that the VAE computes in"""


class Ema(Settings):
    """Averages of the weights tracked in training (EDM2 Section 3)."""

    sigma_rels: tuple[SigmaRel, ...] = (0.05, 0.10)
    """relative lengths of power-function averages; two allow any other to be rebuilt afterwards"""
    halflives: tuple[Positive, ...] = ()
    """images; a traditional average of fixed half-life each; CONFIG A has 50M"""
    rampup: Annotated[float, Field(gt=0, lt=0.69)] | None = None
    """of traditional averages: the half-life is at most this share of the images seen (EDM's ema_rampup_ratio, .05 there; .09 in
    EDM2's code). null: the same half-life from the first image on"""
    device: Literal["same", "cpu"] = "same"
    """where they are kept: beside the weights, or in the host's memory, to which every step then copies the weights"""
    snapshots: Literal["same", "float16"] = "same"
    """of the files: as wide as the weights, or in 16 bits as EDM2's (Appendix C), which serve lengths of .03 and more. The
    averages themselves are never narrowed: steps that small would be rounded away (benchmarks/averages16.py)"""

    @model_validator(mode="after")
    def _some(self) -> "Ema":
        lengths = [*(round(s, 4) for s in self.sigma_rels), *self.halflives]
        if not lengths or len(set(lengths)) < len(lengths):
            raise ValueError("sigma_rels and halflives need at least one length, each once (to four decimals)")
        return self


Score = Literal[
    "fid", "kid", "is", "pr", "fd_dinov2", "kd_dinov2", "pr_dinov2", "clip", "lpips", "fd_digits", "told_digits",
    "fd_shapes", "fd_clip", "agreement", "drawn", "loss",
]  # fmt: skip


class Eval(Settings):
    """What `gesso evaluate` measures."""

    features: Literal["digits", "shapes", "none"] = "none"
    """digits: the small classifier shipped with gesso; shapes: what is drawn is read back and compared with the caption
    or class; none: pictures and nearest training images only"""
    halflives: tuple[Positive, ...] = ()
    """images; scores are taken once more of the average of each half-life, beside that which sample.* names"""
    splits: Annotated[Count, Field(ge=1)] = 5
    """random halves of the real images; scores and the floor are taken on each, at equal counts"""
    scores: Annotated[tuple[Score, ...], BeforeValidator(parse_words)] = ()
    """of `images` samples, beside `reference` or alone. Inception: fid,kid,is,pr (precision, recall, density, coverage);
    DINOv2: fd_dinov2,kd_dinov2,pr_dinov2; CLIP: clip,fd_clip; lpips between samples told different sizes. Shipped: fd_digits, told_digits (in
    the place of lpips) and agreement of digits, fd_shapes and drawn (read back) of shapes. loss: on images not trained on, no samples. Empty: what `features` says"""
    nimg: Positive | None = None
    """images that the weights had seen which scores are taken of; null: all of the training"""
    images: Annotated[Count, Field(ge=2)] = 50_000
    """samples that scores are taken over"""
    diversity_seeds: Annotated[Count, Field(ge=2)] = 10_000
    """prompts, or classes with noise, that lpips is averaged over, five samples each"""
    validation: str | None = None
    """images that loss is taken on, as data.source; null: watch.source, or those of data.held_out"""
    loss_pairs: Positive = 10_000
    """of an image and a noise level, images in turn, that loss is taken over; watch.validate_samples for the log's own"""
    repeats: Positive = 1
    """times, with other seeds; EDM2 reports the best of three"""
    repeated: Annotated[tuple[Score, ...], BeforeValidator(parse_words)] = ()
    """scores that are repeated, of those in `scores`; the others are measured once. Empty: all"""
    reference: str | None = None
    """pictures to compare with, as data.source; null: those that the run was trained on"""
    resize: Resize | None = None
    """filter that resizes the reference, as data.resize; null: that of the training images"""
    prompts: str | None = None
    """whose captions samples are drawn for; null: those of data.source"""
    labels: Literal["turn", "random"] = "turn"
    """of samples: all classes in turn, or drawn by seed"""
    weights: str | None = None
    """folder of the feature networks' public files; null: torch's cache, where they are fetched to"""
    inception: Literal["torch-fidelity", "pytorch-fid", "nvidia"] = "torch-fidelity"
    """whose implementation: resized as TensorFlow 1, as ADM measured; between pixel centres; or the TorchScript, as EDM2 measured"""
    kid_subset: Annotated[int, Field(ge=2)] = 1000
    """samples of each of the 100 subsets that kid and kd_dinov2 average over"""
    lpips: Literal["alex", "vgg"] = "alex"
    """the network of lpips: AlexNet or VGG16"""
    dinov2: str = "facebook/dinov2-large"
    """folder or hub id"""
    clip: str = "openai/clip-vit-large-patch14"
    """folder or hub id"""
    protocol: str | None = None
    """whose way of measuring this is, for the record"""
    patience: Positive = 3600
    """seconds that the first rank waits for the samples of the others"""
    sweep: tuple[SigmaRel, ...] = (0.02, 0.035, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25)
    """EMA lengths for the curve of quality against length"""
    sweep_guidance: float = 1.0
    sweep_steps: Positive = 20
    seed: NonNegativeInt = 0


class Run(Settings):
    """Everything that a run depends on."""

    recipe: str = "custom"
    """the recipe that this run was made from"""
    data: Data = Data()
    latent: Latent = Latent()
    net: Net
    process: Process = EDM()
    semantic: Semantic = Semantic()
    control: Controls = Controls()
    dropout: Dropout = Dropout()
    init: Init = Init()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    ema: Ema = Ema()
    sample: Sample = Sample()
    eval: Eval = Eval()
    watch: Watch = Watch()
    made_with: dict[str, str | int] = {}
    """a record of versions, threads and commit; it decides nothing"""

    @model_validator(mode="before")
    @classmethod
    def _older(cls, tree: Any) -> Any:
        return joint_dropout(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _fits(self) -> "Run":
        for block in ("data", "sample"):
            self._size(block, getattr(self, block).resolution)
        for name in ("positions_at", "positions_span"):
            pixels, unit = getattr(self.net, name, None), self.net.multiple * self.factor
            if pixels and pixels % unit:
                raise ValueError(f"net.{name}={pixels} is not a multiple of {unit}, pixels of a token")
        if self.latent.vae and self.data.channels != 3:
            raise ValueError(f"data.channels={self.data.channels}, but latent.vae sees RGB: set data.channels=3")
        self._conditions()
        self._guidance()
        self._watched()
        if self.optim.state == "8bit" and (self.train.sharding != "ddp" or self.train.dtype != "float32"):
            raise ValueError(
                f"optim.state=8bit is for whole tensors of 32 bits, not train.sharding={self.train.sharding}, "
                f"train.dtype={self.train.dtype}: set train.sharding=ddp train.dtype=float32, or optim.state=full"
            )
        if self.eval.features == "shapes" and self.data.source.startswith("digits"):
            raise ValueError(
                f"eval.features=shapes reads the drawings of data.source=shapes, not {self.data.source}: set eval.features=none"
            )
        if self.eval.features == "digits" and (self.data.resolution, self.data.channels) != (8, 1):
            raise ValueError(
                "eval.features=digits reads grey 8x8 images only; set eval.features=none for "
                f"data.resolution={self.data.resolution}, data.channels={self.data.channels}"
            )
        for name in ("mean", "std"):
            given = getattr(self.data, name)
            if given is not None and len(given) != self.channels:
                block = "latent" if self.latent.vae else "data"
                raise ValueError(f"data.{name} has {len(given)} values for {block}.channels={self.channels}")
        return self

    def _watched(self) -> None:
        watch, total = self.watch, self.train.total_images
        if self.data.held_out and watch.source:
            raise ValueError("data.held_out beside watch.source: validate on the one or the other")
        if (self.data.held_out or watch.source) and (watch.validate_images or 0) > total:
            raise ValueError(
                f"watch.validate_images={watch.validate_images} is above train.total_images={total}: nothing would be "
                "validated; set it lower, or to null"
            )
        if watch.evaluate_images and self.eval.features == "none":
            raise ValueError(
                f"watch.evaluate_images={watch.evaluate_images} measures what eval.features says, which is none (eval.scores are "
                "for gesso evaluate): set it to null"
            )

    def _size(self, block: str, resolution: int | None) -> None:
        net, said, factor = self.net, f"{block}.resolution={resolution}", self.factor
        needs = f"net.name={net.name}" + (f" at latent.factor={factor}" if factor > 1 else "")
        if resolution and resolution % (net.multiple * factor):
            raise ValueError(f"{said} is not a multiple of {net.multiple * factor}, which {needs} needs")
        most = isinstance(net, MMDiT) and net.max_grid and net.patch * net.max_grid * factor
        if resolution and most and resolution > most:
            raise ValueError(f"{said} is above the {most} that net.max_grid={net.max_grid} covers")
        if block == "sample" and most and max(self.canvas) > most:
            height, width = self.canvas
            raise ValueError(
                f"sample.aspect={self.sample.aspect} is {height}x{width}, above the {most} that net.max_grid={net.max_grid} covers"
            )

    def _conditions(self) -> None:
        net, kind = self.net, self.semantic.kind
        if kind == "text" and "text" not in net.accepts:
            raise ValueError(f"net.name={net.name} takes no text: set semantic.kind=label, or choose another net.name")
        if self.control.variables and "control" not in net.accepts:
            raise ValueError(f"net.name={net.name} takes no control variables: set control.variables=[]")
        shared = isinstance(net, UNet) and net.pooled_mlp == "shared" and kind == "text"
        if shared and self.control.variables and self.control.mlp == "split":
            raise ValueError(
                "net.pooled_mlp=shared puts the control variables into the pooled text's one MLP: "
                "set control.mlp=joint and control.schedule=uniform, or net.pooled_mlp=own"
            )

    def _guidance(self) -> None:
        sample, told = self.sample, self.inputs.num_classes or self.semantic.kind == "text"
        if sample.guidance != 1 and sample.guide is None and self.data.num_classes is not None and not told:
            raise ValueError(
                f"sample.guidance={sample.guidance} has nothing to guide towards, as the run has neither classes nor text: "
                "set sample.guidance=1, or name another network by sample.guide"
            )
        withheld = sample.guidance != 1 and sample.guide in (None, "self") and sample.guide_sees == "nothing"
        if withheld and not self.learned_without(semantic=True, control=not sample.keep_control):
            keeps = bool(self.control.variables) and sample.keep_control
            also = " and control variables" if self.control.variables and not keeps else ""
            raise ValueError(
                f"sample.guidance={sample.guidance} needs a network that also learned without label or text{also}"
                + (", with control variables (sample.keep_control=true): " if keeps else ": ")
                + f"set dropout.{'semantic' if keeps else 'both'} above 0 in training, name another network by "
                + f"sample.guide, {'set sample.keep_control=false, ' if keeps else ''}or set sample.guidance=1"
            )
        if sample.guided_channels and sample.guided_channels > self.channels:
            raise ValueError(
                f"sample.guided_channels={sample.guided_channels} is above the {self.channels} channels of x0: set it to "
                f"{self.channels} or less, or to null"
            )
        if sample.clip and self.latent.vae:
            raise ValueError(
                "sample.clip=true clips to the range of pixels, which latents do not have: set sample.clip=false"
            )
        if sample.variance != "small" and self.process.name != "vp":
            raise ValueError(
                f"sample.variance={sample.variance} is that of DDPM's steps, which process.name={self.process.name} does not "
                "have: set sample.variance=small"
            )
        if sample.variance == "learned" and not getattr(self.net, "learned_variance", False):
            raise ValueError(
                "sample.variance=learned needs a network that estimates it: import one with net.learned_variance=true (dit, mdt, "
                "pixart), or set sample.variance=small"
            )
        controls = self.control.variables and self.learned_without(control=True)
        if sample.control_guidance != 1 and not controls:
            raise ValueError(
                f"sample.control_guidance={sample.control_guidance} needs a network that learned with and without control "
                "variables: set control.variables and dropout.control in training, or sample.control_guidance=1"
            )

    def learned_without(self, *, semantic: bool = False, control: bool = False) -> bool:
        """Return whether training withholds these conditions, and shows the other where the run has it, in some samples."""
        has_semantic = self.semantic.kind == "text" or (self.semantic.kind == "label" and self.data.num_classes != 0)
        has_control, d = bool(self.control.variables), self.dropout
        semantic, control = semantic and has_semantic, control and has_control
        if semantic and control:
            return d.both > 0
        if semantic:
            return d.semantic > 0 or (d.both > 0 and not has_control)
        return not control or d.control > 0 or (d.both > 0 and not has_semantic)

    @property
    def channels(self) -> int:
        """C of x0."""
        return self.latent.channels if self.latent.vae else self.data.channels

    @property
    def elements(self) -> int:
        """C*H*W of x0 at data.resolution, square: how many times a sum over elements is their mean."""
        return self.channels * (self.data.resolution // self.factor) ** 2

    @property
    def factor(self) -> int:
        """Pixels per position of x0, along either edge."""
        return self.latent.factor if self.latent.vae else 1

    @property
    def positions_at(self) -> int | None:
        """net.positions_at; None where that is data.resolution, or where the network has no such setting."""
        return self.net.positions_at if isinstance(self.net, Transformer) else None

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width to sample at, in pixels."""
        cfg, wide = self.sample, self.sample.ratio
        side = cfg.resolution or self.data.resolution
        if cfg.aspect is None:
            return side, side
        if self.data.buckets and cfg.resolution is None:
            return min(self.data.buckets, key=lambda size: abs(math.log(size[1] / size[0] / wide)))
        unit = self.net.multiple * self.factor
        height, width = (max(1, round(side * k / unit)) * unit for k in (wide**-0.5, wide**0.5))
        return height, width

    @property
    def inputs(self) -> Inputs:
        """What the network is built for. Needs what opening the data and the text encoder fills in.

        `control.edge` is still a sigma; `diffusion.denoiser.build` makes it a progress, which needs the process.
        """
        c, semantic, span = self.control, self.semantic, getattr(self.net, "positions_span", None)
        text = semantic.kind == "text"
        pooled = "pooled" in self.net.accepts and self.net.pooled_mlp != "none"
        control = Control(len(c.columns("high")), len(c.columns("low")), c.mlp, c.schedule, c.alpha, c.edge)
        return Inputs(
            channels=self.channels,
            resolution=self.data.resolution // self.factor,
            num_classes=(self.data.num_classes or 0) if semantic.kind == "label" else 0,
            text_width=(semantic.width or 0) if text else 0,
            pooled_width=(semantic.pooled_width or 0) if text and pooled else 0,
            control=control,
            positions_at=self.positions_at // self.factor if self.positions_at else None,
            positions_span=span // self.factor if span else None,
        )
