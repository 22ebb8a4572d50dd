"""Registry of metrics. A new metric is one file in this package and one entry here."""

from collections.abc import Iterable

from gesso import config
from gesso.errors import UsageError
from gesso.evaluation.metrics import (
    frechet,
    half_splits,
    inception_score,
    kernel_distance,
    per_image,
    precision_recall,
    validation_loss,
)
from gesso.evaluation.metrics.base import Metric

DETAIL_LABEL = "detail of samples conditioned on the largest size, relative to the smallest"


def _precision_recall_labels(suffix: str, network: str) -> dict[str, str]:
    return {
        f"{name}{suffix}": f"{name} in {network}'s features" for name in ("precision", "recall", "density", "coverage")
    }


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "fid", "inception", frechet.compute, {"fid": "FID"},
            lower_is_better=True, needs=("reference",), short_label="FID",
        ),
        Metric(
            "kid", "inception", kernel_distance.compute, {"kid": "kernel distance of Inception's features"},
            lower_is_better=True, needs=("reference",), needs_features=True,
        ),
        Metric("is", "inception", inception_score.compute, {"is": "inception score"}, needs_features=True),
        Metric(
            "pr", "inception", precision_recall.compute, _precision_recall_labels("", "Inception"),
            needs=("reference",), needs_features=True,
        ),
        Metric(
            "fd_dinov2", "dinov2", frechet.compute, {"fd_dinov2": "Frechet distance of DINOv2's features"},
            lower_is_better=True, needs=("reference",), short_label="Frechet distance, DINOv2",
        ),
        Metric(
            "kd_dinov2", "dinov2", kernel_distance.compute, {"kd_dinov2": "kernel distance of DINOv2's features"},
            lower_is_better=True, needs=("reference",), needs_features=True,
        ),
        Metric(
            "pr_dinov2", "dinov2", precision_recall.compute, _precision_recall_labels("_dinov2", "DINOv2"),
            needs=("reference",), needs_features=True,
        ),
        Metric("clip", "clip", per_image.mean_score, {"clip": "CLIP score"}, needs=("captions",), needs_features=True),
        Metric(
            "fd_clip", "clip_images", frechet.compute, {"fd_clip": "Frechet distance of CLIP's features"},
            lower_is_better=True, needs=("reference",),
        ),
        Metric(
            "lpips", "lpips", per_image.size_diversity,
            {
                "lpips": "LPIPS between samples conditioned on different sizes",
                "lpips_hr": "LPIPS between samples conditioned on different sizes, leaving out sizes below the "
                "resolution",
                "size_detail": DETAIL_LABEL,
            },
            # Berrada et al. Table 2a. Section 3.1 speaks of ten generations; five sizes make ten pairs.
            lower_is_better=True, sizes=(64, 128, 256, 512, 1024),
        ),
        Metric(
            "digits_feature_distance", "digits_distance", per_image.size_diversity,
            {
                "digits_feature_distance": "distance in the features of a small digit classifier between samples "
                "conditioned on 4x4 and 8x8; not LPIPS",
                "size_detail": DETAIL_LABEL,
            },
            lower_is_better=True, sizes=(4, 8),  # those of data.source=digits-mixed-resolution
        ),
        Metric(
            "fd_digits", "digits", frechet.compute,
            {"fd_digits": "Frechet distance in the features of a small digit classifier; not FID"},
            lower_is_better=True, needs=("reference",), short_label="Frechet distance, digit features",
        ),
        Metric(
            "frechet_distance", "digits", half_splits.compute,
            {"frechet_distance": "Frechet distance in the features of a small digit classifier to halves of the "
             "training images; not FID"},
            lower_is_better=True, needs=("training_images",), needs_features=True, short_label="Frechet distance",
        ),
        Metric(
            "class_accuracy", "classifier", per_image.class_accuracy,
            {"class_accuracy": "share of samples that a small classifier assigns to their class"},
            needs=("labels",), needs_features=True, short_label="class accuracy", is_share=True,
        ),
        Metric(
            "fd_fashion", "fashion", frechet.compute,
            {"fd_fashion": "Frechet distance in the features of a small classifier of Fashion-MNIST; not FID"},
            lower_is_better=True, needs=("reference",), short_label="Frechet distance, Fashion-MNIST features",
        ),
        Metric(
            "fd_shapes", "shapes", frechet.compute,
            {"fd_shapes": "Frechet distance in the features of a small classifier of drawn shapes; not FID"},
            lower_is_better=True, needs=("reference",), short_label="Frechet distance, shape features",
        ),
        Metric(
            "shape_accuracy", "shapes_reader", per_image.shape_accuracy,
            {
                "all": "share of samples in which every drawn shape matches the caption or class (exact reader)",
                **{
                    name: f"share of drawn shapes whose {name} matches the condition (exact reader)"
                    for name in ("colour", "kind", "pair", "place", "side", "relation", "sided")
                },
                "flipped": "share of drawn shapes on the side opposite to their caption (exact reader)",
                "border": "share of drawn shapes that the border cuts",
            },
            needs=("labels",), needs_features=True, is_share=True,
        ),
        Metric(
            "loss", "validation", validation_loss.compute, {"loss": "validation loss"},
            lower_is_better=True, needs=("validation",), needs_features=True,
        ),
    )
}  # fmt: skip
"""Metrics by name."""

TOY_METRICS: dict[str, tuple[str, ...]] = {
    "digits": ("frechet_distance", "class_accuracy"),
    "shapes": ("shape_accuracy",),
    "none": (),
}
"""Metrics of each value of eval.toy_metrics, the main one first."""


def select_metrics(names: Iterable[str]) -> list[Metric]:
    """Return metrics by their names in eval.metrics or --metrics.

    Raises:
        UsageError: There is no such metric, or it is one of eval.toy_metrics only.
    """
    selected = []
    for name in names:
        if name not in METRICS:
            raise UsageError(f"no metric {name!r}; {config.suggest(name, list(METRICS))}")
        if "training_images" in METRICS[name].needs:
            raise UsageError(f"{name} is computed by eval.toy_metrics=digits, not by eval.metrics")
        selected.append(METRICS[name])
    return selected


METRIC_OF_VALUE: dict[str, Metric] = {name: metric for metric in METRICS.values() for name in metric.labels}
"""Metric of each number that metrics return."""


def value_labels() -> dict[str, str]:
    """Return the description of every number that a metric returns."""
    return {name: metric.labels[name] for name, metric in METRIC_OF_VALUE.items()}


def short_label(name: str) -> str:
    """Return a short label of a number."""
    metric = METRIC_OF_VALUE.get(name)
    return metric.short_label if metric and metric.short_label and metric.name == name else name.replace("_", " ")


def format_value(name: str, value: float, spread: float | None = None) -> str:
    """Return a number as text, shares in percent, with its spread if it has one."""
    metric = METRIC_OF_VALUE.get(name)
    text = f"{value:.1%}" if metric and metric.is_share else f"{value:.4g}"
    return text if spread is None else f"{text} \u00b1 {spread:.2g}"
