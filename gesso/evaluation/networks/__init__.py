"""Registry of feature networks: Inception, LPIPS, CLIP, DINOv2, and small networks that ship with gesso."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from gesso.config import EvalConfig
from gesso.evaluation.networks import clip_dino, downloads, inception, lpips, toy_networks
from gesso.evaluation.networks.base import FeatureNetwork
from gesso.evaluation.networks.downloads import WeightFile


@dataclass(frozen=True)
class NetworkEntry:
    """Constructor of a feature network and the files that it needs.

    Attributes:
        load: Return the network on a device, for images of a size (height, width) in pixels. Raises UsageError if a
            file is missing or the network does not read such images.
        weight_files: Public files that it reads.
        hub_setting: Name of the setting in `eval` that holds the folder or hub id of the model.
    """

    load: Callable[[EvalConfig, torch.device | str, tuple[int, int]], FeatureNetwork]
    weight_files: Callable[[EvalConfig], tuple[WeightFile, ...]] = lambda cfg: ()
    hub_setting: str | None = None


def weights_dir(cfg: EvalConfig) -> Path | None:
    """Return the folder with weight files; None is PyTorch's cache."""
    return Path(cfg.weights_dir) if cfg.weights_dir else None


NETWORKS: dict[str, NetworkEntry] = {
    "inception": NetworkEntry(
        lambda cfg, device, size: inception.load_inception(weights_dir(cfg), device, cfg.inception),
        lambda cfg: (downloads.INCEPTION_FILES[cfg.inception],),
    ),
    "dinov2": NetworkEntry(lambda cfg, device, size: clip_dino.DINOv2(cfg.dinov2, device), hub_setting="dinov2"),
    "clip": NetworkEntry(lambda cfg, device, size: clip_dino.CLIPScore(cfg.clip, device), hub_setting="clip"),
    "clip_images": NetworkEntry(
        lambda cfg, device, size: clip_dino.CLIPImageFeatures(cfg.clip, device), hub_setting="clip"
    ),
    "lpips": NetworkEntry(
        lambda cfg, device, size: lpips.load_lpips(cfg.lpips, weights_dir(cfg), device),
        lambda cfg: lpips.BACKBONES[cfg.lpips].weight_files,
    ),
    "digits": NetworkEntry(lambda cfg, device, size: toy_networks.load_digit_features(device)),
    "fashion": NetworkEntry(lambda cfg, device, size: toy_networks.load_fashion_features(device)),
    "classifier": NetworkEntry(
        lambda cfg, device, size: toy_networks.LabelMatch(toy_networks.load_classifier(size, device))
    ),
    "digits_distance": NetworkEntry(lambda cfg, device, size: toy_networks.DigitDistance(device)),
    "shapes": NetworkEntry(lambda cfg, device, size: toy_networks.load_shape_features(device)),
    "shapes_reader": NetworkEntry(lambda cfg, device, size: toy_networks.ShapeMatch()),
}
"""Feature networks by the name that metrics refer to."""


def load_networks(
    names: Iterable[str], cfg: EvalConfig, device: torch.device | str, size: tuple[int, int]
) -> dict[str, FeatureNetwork]:
    """Return feature networks by name, for images of a size (height, width). Names without a network are skipped."""
    return {name: NETWORKS[name].load(cfg, device, size) for name in dict.fromkeys(names) if name in NETWORKS}
