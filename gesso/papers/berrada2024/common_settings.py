"""Settings and trainings that several tables share.

Equal trainings are run once, and they are equal if all of their settings are: write the same training in one way.
"""

from collections.abc import Mapping

from gesso.reproduce.schema import ColumnGroup, Measurement, Method, Settings, Training

DIGITS_METRICS = ("eval.metrics=fd_digits,class_accuracy", "eval.num_samples=1000")
DIGITS_DIVERSITY = ("eval.metrics=digits_feature_distance", "eval.diversity_prompts=300")
TINY_SHAPES_METRICS = (
    "eval.metrics=fd_shapes,shape_accuracy",
    "eval.num_samples=500",
    "sample.guidance_base_resolution=null",
)
TINY_SHAPES_FD = ("eval.metrics=fd_shapes", "eval.num_samples=500")
SMALL_SHAPES_METRICS = (
    "eval.metrics=fd_shapes,shape_accuracy",
    "eval.num_samples=5000",
    "sample.guidance_base_resolution=null",
)
CLASS_SHARE_NOTE = "CLIP: the share of samples that a classifier assigns to their class."
POSITION_SHARE_NOTE = "CLIP: the share of samples whose shapes are where the caption says."
UNGUIDED = ("sample.guidance=1", "sample.control_guidance=1")

# Tiny scale: digits, of which every second is shrunk to 4x4, with the size as control.
MIXED_RESOLUTION = (
    "data.source=digits-mixed-resolution",
    "control.variables=size",
    "train.total_images=100k",
    "train.snapshot_every=10k",
    "train.checkpoint_every=50k",
)
IMAGES_100K = ("train.total_images=100k", "train.snapshot_every=10k", "train.checkpoint_every=10k")
"""Length of the recipes digits-*; recipe digits is longer."""
TINY_SHAPES = ("data.source=shapes:5000", "train.total_images=20k")
"""Few shapes, because drawing 20,000 would take a third of the training time."""
TEXT_CONDITION = ("semantic.kind=text",)
TEXT_CAPTIONS = (
    *TEXT_CONDITION,
    "semantic.padding=noisy",
    "train.total_images=60k",
    "train.snapshot_every=6k",
    "train.checkpoint_every=30k",
)
RANDOM_FLIP = ("data.flip=true",)
FLIP_CONTROL = (*RANDOM_FLIP, "control.variables=flip")

# Small scale: shapes at 64x64, a transformer of the size of DiT-S.
DIT_S = ("net.hidden_size=384", "net.depth=12", "net.num_heads=6")
SMALL_UNET_NET = ("net.name=unet", "net.channels=128", "net.channel_mult=1,2,3", "net.transformer_depth=0,1,1")
SMALL_SCHEDULE = (
    "train.total_images=2M",
    "train.batch_size=256",
    "train.precision=bfloat16",
    "train.snapshot_every=100k",
    "train.checkpoint_every=500k",
    "optim.lr=5e-4",
    "optim.ref_images=1M",
    "optim.warmup_images=50k",
)
AT_64 = ("data.resolution=64", "process.resolution_scale=2")
SMALL_TRANSFORMER = (*AT_64, *DIT_S, *SMALL_SCHEDULE)
SMALL_UNET = (*AT_64, *SMALL_UNET_NET, *SMALL_SCHEDULE)

# Paper scale: crops of pre-training (Section 3.4), and references of metrics.
GLOBAL_CROPS, LOCAL_CROPS, MIXED_CROPS = (
    ("data.crop_scale=.9,1",),
    ("data.crop_scale=.4,.6",),
    ("data.crop_scale=.4,1",),
)
IMAGENET_VAL = ("eval.reference=/path/to/imagenet-val",)
IN22K = ("eval.reference=imagenet-22k-200k",)
CC12M_VAL = ("eval.reference=cc12m-val", "eval.prompts=cc12m-val")
COCO = ("eval.reference=val2014",)


def column_group(
    columns: Mapping[str, str],
    trainings: Mapping[str, Training],
    settings: Settings = (),
    protocol: str | None = None,
    method: Method = "metrics",
) -> ColumnGroup:
    """Return columns of rows that have one training each."""
    rows = {row: Measurement(training) for row, training in trainings.items()}
    return ColumnGroup(columns, rows, method, settings, protocol)


def sample_group(trainings: Mapping[str, Training], settings: Settings, protocol: str | None = None) -> ColumnGroup:
    """Return a column that shows eval.num_samples samples of each row as an image."""
    return column_group({"samples": "num_images"}, trainings, settings, protocol, method="sample_grid")


def total_images(images: str) -> Settings:
    """Return the setting of the length of a training."""
    return (f"train.total_images={images}",)


def mixed_resolution_training(*settings: str) -> Training:
    """Return mmDiT++ on digits of mixed resolution."""
    return Training("digits", (*MIXED_RESOLUTION, *settings))


def text_training(*settings: str) -> Training:
    """Return mmDiT++ on digits with captions of 1, 3 and 6 words in 16 tokens."""
    return Training("digits", (*TEXT_CAPTIONS, *settings))


def shapes_training(*settings: str) -> Training:
    """Return mmDiT++ on captioned shapes at the tiny scale."""
    return Training("shapes", (*TINY_SHAPES, *settings))


def shapes_training_small(*settings: str) -> Training:
    """Return mmDiT++ on captioned shapes at the small scale."""
    return Training("shapes", (*SMALL_TRANSFORMER, *settings))
