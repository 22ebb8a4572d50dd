"""Settings that tables share. Trainings are told apart by all that they say: what is to be trained once is said in one way."""

from collections.abc import Mapping

from gesso.tables.table import By, How, Part, Settings, Training

DIGITS = ("eval.scores=fd_digits,agreement", "eval.images=1000")
TOLD = ("eval.scores=told_digits", "eval.diversity_seeds=300")
SHAPES = ("eval.scores=fd_shapes,drawn", "eval.images=500", "sample.tuned_at=null")
SHAPES_FD = ("eval.scores=fd_shapes", "eval.images=500")
SHAPES_SMALL = ("eval.scores=fd_shapes,drawn", "eval.images=5000", "sample.tuned_at=null")
UNGUIDED = ("sample.guidance=1", "sample.control_guidance=1")

# Digits of which every second was shrunk to 4x4, with the size as control.
COARSE = ("data.source=digits-coarse", "control.variables=size", "train.total_images=100k", "train.snapshot_images=10k",
          "train.state_images=50k")  # fmt: skip
HUNDRED = ("train.total_images=100k", "train.snapshot_images=10k", "train.state_images=10k")
"""of digits, as the recipes of all networks but the first have it"""
SHORT = ("data.source=shapes:5000", "train.total_images=20k")
"""of shapes; drawing 20,000 of them would take as long as a third of the training"""
WORDS = ("semantic.kind=text",)
WORDED = (*WORDS, "semantic.padding=noisy", "train.total_images=60k", "train.snapshot_images=6k",
          "train.state_images=30k")  # fmt: skip
MIRRORED = ("data.flip=true",)
TOLD_FLIPS = (*MIRRORED, "control.variables=flip")

# Small scale: shapes at 64x64, a transformer of the size of DiT-S.
LARGE = ("net.width=384", "net.depth=12", "net.heads=6")
UNET = ("net.name=unet", "net.channels=128", "net.multipliers=1,2,3", "net.transformer_depth=0,1,1")
LONG = ("train.total_images=2M", "train.batch_size=256", "train.precision=bfloat16", "train.snapshot_images=100k",
        "train.state_images=500k", "optim.lr=5e-4", "optim.ref_images=1M", "optim.warmup_images=50k")  # fmt: skip
AT_64 = ("data.resolution=64", "process.scale=2")
SMALL = (*AT_64, *LARGE, *LONG)
SMALL_UNET = (*AT_64, *UNET, *LONG)

# Paper: crops of pre-training (Section 3.4), and what numbers are taken beside.
GLOBAL, LOCAL, MIX = ("data.crop_scale=.9,1",), ("data.crop_scale=.4,.6",), ("data.crop_scale=.4,1",)
IMAGENET_VAL = ("eval.reference=/path/to/imagenet-val",)
IN22K = ("eval.reference=imagenet-22k-200k",)
CC12M_VAL = ("eval.reference=cc12m-val", "eval.prompts=cc12m-val")
COCO = ("eval.reference=val2014",)


def part(
    columns: Mapping[str, str],
    trained: Mapping[str, Training],
    measure: Settings = (),
    protocol: str | None = None,
    by: By = "scores",
) -> Part:
    """Columns of rows that have one training each."""
    return Part(columns, {row: How(training) for row, training in trained.items()}, by, measure, protocol)


def shown(trained: Mapping[str, Training], measure: Settings, protocol: str | None = None) -> Part:
    """Samples, eval.images of each row, as a picture."""
    return part({"samples": "pictures"}, trained, measure, protocol, by="pictures")


def coarse(*said: str) -> Training:
    """mmDiT++ on the coarse digits."""
    return Training("digits", (*COARSE, *said))


def words(*said: str) -> Training:
    """mmDiT++ on the digits by word: captions of 1, 3 and 6 words in 16 tokens."""
    return Training("digits", (*WORDED, *said))


def shapes(*said: str) -> Training:
    return Training("shapes", (*SHORT, *said))


def shapes_small(*said: str) -> Training:
    return Training("shapes", (*SMALL, *said))
