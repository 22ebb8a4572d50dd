"""Scores of a set of pictures beside a reference set, both streamed: what `gesso evaluate --images DIR --ref DIR` prints.

Legend: N pictures, D features.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gesso import devices, files
from gesso.config import Resize
from gesso.errors import UsageError
from gesso.evaluate import embed, features, inception, lpips, manifold, metrics, shipped, weights
from gesso.evaluate.metrics import Moments
from gesso.evaluate.pictures import Pictures, open_pictures
from gesso.evaluate.statistics import Seen, Statistics, Tick, gathered, of_reference

METRICS = {
    "fid": "inception", "kid": "inception", "is": "inception", "pr": "inception", "fd_dinov2": "dinov2",
    "kd_dinov2": "dinov2", "pr_dinov2": "dinov2", "clip": "clip", "lpips": "lpips", "agreement": "agreement", "drawn": "drawn", "fd_digits": "digits",
    "told_digits": "told", "fd_shapes": "shapes", "fd_clip": "clip_images", "loss": "validation",
}  # fmt: skip
"""score -> network. pr: precision and recall at k = 3, density and coverage at k = 5"""
ROWS = ("kid", "is", "pr", "kd_dinov2", "pr_dinov2", "clip", "agreement", "drawn")
"""scores that need the features of every picture, not their moments alone"""
ALONE = ("is", "clip", "lpips", "told_digits", "agreement", "drawn", "loss")
"""scores without a reference"""
OF_RUNS = ("lpips", "told_digits", "agreement", "drawn", "loss")
NEIGHBOURS = 10_000
"""pictures of the reference that precision and recall are taken over, beside all samples, as ADM's evaluator has them; density and
coverage are over so many of each set (Naeem et al. 2020)"""


class Asked(NamedTuple):
    """What the user asks for; None where silent."""

    images: str
    ref: str | None = None
    scores: tuple[str, ...] = ("fid",)
    resolution: int | None = None
    resize: Resize = "lanczos"
    count: int | None = None
    weights: Path | None = None
    inception: str = "torch-fidelity"
    kid_subset: int = metrics.KID_SUBSET
    lpips: str = "alex"
    dinov2: str = embed.DINOV2
    clip: str = embed.CLIP
    device: str = "auto"
    out: Path | None = None
    batch_size: int = 64


def asked(folder: Path | None, settings: list[str], told: dict[str, Any]) -> Asked | None:
    """What the flags `told` ask for; None for a run folder, which takes settings instead. Raises UsageError for a mixture."""
    given = {flag.removeprefix("--"): value for flag, value in told.items() if value is not None}
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
        given["scores"] = tuple(name.strip() for name in given.pop("metrics").split(","))
    return Asked(**given)


def write(asked: Asked, tick: Tick) -> list[str]:
    """Score, and write what was found as JSON where the user says where. Returns the lines to show. Raises as `compare`."""
    result, lines = compare(asked, devices.named(asked.device, "--device "), tick)
    if asked.out is None:
        return lines
    files.write_json(asked.out, result)
    return [*lines, f"wrote {asked.out}"]


def compare(asked: Asked, device: torch.device | str, tick: Tick) -> tuple[dict[str, Any], list[str]]:
    """Scores with their protocol, and the lines to show. tick(done, total) counts pictures seen.

    Raises UsageError for unknown scores, missing weights, sets that do not compare; RunError for unreadable pictures.
    """
    check(asked.scores)
    if asked.inception not in weights.INCEPTION:
        raise UsageError(f"--inception {asked.inception}: there are {', '.join(weights.INCEPTION)}")
    if asked.ref is None and not set(asked.scores) <= set(ALONE):
        raise UsageError("compared with what? --ref DIR names the reference; only is and clip need none")
    if asked.resize not in get_args(Resize):
        raise UsageError(f"--resize {asked.resize}: there are {', '.join(get_args(Resize))}")
    made = open_pictures(asked.images, asked.resolution, asked.count, asked.resize)
    ref = _reference(asked, made)
    networks = {name: load(name, asked, device) for name in dict.fromkeys(METRICS[score] for score in asked.scores)}
    check_subsets(
        asked.scores, asked.kid_subset, [s.count for s in (made, ref) if isinstance(s, Pictures)], "--kid-subset"
    )
    total = (made.count + (ref.count if isinstance(ref, Pictures) else 0)) * len(networks)
    seen = Seen(tick, total)
    scores: dict[str, float] = {}
    for name, network in networks.items():
        mine = [score for score in asked.scores if METRICS[score] == name]
        x = gathered(made, network, asked.batch_size, any(score in ROWS for score in mine), device, seen)
        y = ref if isinstance(ref, Statistics) else None
        if isinstance(ref, Pictures) and not set(mine) <= set(ALONE):
            y = of_reference(ref, network, rows_needed(mine), asked.batch_size, device, seen)
        for score in mine:
            scores |= scored(score, x, y, network, asked.kid_subset)
    protocol = {
        "images": made.where, "reference": asked.ref, "count": made.count,
        "reference_count": ref.count if isinstance(ref, Pictures) else None,
        "size": list(made.size), "resized": made.preparation,
        "networks": {name: network.name for name, network in networks.items()},
    }  # fmt: skip
    if asked.kid_subset != metrics.KID_SUBSET and {"kid", "kd_dinov2"} & set(asked.scores):
        protocol["kid_subset"] = asked.kid_subset
    return {"scores": scores, "protocol": protocol}, _lines(scores, protocol, made, networks)


def check(scores: tuple[str, ...]) -> None:
    """Raise UsageError for a score that there is not."""
    if unknown := [name for name in scores if name not in METRICS]:
        raise UsageError(f"no score {unknown[0]!r}; there are: {', '.join(METRICS)}")
    for name in OF_RUNS:
        if name in scores:
            raise UsageError(f"{name} is measured on a run, not on pictures: gesso evaluate RUN eval.scores={name}")


def _reference(asked: Asked, made: Pictures) -> "Pictures | Statistics | None":
    """Pictures, or the statistics that a .npz holds."""
    if asked.ref is None:
        return None
    if asked.ref.endswith(".npz"):
        try:
            with np.load(asked.ref, allow_pickle=False) as arrays:
                if "mu" in arrays and "sigma" in arrays:
                    return _given(asked, arrays["mu"], arrays["sigma"])
        except FileNotFoundError:
            raise UsageError(f"there is no file {asked.ref}") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{asked.ref}: no .npz that can be read ({error})") from None
    ref = open_pictures(asked.ref, asked.resolution, resize=asked.resize)
    if ref.size != made.size:
        raise UsageError(
            f"{asked.images} is {made.size[0]}x{made.size[1]}, {asked.ref} {ref.size[0]}x{ref.size[1]}: --resolution "
            "brings both to one size"
        )
    return ref


def _given(asked: Asked, mean: np.ndarray, cov: np.ndarray) -> Statistics:
    if needing := [score for score in asked.scores if score in ROWS]:
        raise UsageError(f"{asked.ref} holds a mean and a covariance, {needing[0]} needs the pictures themselves")
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UsageError(f"{asked.ref}: mu {mean.shape} and sigma {cov.shape} do not fit together")
    return Statistics(Moments.of(torch.from_numpy(mean), torch.from_numpy(cov)))


def load(name: str, asked: Asked, device: torch.device | str) -> nn.Module:
    """A feature network: uint8 (B, C, H, W) -> (B, D). Raises UsageError that says which file is missing."""
    if name == "inception":
        return inception.load(asked.weights, device, whose=asked.inception)
    if name == "dinov2":
        return embed.DINOv2(asked.dinov2, device)
    if name == "lpips":
        return lpips.load(asked.lpips, asked.weights, device)
    if name == "clip":
        return embed.CLIPScore(asked.clip, device)
    if name == "clip_images":
        return embed.CLIPImages(asked.clip, device)
    if name == "shapes":
        return features.load_shape_features(device)
    return features.Grey(features.load_digit_features(device))


def rows_needed(scores: Sequence[str]) -> bool:
    """Of the reference, by any of these scores."""
    return any(score in ROWS and score not in ALONE for score in scores)


def check_subsets(scores: Sequence[str], subset: int, counts: Sequence[int], setting: str) -> None:
    """Raise UsageError for a kernel distance of fewer pictures than one of its subsets has."""
    names = [score for score in scores if score in ("kid", "kd_dinov2")]
    if names and min(counts) < subset:
        raise UsageError(
            f"{names[0]} is a mean over subsets of {subset:,} pictures, and one set has {min(counts):,}: measure more, or set "
            f"{setting} to {min(counts)} or fewer, which compares with no published number"
        )


def scored(
    score: str, x: Statistics, y: Statistics | None, network: nn.Module, kid_subset: int = metrics.KID_SUBSET
) -> dict[str, float]:
    """Numbers by name, of made pictures x beside a reference y."""
    if score == "is":
        mean, std = metrics.inception_score(
            _shuffled(network.probabilities(x.rows.to(next(network.parameters()).device)).cpu())
        )
        return {"is": mean, "is_std": std}
    if score in ("lpips", "told_digits"):
        *apart, coarse, fine = x.moments.mean.tolist()
        detail = (fine / coarse) ** 0.5 if coarse else 1.0
        return dict(zip((score, f"{score}_hr"), apart, strict=False)) | {"size_detail": detail}
    if score in ("agreement", "drawn"):
        return shipped.rates(network, x.rows)
    if score == "clip":
        return {"clip": float(x.moments.mean)}
    if score in ("kid", "kd_dinov2"):
        mean, std = metrics.kernel_distance(y.rows, x.rows, size=kid_subset)
        return {score: mean, f"{score}_std": std}
    if score in ("pr", "pr_dinov2"):
        device = _double_device(network)
        real, made = (_shuffled(rows).to(device) for rows in (y.rows, x.rows))
        real = real[:NEIGHBOURS]
        near, far = manifold.manifold(real, made, 3), manifold.manifold(real, made[:NEIGHBOURS], 5)
        end = score.removeprefix("pr")
        return {
            f"precision{end}": near.precision, f"recall{end}": near.recall,
            f"density{end}": far.density, f"coverage{end}": far.coverage,
        }  # fmt: skip
    a, b = x.moments, y.moments
    return {score: metrics.frechet_distance(a.mean, a.cov, b.mean, b.cov)}


def _double_device(network: nn.Module) -> torch.device:
    """Return the device of a network where it has float64, else the CPU."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" else device


def _shuffled(rows: Tensor) -> Tensor:
    """In an order of its own: sets are often sorted by class."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def _lines(
    scores: dict[str, float], protocol: dict[str, Any], made: Pictures, networks: dict[str, nn.Module]
) -> list[str]:
    lines = []
    for name, value in scores.items():
        if not name.endswith("_std"):
            spread = f" +- {scores[f'{name}_std']:.4f}" if f"{name}_std" in scores else ""
            lines.append(f"{name:20}{value:12.4f}{spread}")
    reference = f" beside {protocol['reference']}" if protocol["reference"] else ""
    count = f" ({protocol['reference_count']:,})" if protocol["reference_count"] else ""
    lines.append(
        f"{made.count:,} pictures of {made.size[0]}x{made.size[1]} in {made.where}{reference}{count}; "
        f"{', '.join(protocol['networks'].values())}"
    )
    return [*lines, *unusual_subsets(protocol), *too_few(made.count, scores, networks)]


def unusual_subsets(protocol: dict[str, Any]) -> list[str]:
    """A note where a kernel distance is over subsets of another size than published ones."""
    if "kid_subset" not in protocol:
        return []
    return [
        f"note: kernel distances over subsets of {protocol['kid_subset']:,}; published ones have {metrics.KID_SUBSET:,}"
    ]


def lower_is_better(name: str) -> bool:
    """Whether the best value of a number by that name, as `scored` has it, is the least."""
    return name.startswith(("fid", "fd_", "kid", "kd_", "lpips", "told_", "loss"))


def too_few(count: int, scores: Iterable[str], networks: dict[str, nn.Module]) -> list[str]:
    """A warning where a Frechet distance is of fewer samples than features."""
    width = max((networks[METRICS[name]].features for name in scores if name.startswith("f")), default=0)
    if count > width:
        return []
    return [
        f"note: {count:,} pictures do not fill a covariance of {width:,} features: Frechet distances of so few are far too "
        "large, and compare only at equal count"
    ]
