"""Scores of a set of pictures beside a reference set, both streamed: what `gesso evaluate --images DIR --ref DIR` prints.

Legend: N pictures, D features.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gesso import atomic_io, devices
from gesso.config import Resize
from gesso.errors import UsageError
from gesso.evaluation.feature_stats import FeatureStats, Progress, ProgressCallback, compute_stats, reference_stats
from gesso.evaluation.image_source import ImageSet, open_image_set
from gesso.evaluation.metrics import functional, precision_recall, toy_metrics
from gesso.evaluation.metrics.functional import Moments
from gesso.evaluation.networks import clip_dino, downloads, inception, lpips, toy_networks

METRIC_NETWORKS = {
    "fid": "inception", "kid": "inception", "is": "inception", "pr": "inception", "fd_dinov2": "dinov2",
    "kd_dinov2": "dinov2", "pr_dinov2": "dinov2", "clip": "clip", "lpips": "lpips", "agreement": "agreement", "drawn": "drawn", "fd_digits": "digits",
    "digits_feature_distance": "told", "fd_shapes": "shapes", "fd_fashion": "fashion", "fd_clip": "clip_images", "loss": "validation",
}  # fmt: skip
"""score -> network. pr: precision and recall at k = 3, density and coverage at k = 5"""
NEEDS_FEATURES = ("kid", "is", "pr", "kd_dinov2", "pr_dinov2", "clip", "agreement", "drawn")
"""scores that need the features of every picture, not their moments alone"""
NO_REFERENCE = ("is", "clip", "lpips", "digits_feature_distance", "agreement", "drawn", "loss")
"""scores without a reference"""
RUN_ONLY = ("lpips", "digits_feature_distance", "agreement", "drawn", "loss")
MAX_NEIGHBOUR_SAMPLES = 10_000
"""pictures of the reference that precision and recall are taken over, beside all samples, as ADM's evaluator has them; density and
coverage are over so many of each set (Naeem et al. 2020)"""


class ImageEvalArgs(NamedTuple):
    """What the user asks for; None where silent."""

    images: str
    ref: str | None = None
    metrics: tuple[str, ...] = ("fid",)
    resolution: int | None = None
    resize: Resize = "lanczos"
    num_images: int | None = None
    weights_dir: Path | None = None
    inception: str = "torch-fidelity"
    kid_subset: int = functional.KID_SUBSET_SIZE
    lpips: str = "alex"
    dinov2: str = clip_dino.DEFAULT_DINOV2
    clip: str = clip_dino.DEFAULT_CLIP
    device: str = "auto"
    out: Path | None = None
    batch_size: int = 64


def parse_image_args(folder: Path | None, settings: list[str], options: dict[str, Any]) -> ImageEvalArgs | None:
    """What the flags `told` ask for; None for a run folder, which takes settings instead. Raises UsageError for a mixture."""
    given = {flag.removeprefix("--").replace("-", "_"): value for flag, value in options.items() if value is not None}
    if folder is not None:
        if given:
            raise UsageError(
                f"--{next(iter(given)).replace('_', '-')} is for pictures (--images DIR); a run takes settings, such as sample.steps=50"
            )
        return None
    if "images" not in given:
        raise UsageError("measure what? gesso evaluate RUN, or gesso evaluate --images DIR --ref DIR")
    if settings:
        raise UsageError(f"{settings[0]} is a setting of a run; pictures take --resolution, --metrics, ...")
    if "metrics" in given:
        given["metrics"] = tuple(name.strip() for name in given["metrics"].split(","))
    return ImageEvalArgs(**given)


def evaluate_image_sets(args: ImageEvalArgs, progress: ProgressCallback) -> list[str]:
    """Score, and write what was found as JSON where the user says where. Returns the lines to show. Raises as `compare`."""
    result, lines = compute_image_metrics(args, devices.resolve_device(args.device, "--device "), progress)
    if args.out is None:
        return lines
    atomic_io.write_json(args.out, result)
    return [*lines, f"wrote {args.out}"]


def compute_image_metrics(
    args: ImageEvalArgs, device: torch.device | str, progress: ProgressCallback
) -> tuple[dict[str, Any], list[str]]:
    """Scores with their protocol, and the lines to show. tick(done, total) counts pictures seen.

    Raises UsageError for unknown scores, missing weights, sets that do not compare; RunError for unreadable pictures.
    """
    check_metrics(args.metrics)
    if args.inception not in downloads.INCEPTION_FILES:
        raise UsageError(f"--inception {args.inception}: there are {', '.join(downloads.INCEPTION_FILES)}")
    if args.ref is None and not set(args.metrics) <= set(NO_REFERENCE):
        raise UsageError("compared with what? --ref DIR names the reference; only is and clip need none")
    if args.resize not in get_args(Resize):
        raise UsageError(f"--resize {args.resize}: there are {', '.join(get_args(Resize))}")
    made = open_image_set(args.images, args.resolution, args.num_images, args.resize)
    ref = _open_reference(args, made)
    networks = {
        name: load_network(name, args, device)
        for name in dict.fromkeys(METRIC_NETWORKS[score] for score in args.metrics)
    }
    check_kid_subset(
        args.metrics, args.kid_subset, [s.num_images for s in (made, ref) if isinstance(s, ImageSet)], "--kid-subset"
    )
    total = (made.num_images + (ref.num_images if isinstance(ref, ImageSet) else 0)) * len(networks)
    seen = Progress(progress, total)
    scores: dict[str, float] = {}
    for name, network in networks.items():
        mine = [score for score in args.metrics if METRIC_NETWORKS[score] == name]
        x = compute_stats(made, network, args.batch_size, any(score in NEEDS_FEATURES for score in mine), device, seen)
        y = ref if isinstance(ref, FeatureStats) else None
        if isinstance(ref, ImageSet) and not set(mine) <= set(NO_REFERENCE):
            y = reference_stats(ref, network, needs_reference_features(mine), args.batch_size, device, seen)
        for score in mine:
            scores |= compute_metric(score, x, y, network, args.kid_subset)
    protocol = {
        "images": made.uri, "reference": args.ref, "count": made.num_images,
        "reference_count": ref.num_images if isinstance(ref, ImageSet) else None,
        "size": list(made.size), "resized": made.resize_description,
        "networks": {name: network.name for name, network in networks.items()},
    }  # fmt: skip
    if args.kid_subset != functional.KID_SUBSET_SIZE and {"kid", "kd_dinov2"} & set(args.metrics):
        protocol["kid_subset"] = args.kid_subset
    return {"scores": scores, "protocol": protocol}, _format_result(scores, protocol, made, networks)


def check_metrics(names: tuple[str, ...]) -> None:
    """Raise UsageError for a score that there is not."""
    if unknown := [name for name in names if name not in METRIC_NETWORKS]:
        raise UsageError(f"no score {unknown[0]!r}; there are: {', '.join(METRIC_NETWORKS)}")
    for name in RUN_ONLY:
        if name in names:
            raise UsageError(f"{name} is measured on a run, not on pictures: gesso evaluate RUN eval.metrics={name}")


def _open_reference(args: ImageEvalArgs, samples: ImageSet) -> "ImageSet | FeatureStats | None":
    """Pictures, or the statistics that a .npz holds."""
    if args.ref is None:
        return None
    if args.ref.endswith(".npz"):
        try:
            with np.load(args.ref, allow_pickle=False) as arrays:
                if "mu" in arrays and "sigma" in arrays:
                    return _stats_from_npz(args, arrays["mu"], arrays["sigma"])
        except FileNotFoundError:
            raise UsageError(f"there is no file {args.ref}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{args.ref}: no .npz that can be read ({error})") from None
    ref = open_image_set(args.ref, args.resolution, resize=args.resize)
    if ref.size != samples.size:
        raise UsageError(
            f"{args.images} is {samples.size[0]}x{samples.size[1]}, {args.ref} {ref.size[0]}x{ref.size[1]}: --resolution "
            "brings both to one size"
        )
    return ref


def _stats_from_npz(args: ImageEvalArgs, mean: np.ndarray, cov: np.ndarray) -> FeatureStats:
    if needing := [score for score in args.metrics if score in NEEDS_FEATURES]:
        raise UsageError(f"{args.ref} holds a mean and a covariance, {needing[0]} needs the pictures themselves")
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UsageError(f"{args.ref}: mu {mean.shape} and sigma {cov.shape} do not fit together")
    return FeatureStats(Moments.from_mean_cov(torch.from_numpy(mean), torch.from_numpy(cov)))


def load_network(name: str, args: ImageEvalArgs, device: torch.device | str) -> nn.Module:
    """A feature network: uint8 (B, C, H, W) -> (B, D). Raises UsageError that says which file is missing."""
    if name == "inception":
        return inception.load_inception(args.weights_dir, device, implementation=args.inception)
    if name == "dinov2":
        return clip_dino.DINOv2(args.dinov2, device)
    if name == "lpips":
        return lpips.load_lpips(args.lpips, args.weights_dir, device)
    if name == "clip":
        return clip_dino.CLIPScore(args.clip, device)
    if name == "clip_images":
        return clip_dino.CLIPImageFeatures(args.clip, device)
    if name == "shapes":
        return toy_networks.load_shape_features(device)
    if name == "fashion":
        return toy_networks.GreyFeatures(toy_networks.load_fashion_features(device))
    return toy_networks.GreyFeatures(toy_networks.load_digit_features(device))


def needs_reference_features(metrics: Sequence[str]) -> bool:
    """Of the reference, by any of these scores."""
    return any(score in NEEDS_FEATURES and score not in NO_REFERENCE for score in metrics)


def check_kid_subset(metrics: Sequence[str], subset_size: int, counts: Sequence[int], setting: str) -> None:
    """Raise UsageError for a kernel distance of fewer pictures than one of its subsets has."""
    names = [score for score in metrics if score in ("kid", "kd_dinov2")]
    if names and min(counts) < subset_size:
        raise UsageError(
            f"{names[0]} is a mean over subsets of {subset_size:,} pictures, and one set has {min(counts):,}: measure more, or set "
            f"{setting} to {min(counts)} or fewer, which compares with no published number"
        )


def compute_metric(
    metric: str,
    samples: FeatureStats,
    reference: FeatureStats | None,
    network: nn.Module,
    kid_subset: int = functional.KID_SUBSET_SIZE,
) -> dict[str, float]:
    """Numbers by name, of made pictures x beside a reference y."""
    if metric == "is":
        mean, std = functional.inception_score(
            _shuffle(network.probabilities(samples.features.to(next(network.parameters()).device)).cpu())
        )
        return {"is": mean, "is_std": std}
    if metric in ("lpips", "digits_feature_distance"):
        *apart, coarse, fine = samples.moments.mean.tolist()
        detail = (fine / coarse) ** 0.5 if coarse else 1.0
        return dict(zip((metric, f"{metric}_hr"), apart, strict=False)) | {"size_detail": detail}
    if metric in ("agreement", "drawn"):
        return toy_metrics.mean_rates(network, samples.features)
    if metric == "clip":
        return {"clip": float(samples.moments.mean)}
    if metric in ("kid", "kd_dinov2"):
        mean, std = functional.kernel_distance(reference.features, samples.features, subset_size=kid_subset)
        return {metric: mean, f"{metric}_std": std}
    if metric in ("pr", "pr_dinov2"):
        device = _float64_device(network)
        real, made = (_shuffle(rows).to(device) for rows in (reference.features, samples.features))
        real = real[:MAX_NEIGHBOUR_SAMPLES]
        near, far = (
            precision_recall.precision_recall(real, made, 3),
            precision_recall.precision_recall(real, made[:MAX_NEIGHBOUR_SAMPLES], 5),
        )
        end = metric.removeprefix("pr")
        return {
            f"precision{end}": near.precision, f"recall{end}": near.recall,
            f"density{end}": far.density, f"coverage{end}": far.coverage,
        }  # fmt: skip
    a, b = samples.moments, reference.moments
    return {metric: functional.frechet_distance(a.mean, a.cov, b.mean, b.cov)}


def _float64_device(network: nn.Module) -> torch.device:
    """Return the device of a network where it has float64, else the CPU."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" else device


def _shuffle(features: Tensor) -> Tensor:
    """In an order of its own: sets are often sorted by class."""
    return features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]


def _format_result(
    scores: dict[str, float], protocol: dict[str, Any], samples: ImageSet, networks: dict[str, nn.Module]
) -> list[str]:
    lines = []
    for name, value in scores.items():
        if not name.endswith("_std"):
            spread = f" +- {scores[f'{name}_std']:.4f}" if f"{name}_std" in scores else ""
            lines.append(f"{name:20}{value:12.4f}{spread}")
    reference = f" beside {protocol['reference']}" if protocol["reference"] else ""
    count = f" ({protocol['reference_count']:,})" if protocol["reference_count"] else ""
    lines.append(
        f"{samples.num_images:,} pictures of {samples.size[0]}x{samples.size[1]} in {samples.uri}{reference}{count}; "
        f"{', '.join(protocol['networks'].values())}"
    )
    return [*lines, *kid_subset_note(protocol), *few_samples_note(samples.num_images, scores, networks)]


def kid_subset_note(protocol: dict[str, Any]) -> list[str]:
    """A note where a kernel distance is over subsets of another size than published ones."""
    if "kid_subset" not in protocol:
        return []
    return [
        f"note: kernel distances over subsets of {protocol['kid_subset']:,}; published ones have {functional.KID_SUBSET_SIZE:,}"
    ]


def lower_is_better(name: str) -> bool:
    """Whether the best value of a number by that name, as `scored` has it, is the least."""
    return name.startswith(("fid", "fd_", "kid", "kd_", "lpips", "digits_feature_distance", "loss"))


def few_samples_note(num_images: int, metrics: Iterable[str], networks: dict[str, nn.Module]) -> list[str]:
    """A warning where a Frechet distance is of fewer samples than features."""
    width = max((networks[METRIC_NETWORKS[name]].num_features for name in metrics if name.startswith("f")), default=0)
    if num_images > width:
        return []
    return [
        f"note: {num_images:,} pictures do not fill a covariance of {width:,} features: Frechet distances of so few are far too "
        "large, and compare only at equal count"
    ]
