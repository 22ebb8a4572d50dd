"""What `gesso cache` is asked to write, and what its files say of it. No torch here.

    gesso cache photos caches/photos --resolution 64                        pixels, for a run on pixels
    gesso cache photos caches/photos --resolution 256 --vae stabilityai/sd-vae-ft-mse --views 2 --flip
    gesso cache photos caches/photos --resolution 256 --vae ... --text openai/clip-vit-large-patch14 --tokens 77
    gesso train RECIPE data.source=caches/photos

The same command goes on after whatever stopped it. Under torchrun the ranks share the work.
"""

import math
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError, field_validator, model_validator

from gesso.config.base import Positive, Settings
from gesso.config.condition import Semantic, without_dropout
from gesso.config.merge import Tree, _explain, merged, nearest, parse_override
from gesso.config.run import Data, Latent
from gesso.errors import UsageError

FORMAT = "gesso cache 1"
WIDEST = 2.0
"""aspect of the widest bucket; the tallest has its inverse"""
FLAGS = {
    "--resolution": "data.resolution", "--channels": "data.channels", "--crop-scale": "data.crop_scale",
    "--flip": "data.flip", "--resize": "data.resize", "--vae": "latent.vae", "--convention": "latent.convention", "--text": "semantic.encoder",
    "--tokens": "semantic.tokens", "--views": "views", "--dtype": "dtype", "--blur-faces": "blur_faces",
    "--buckets": "buckets", "--shard-images": "shard_images", "--batch-size": "batch_size",
}  # fmt: skip
"""of the command line, and the settings that they are short for"""
NEEDS = {"--convention": "--vae", "--tokens": "--text"}
FOUND = ("num_images", "num_classes", "class_names", "examples", "fingerprint", "mean", "std")
"""of Data: what the images tell"""

Hexadecimal = Annotated[str, Field(pattern="^[0-9a-f]*$")]
Identity = dict[str, str | int]
"""of a VAE or a text encoder"""


class Plan(Settings):
    """What a cache is to hold. What is null is filled in when source, VAE and text encoder are opened."""

    data: Data = Data()
    latent: Latent = Latent()
    semantic: Semantic = Semantic(kind="none")
    """kind text stores the tokens of the captions, none does not; captions and classes are stored always"""
    views: Positive = 1
    """K: crops and flips of each image; a sample of training takes one of them"""
    dtype: Literal["float16", "float32"] | None = None
    """of stored latents and tokens; float16, but float32 where the source itself holds latents"""
    shard_images: Positive | None = None
    """images of a range, which a kill may cost; at most 4096, and fewer where a file would exceed 256 MiB"""
    batch_size: Positive = 32
    """views of every pass through the VAE"""
    blur_faces: bool = False
    """blur the faces that OpenCV finds, before anything else (data/faces.py)"""
    buckets: Positive = 1
    """sizes of nearly equal area; an image is in that whose aspect is nearest, from 1:2 to 2:1"""
    bucket_multiple: Positive | None = None
    """pixels, of which the edges of buckets are multiples; 64, or an eighth of a resolution below 256"""
    seed: NonNegativeInt = 0
    """of crops and flips"""

    @field_validator("semantic", mode="before")
    @classmethod
    def _older(cls, tree: Any) -> Any:
        return without_dropout(tree)

    @model_validator(mode="after")
    def _fits(self) -> "Plan":
        data = self.data
        for name in FOUND:
            if getattr(data, name) is not None:
                raise ValueError(f"data.{name} is found when the images are read, not set")
        if self.semantic.kind == "label":
            raise ValueError("semantic.kind=label: classes are stored always; say text or none")
        if self.latent.vae and data.channels != 3:
            raise ValueError(f"--channels {data.channels}, but --vae sees RGB: leave --channels out")
        if data.crop_scale is None and self.views > 1 + data.flip:
            there = "two views, one of them mirrored" if data.flip else "one view"
            raise ValueError(
                f"--views {self.views} without --crop-scale: an image has {there}, all others are the same"
            )
        self.sizes()
        return self

    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of each bucket, from the tallest to the widest. Raises ValueError."""
        R, n = self.data.resolution, self.buckets
        if n == 1:
            return [(R, R)]
        m = self.bucket_multiple or (64 if R >= 256 else max(R // 8, 1))
        if n % 2 == 0:
            raise ValueError(
                f"--buckets {n}: an odd number, so that there are as many tall ones as wide beside the square"
            )
        if R % m:
            raise ValueError(f"--buckets {n}: --resolution {R} is no multiple of bucket_multiple={m}")
        edges = range(-(-R // 2 // m) * m, 2 * R + 1, m)
        wide = [(h, w) for w in edges if (h := round(R * R / w / m) * m) in edges and h <= w]
        found = []
        for k in range(1, n // 2 + 1):
            aspect = WIDEST ** (2 * k / (n - 1))
            found.append(min(wide, key=lambda s: abs(math.log(s[1] / s[0] / aspect))))
        sizes = [(w, h) for h, w in reversed(found)] + [(R, R)] + found
        if len(set(sizes)) < n:
            raise ValueError(
                f"--buckets {n}: at --resolution {R} only {len(set(sizes))} sizes differ by multiples of {m}: "
                "ask for fewer, or set a smaller bucket_multiple"
            )
        return sizes


class Shard(Settings):
    """One file of a cache. shape: of pixels or moments; height and width in pixels."""

    name: str
    rows: Positive
    height: Positive
    width: Positive
    shape: tuple[NonNegativeInt, ...]
    bytes: Positive
    sha256: Hexadecimal


class Columns(Settings):
    """The file of what is small of all images, in the order of the files."""

    name: str
    bytes: Positive
    sha256: Hexadecimal


class Sums(Settings):
    """Over all views: count of numbers per channel; per channel sum of pixels or means, of their squares, of variances."""

    count: NonNegativeInt = 0
    first: tuple[float, ...] = ()
    second: tuple[float, ...] = ()
    variance: tuple[float, ...] = ()


class Range(Settings):
    """Written after the files of images `start` to `stop` - 1 of the source, of plan `plan`."""

    plan: Hexadecimal
    start: NonNegativeInt
    stop: Positive
    files: tuple[Shard, ...]
    unreadable: tuple[tuple[str, str], ...]
    """name and reason"""
    faces: NonNegativeInt
    """that were blurred"""
    sums: Sums


class Started(Settings):
    """Written before anything else, and removed when the manifest is there."""

    format: str = FORMAT
    plan: Plan
    source: str
    """fingerprint of the source"""
    images: Positive
    """of the source"""
    vae: Identity | None = None
    text: Identity | None = None


class Manifest(Started):
    """Written last: what is there."""

    num_images: Positive
    """that could be read"""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """per channel, of pixels in [-1, 1] or of raw latents"""
    std: tuple[float, ...]
    unreadable: tuple[tuple[str, str], ...]
    faces: NonNegativeInt
    files: tuple[Shard, ...]
    columns: Columns
    fingerprint: Hexadecimal
    """of the files' checksums"""


def planned(source: str, out: object, said: Mapping[str, object], arguments: list[str]) -> Plan | None:
    """The plan that the flags `said` (None and False where the user is silent) and the settings `arguments` make; None for
    --check, which has no plan.

    Raises UsageError with one line for each that is wrong, unknown, contradicts another, or has no effect.
    """
    given = {flag: said[flag] for flag in FLAGS if said.get(flag) is not None and said[flag] is not False}
    if said.get("--check"):
        if given or arguments or out is not None:
            raise UsageError("--check takes one folder and nothing else: gesso cache --check OUT")
        return None
    if out is None:
        raise UsageError(f"where to? gesso cache {source} OUT --resolution 256")
    if "=" in str(out) and not arguments:
        raise UsageError(f"{out} stands in the place of the folder to write: gesso cache {source} OUT {out}")
    override: Tree = {}
    for argument in arguments:
        override = merged(override, parse_override(argument))
    for name in override:
        if name not in Plan.model_fields:
            raise UsageError(f"{name}: no such setting of a cache; {nearest(name, list(Plan.model_fields))}")
    flags: Tree = {"data": {"source": source}}
    for flag, value in given.items():
        path = FLAGS[flag]
        if path in _flat(override):
            raise UsageError(f"{flag} and {path} are one setting: say it once")
        flags = merged(flags, parse_override(f"{path}={value}"))
    if "--text" in given:
        flags = merged(flags, {"semantic": {"kind": "text"}})
    tree = merged(merged(Plan().model_dump(mode="json"), flags), override)
    _no_effect(given, tree)
    if not {"data.resolution"} & {*_flat(flags), *_flat(override)}:
        raise UsageError("which size? say --resolution, such as --resolution 256")
    try:
        return Plan.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n  ".join(_explain(e).replace("Value error, ", "") for e in error.errors())) from None


def _no_effect(given: Mapping[str, object], tree: Tree) -> None:
    there = {"--vae": tree["latent"]["vae"], "--text": tree["semantic"]["kind"] == "text"}
    for flag, needed in NEEDS.items():
        if flag in given and not there[needed]:
            raise UsageError(f"{flag} without {needed} has no effect: say {needed} too, or leave it out")
    if "--dtype" in given and not any(there.values()):
        raise UsageError(
            "--dtype is that of latents and tokens: say --vae or --text too, or leave it out; pixels have 8 bits"
        )


def _flat(tree: Tree, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def flattened(started: Started) -> dict[str, Any]:
    """What decides on the bytes of a cache, by name: not where its source lies, how many unreadable images are borne, and how
    it is read."""
    fields = {name: getattr(started, name) for name in Started.model_fields}
    found = _flat(Started(**fields).model_dump(mode="json"))
    for name in ("plan.data.source", "plan.data.max_unreadable", "plan.data.window", "format"):
        del found[name]
    return {name.removeprefix("plan."): value for name, value in found.items()}


def command(plan: Plan, out: object) -> str:
    """The command line of a plan."""
    ours, plain = _flat(plan.model_dump(mode="json")), _flat(Plan().model_dump(mode="json"))
    words, short = ["gesso", "cache", plan.data.source, str(out)], {path: flag for flag, path in FLAGS.items()}
    ours.pop("data.source")
    if plan.semantic.kind == "text":
        ours.pop("semantic.kind")
        plain["semantic.encoder"] = None
    settings = []
    for path, value in ours.items():
        if value == plain.get(path) and path != "data.resolution":
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if value is True and path in short:
            words.append(short[path])
        elif path in short:
            words += [short[path], text]
        else:
            settings.append(f"{path}={text.lower() if isinstance(value, bool) else text}")
    return shlex.join(words + settings)
