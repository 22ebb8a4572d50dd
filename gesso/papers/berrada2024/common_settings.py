"""Settings that tables share. Trainings are told apart by all that they say: what is to be trained once is said in one way."""

from collections.abc import Mapping

from gesso.reproduce.schema import ColumnGroup, Measurement, Method, Settings, Training

DIGITS = ("eval.metrics=fd_digits,class_accuracy", "eval.num_samples=1000")
DIGITS_DIVERSITY = ("eval.metrics=digits_feature_distance", "eval.diversity_prompts=300")
SHAPES = ("eval.metrics=fd_shapes,shape_accuracy", "eval.num_samples=500", "sample.guidance_base_resolution=null")
SHAPES_FD = ("eval.metrics=fd_shapes", "eval.num_samples=500")
SHAPES_SMALL = (
    "eval.metrics=fd_shapes,shape_accuracy",
    "eval.num_samples=5000",
    "sample.guidance_base_resolution=null",
)
UNGUIDED = ("sample.guidance=1", "sample.control_guidance=1")

# Digits of which every second was shrunk to 4x4, with the size as control.
MIXED_RESOLUTION = ("data.source=digits-mixed-resolution", "control.variables=size", "train.total_images=100k", "train.snapshot_every=10k",
          "train.checkpoint_every=50k")  # fmt: skip
IMAGES_100K = ("train.total_images=100k", "train.snapshot_every=10k", "train.checkpoint_every=10k")
"""of digits, as the recipes of all networks but the first have it"""
IMAGES_60K = ("data.source=shapes:5000", "train.total_images=20k")
"""of shapes; drawing 20,000 of them would take as long as a third of the training"""
WORDS = ("semantic.kind=text",)
WORD_CAPTIONS = (*WORDS, "semantic.padding=noisy", "train.total_images=60k", "train.snapshot_every=6k",
          "train.checkpoint_every=30k")  # fmt: skip
MIRRORED = ("data.flip=true",)
FLIP_CONTROL = (*MIRRORED, "control.variables=flip")

# Small scale: shapes at 64x64, a transformer of the size of DiT-S.
LARGE = ("net.hidden_size=384", "net.depth=12", "net.num_heads=6")
UNET = ("net.name=unet", "net.channels=128", "net.channel_mult=1,2,3", "net.transformer_depth=0,1,1")
LONG = ("train.total_images=2M", "train.batch_size=256", "train.precision=bfloat16", "train.snapshot_every=100k",
        "train.checkpoint_every=500k", "optim.lr=5e-4", "optim.ref_images=1M", "optim.warmup_images=50k")  # fmt: skip
AT_64 = ("data.resolution=64", "process.resolution_scale=2")
SMALL = (*AT_64, *LARGE, *LONG)
SMALL_UNET = (*AT_64, *UNET, *LONG)

# Paper: crops of pre-training (Section 3.4), and what numbers are taken beside.
GLOBAL, LOCAL, MIX = ("data.crop_scale=.9,1",), ("data.crop_scale=.4,.6",), ("data.crop_scale=.4,1",)
IMAGENET_VAL = ("eval.reference=/path/to/imagenet-val",)
IN22K = ("eval.reference=imagenet-22k-200k",)
CC12M_VAL = ("eval.reference=cc12m-val", "eval.prompts=cc12m-val")
COCO = ("eval.reference=val2014",)


def column_group(
    columns: Mapping[str, str],
    trained: Mapping[str, Training],
    settings: Settings = (),
    protocol: str | None = None,
    method: Method = "scores",
) -> ColumnGroup:
    """Columns of rows that have one training each."""
    return ColumnGroup(
        columns, {row: Measurement(training) for row, training in trained.items()}, method, settings, protocol
    )


def size_group(trained: Mapping[str, Training], settings: Settings, protocol: str | None = None) -> ColumnGroup:
    """Samples, eval.num_samples of each row, as a picture."""
    return column_group({"samples": "pictures"}, trained, settings, protocol, method="pictures")


def mixed_resolution_training(*said: str) -> Training:
    """mmDiT++ on the coarse digits."""
    return Training("digits", (*MIXED_RESOLUTION, *said))


def word_training(*said: str) -> Training:
    """mmDiT++ on the digits by word: captions of 1, 3 and 6 words in 16 tokens."""
    return Training("digits", (*WORD_CAPTIONS, *said))


def shapes_training(*said: str) -> Training:
    return Training("shapes", (*IMAGES_60K, *said))


def shapes_training_small(*said: str) -> Training:
    return Training("shapes", (*SMALL, *said))
