"""What numbers stand for, in words."""

from collections.abc import Sequence

from gesso.tables import measures
from gesso.tables.plan import Job
from gesso.tables.table import Table

WORDS = {
    "fid": "FID",
    "kid": "kernel distance of Inception's features",
    "is": "inception score",
    "fd_dinov2": "Frechet distance of DINOv2's features",
    "kd_dinov2": "kernel distance of DINOv2's features",
    "clip": "CLIP score",
    "fd_clip": "Frechet distance of CLIP's features",
    "lpips": "LPIPS between samples told different sizes",
    "lpips_hr": "LPIPS between samples told different sizes, those below the resolution left out",
    "fd_digits": "Frechet distance in the features of a small classifier of digits; it is not FID",
    "told_digits": "distance in the features of a small classifier of digits between samples told 4x4 and 8x8; it is not LPIPS",
    "fd_shapes": "Frechet distance in the features of a small classifier of drawn shapes; it is not FID",
    "class_agreement": "share of samples that a small classifier of digits reads as their class",
    "all": "share of drawn shapes that are all that their caption or class says, read back exactly",
    "border": "share of drawn shapes that are cut by the border",
    "flipped": "share of drawn shapes on the mirrored side of what their caption says, read back exactly",
    "params": "millions of parameters",
    "params_both": "billions of parameters of the network and of its guide",
    "gmacs": "billions of multiply-accumulates of an evaluation",
    "gflops": "billions of FLOPs of an evaluation, as Berrada et al. count them",
    "nfe": "evaluations of a sample",
    "training": "10^21 multiply-accumulates of a training",
    "sampling": "10^12 multiply-accumulates of a sample",
    "pictures": "how many are shown below",
    "padding_share": "share that falls on padding tokens",
    "entropy": "entropy of the attention to text tokens, over that of even attention",
    "alike": "mean cosine of tokens and their copies",
}
"""what numbers stand for, by the name among those found"""
SHORT = {
    "fid": "FID",
    "fd_digits": "Frechet distance, features of digits",
    "fd_shapes": "Frechet distance, features of shapes",
    "fd_dinov2": "Frechet distance, DINOv2",
    "alpha_bar": "share of the signal",
}
"""on the axis of a picture, where the name among those found would not do"""
READ_BACK = ("colour", "kind", "pair", "place", "side", "relation", "sided")


def stands(table: Table, todo: Sequence[Job]) -> dict[str, str]:
    """What is measured in the place of each column, in words; columns of the same together."""
    found: dict[str, dict[str, None]] = {column.name: {} for column in table.columns}
    for job in todo:
        for column, name in job.part.columns.items():
            best = f", the {job.part.best} over {', '.join(varied(column, todo))}" if job.part.best else ""
            found[column][_words(job.part.by, name) + best] = None
    told: dict[str, list[str]] = {}
    for column, words in found.items():
        told.setdefault(", or ".join(words) or "not made at this scale", []).append(column)
    return {"; ".join(columns): words for words, columns in told.items()}


def varied(column: str, todo: Sequence[Job]) -> list[str]:
    """Names of the settings that several parts of one cell differ in."""
    values: dict[tuple[str, str], set[str]] = {}
    for job in todo:
        if column in job.part.columns:
            for setting in job.part.rows[job.row].measure:
                name, _, value = setting.partition("=")
                values.setdefault((name, job.row), set()).add(value)
    return list(dict.fromkeys(name for (name, _), some in values.items() if len(some) > 1))


def _words(by: str, name: str) -> str:
    plain = name.removeprefix("1-")
    if plain in WORDS:
        said = WORDS[plain]
    elif plain in READ_BACK:
        said = f"share of drawn shapes whose {plain} is as asked, read back exactly"
    elif by == "scores":
        said = plain
    else:
        told = (measures.FOUND[by].__doc__ or by).strip().splitlines()[0].rstrip(".")
        said = f"{plain} ({told[0].lower()}{told[1:]})"
    return said if plain == name else f"what is left to 1 of the {said}"
