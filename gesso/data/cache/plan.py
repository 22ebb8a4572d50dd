"""Settings of `gesso cache` and the records in its JSON files. This module does not import torch.

    gesso cache photos caches/photos --resolution 64                        pixels, for a run on pixels
    gesso cache photos caches/photos --resolution 256 --vae stabilityai/sd-vae-ft-mse --views 2 --flip
    gesso cache photos caches/photos --resolution 256 --vae ... --text openai/clip-vit-large-patch14 --max-tokens 77
    gesso train RECIPE data.source=caches/photos

The same command continues after an interruption. Under torchrun the ranks share the work.
"""

import math
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from gesso.config.base import PositiveCount, Settings
from gesso.config.conditioning import SemanticConfig
from gesso.config.overrides import Tree, deep_merge, format_error, parse_override, suggest
from gesso.config.run import DataConfig, LatentConfig
from gesso.errors import UsageError

FORMAT = "gesso cache 1"
MAX_BUCKET_ASPECT = 2.0
"""Aspect ratio of the widest bucket; the tallest has its inverse."""
FLAG_SETTINGS = {
    "--resolution": "data.resolution", "--channels": "data.channels", "--crop-scale": "data.crop_scale",
    "--flip": "data.flip", "--resize": "data.resize", "--vae": "latent.vae", "--convention": "latent.convention",
    "--text": "semantic.encoder",
    "--max-tokens": "semantic.max_tokens", "--views": "views", "--dtype": "dtype", "--blur-faces": "blur_faces",
    "--buckets": "buckets", "--images-per-shard": "images_per_shard", "--batch-size": "batch_size",
}  # fmt: skip
"""Settings by command-line flag."""
REQUIRED_FLAGS = {"--convention": "--vae", "--max-tokens": "--text"}
MEASURED_FIELDS = ("num_images", "num_classes", "class_names", "example_captions", "fingerprint", "mean", "std")
"""Fields of DataConfig that are computed from the images."""

HexString = Annotated[str, Field(pattern="^[0-9a-f]*$")]
EncoderIdentity = dict[str, str | int]
"""Identity of a VAE or a text encoder."""


class CachePlan(Settings):
    """Settings of a cache; null values are completed when the source, the VAE and the text encoder are opened."""

    data: DataConfig = DataConfig()
    latent: LatentConfig = LatentConfig()
    semantic: SemanticConfig = SemanticConfig(kind="none")
    """kind=text stores the tokens of the captions; captions and classes are always stored"""
    views: PositiveCount = 1
    """K: crops and flips of each image; a sample of training takes one of them"""
    dtype: Literal["float16", "float32"] | None = None
    """dtype of stored latents and tokens; null: float16, or float32 for sources of latents"""
    images_per_shard: PositiveCount | None = None
    """images per shard; null: at most 4096, fewer if a file would exceed 256 MiB"""
    batch_size: PositiveCount = 32
    """number of views in a pass through the VAE"""
    blur_faces: bool = False
    """blur faces that OpenCV detects, before anything else (data/encoders/face_blur.py)"""
    buckets: Annotated[PositiveCount, Field(le=99)] = 1
    """number of buckets of nearly equal area, from 1:2 to 2:1; an image belongs to the nearest aspect ratio"""
    bucket_multiple: PositiveCount | None = None
    """edges of buckets are multiples of this many pixels; null: 64, or an eighth of a resolution below 256"""
    seed: NonNegativeInt = 0
    """seed of crops and flips"""

    @model_validator(mode="after")
    def _check(self) -> "CachePlan":
        data = self.data
        for name in MEASURED_FIELDS:
            if getattr(data, name) is not None:
                raise ValueError(f"data.{name} is computed from the images: remove it")
        if self.semantic.kind == "label":
            raise ValueError("semantic.kind=label: classes are always stored; set semantic.kind to text or none")
        if self.latent.vae and data.channels != 3:
            raise ValueError(f"--channels {data.channels}, but --vae needs RGB: remove --channels")
        if data.crop_scale is None and self.views > 1 + data.flip:
            possible = "two different views, one of them mirrored" if data.flip else "one view"
            raise ValueError(f"--views {self.views} without --crop-scale: an image has only {possible}")
        self.bucket_sizes()
        return self

    def bucket_sizes(self) -> list[tuple[int, int]]:
        """Return height and width in pixels of each bucket, from the tallest to the widest; raise ValueError."""
        R, n = self.data.resolution, self.buckets
        if n == 1:
            return [(R, R)]
        m = self.bucket_multiple or (64 if R >= 256 else max(R // 8, 1))
        if n % 2 == 0:
            raise ValueError(f"--buckets {n}: choose an odd number, as there are equally many tall and wide buckets")
        if R % m:
            raise ValueError(f"--buckets {n}: --resolution {R} is not a multiple of bucket_multiple={m}")
        edges = range(-(-R // 2 // m) * m, 2 * R + 1, m)
        wide = [(h, w) for w in edges if (h := round(R * R / w / m) * m) in edges and h <= w]
        wide_sizes = []
        for k in range(1, n // 2 + 1):
            aspect = MAX_BUCKET_ASPECT ** (2 * k / (n - 1))
            wide_sizes.append(min(wide, key=lambda s: abs(math.log(s[1] / s[0] / aspect))))
        sizes = [(w, h) for h, w in reversed(wide_sizes)] + [(R, R)] + wide_sizes
        if len(set(sizes)) < n:
            raise ValueError(
                f"--buckets {n}: at --resolution {R} there are only {len(set(sizes))} sizes with multiples of {m}: "
                "set fewer buckets or a smaller bucket_multiple"
            )
        return sizes


class ShardFile(Settings):
    """One shard of a cache; shape is that of pixels or moments, height and width are those of a view in pixels."""

    name: str
    rows: PositiveCount
    height: PositiveCount
    width: PositiveCount
    shape: tuple[NonNegativeInt, ...]
    bytes: PositiveCount
    sha256: HexString


class ColumnFile(Settings):
    """The file with the small columns of all images, in the order of the shards."""

    name: str
    bytes: PositiveCount
    sha256: HexString


class MomentSums(Settings):
    """Sums over all views, per channel: of pixels or latent means, of their squares, and of latent variances."""

    count: NonNegativeInt = 0
    value_sum: tuple[float, ...] = ()
    square_sum: tuple[float, ...] = ()
    variance_sum: tuple[float, ...] = ()


class ShardRecord(Settings):
    """Record written after the shards of the images `start` to `stop` - 1 of the source."""

    plan_digest: HexString
    start: NonNegativeInt
    stop: PositiveCount
    files: tuple[ShardFile, ...]
    unreadable: tuple[tuple[str, str], ...]
    """name and reason of unreadable images"""
    num_faces: NonNegativeInt
    """number of blurred faces"""
    sums: MomentSums


class CacheHeader(Settings):
    """Record written first, and replaced by the manifest."""

    format: str = FORMAT
    plan: CachePlan
    source_fingerprint: str
    """fingerprint of the source"""
    source_content: HexString | None = None
    """hash of the bytes of some images; null: the fingerprint has them, or the cache is older"""
    num_source_images: PositiveCount
    """number of images of the source"""
    vae: EncoderIdentity | None = None
    text_encoder: EncoderIdentity | None = None


class CacheManifest(CacheHeader):
    """Record written last: the contents of the cache."""

    num_images: PositiveCount
    """number of readable images"""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    """mean per channel of pixels in [-1, 1] or of raw latents"""
    std: tuple[float, ...]
    unreadable: tuple[tuple[str, str], ...]
    num_faces: NonNegativeInt
    files: tuple[ShardFile, ...]
    columns: ColumnFile
    fingerprint: HexString
    """hash of the checksums of the shards"""


def parse_cache_args(source: str, out: object, options: Mapping[str, object], arguments: list[str]) -> CachePlan | None:
    """Return the plan of a command line, or None for --check.

    Args:
        source: The setting data.source.
        out: Folder of the cache.
        options: Values of the flags; None or False if not given.
        arguments: Settings in the form name=value.

    Raises:
        UsageError: Flags or settings are invalid, unknown, contradictory, or without effect.
    """
    flags = {
        flag: options[flag] for flag in FLAG_SETTINGS if options.get(flag) is not None and options[flag] is not False
    }
    if options.get("--check"):
        if flags or arguments or out is not None:
            raise UsageError("--check takes one folder and no other options: gesso cache --check OUT")
        return None
    if out is None:
        raise UsageError(f"the output folder is missing: gesso cache {source} OUT --resolution 256")
    if "=" in str(out) and not arguments:
        raise UsageError(f"the output folder is missing before {out}: gesso cache {source} OUT {out}")
    override: Tree = {}
    for argument in arguments:
        override = deep_merge(override, parse_override(argument))
    for name in override:
        if name not in CachePlan.model_fields:
            raise UsageError(f"{name}: no such setting of a cache; {suggest(name, list(CachePlan.model_fields))}")
    settings: Tree = {"data": {"source": source}}
    for flag, value in flags.items():
        path = FLAG_SETTINGS[flag]
        if path in _flatten(override):
            raise UsageError(f"{flag} and {path} are the same setting: remove one of them")
        settings = deep_merge(settings, parse_override(f"{path}={value}"))
    if "--text" in flags:
        settings = deep_merge(settings, {"semantic": {"kind": "text"}})
    settings = deep_merge(settings, override)
    tree = deep_merge(CachePlan().model_dump(mode="json"), settings)
    _check_ineffective_flags(flags, tree)
    if "data.resolution" not in _flatten(settings):
        raise UsageError("the resolution is missing: add --resolution, such as --resolution 256")
    try:
        return CachePlan.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n  ".join(format_error(e).replace("Value error, ", "") for e in error.errors())) from None


def _check_ineffective_flags(flags: Mapping[str, object], tree: Tree) -> None:
    is_set = {"--vae": tree["latent"]["vae"], "--text": tree["semantic"]["kind"] == "text"}
    for flag, required in REQUIRED_FLAGS.items():
        if flag in flags and not is_set[required]:
            raise UsageError(f"{flag} without {required} has no effect: add {required}, or remove {flag}")
    if "--dtype" in flags and not any(is_set.values()):
        raise UsageError("--dtype applies to latents and tokens, not to pixels: add --vae or --text, or remove --dtype")


def _flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def identity_settings(header: CacheHeader) -> dict[str, Any]:
    """Return the settings that determine the bytes of a cache, by name; paths and settings of reading are excluded."""
    fields = {name: getattr(header, name) for name in CacheHeader.model_fields}
    settings = _flatten(CacheHeader(**fields).model_dump(mode="json"))
    for name in ("plan.data.source", "plan.data.max_unreadable", "plan.data.shuffle_window_shards", "format"):
        del settings[name]
    return {name.removeprefix("plan."): value for name, value in settings.items()}


def cache_command(plan: CachePlan, out: object) -> str:
    """Return the command line that writes a cache of this plan to `out`."""
    values, defaults = _flatten(plan.model_dump(mode="json")), _flatten(CachePlan().model_dump(mode="json"))
    words, flags = ["gesso", "cache", plan.data.source, str(out)], {path: flag for flag, path in FLAG_SETTINGS.items()}
    values.pop("data.source")
    if plan.semantic.kind == "text":
        values.pop("semantic.kind")
        defaults["semantic.encoder"] = None
    overrides = []
    for path, value in values.items():
        if value == defaults.get(path) and path != "data.resolution":
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if value is True and path in flags:
            words.append(flags[path])
        elif path in flags:
            words += [flags[path], text]
        else:
            overrides.append(f"{path}={text.lower() if isinstance(value, bool) else text}")
    return shlex.join(words + overrides)
