"""Features of sets of pictures, and what is kept of them: moments, and rows where a score needs every one.

Those of a reference are kept in the cache, by the fingerprint of its pictures and of the network's weights.

Legend: B pictures of a batch, N of a set, D features.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso import atomic_io
from gesso.errors import RunError
from gesso.evaluation.image_source import ImageSet
from gesso.evaluation.metrics import toy_metrics
from gesso.evaluation.metrics.functional import Moments
from gesso.evaluation.networks import clip_dino

ProgressCallback = Callable[[int, int], None]


class SampleConditions(NamedTuple):
    """What pictures of a batch were to show."""

    labels: Sequence[int] | None = None
    captions: Sequence[str] | None = None


class FeatureStats(NamedTuple):
    """Of the features of a set. rows (N, D) float32 where they were kept."""

    moments: Moments
    features: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """As they are stored; the covariance of a single picture as 0, for `joined`."""
        mean, n = self.moments.mean, self.moments.n
        found = {
            "mean": mean,
            "cov": self.moments.cov if n > 1 else mean.new_zeros(len(mean), len(mean)),
            "n": torch.tensor(n),
        }
        return found if self.features is None else found | {"rows": self.features}


def load_stats(path: Path) -> FeatureStats:
    """What `tensors` gave. Raises RunError where the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            moments = Moments.from_mean_cov(file.get_tensor("mean"), file.get_tensor("cov"), int(file.get_tensor("n")))
            return FeatureStats(moments, file.get_tensor("rows") if "rows" in file.keys() else None)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); remove it") from None


def merge_stats(parts: Iterable[FeatureStats]) -> FeatureStats:
    """Of all sets together, in order."""
    moments, rows = Moments(), []
    for part in parts:
        moments.merge(part.moments)
        rows.append(part.features)
    return FeatureStats(moments, None if None in rows else torch.cat(rows))


class Progress:
    """Counts pictures over several sets."""

    def __init__(self, callback: ProgressCallback, total: int):
        self.callback, self.total, self.done = callback, total, 0

    def __call__(self, n: int) -> None:
        self.done += n
        self.callback(self.done, self.total)


@torch.no_grad()
def compute_stats(
    images: ImageSet,
    network: nn.Module,
    batch_size: int,
    keep_features: bool,
    device: torch.device | str,
    progress: Callable[[int], None],
    indices: range | None = None,
) -> FeatureStats:
    """Of all pictures, or of some that follow one another. Raises RunError where features are not finite."""
    indices = range(images.num_images) if indices is None else indices
    moments, rows, at = Moments(), [], indices.start
    captions = images.captions() if isinstance(network, clip_dino.CLIPScore) else None
    for batch in images.batches(batch_size, indices.start, indices.stop):
        found = extract_features(
            network, batch.to(device), SampleConditions(None, captions and captions[at : at + len(batch)])
        )
        moments.update(found)
        at += len(batch)
        if keep_features:
            rows.append(found)
        progress(len(batch))
    return FeatureStats(moments, torch.cat(rows) if keep_features else None)


def extract_features(network: nn.Module, images: Tensor, conditions: SampleConditions) -> Tensor:
    """(B, D) on the CPU; of CLIP the scores (B, 1), of the judges that are shipped their answers (B, K)."""
    if isinstance(network, clip_dino.CLIPScore):
        return network(images, conditions.captions)[:, None].cpu()
    if isinstance(network, toy_metrics.ClassAccuracy | toy_metrics.ShapeAccuracy):
        return network(images, conditions.labels, conditions.captions)
    return network(images).cpu()


class CachedReference(NamedTuple):
    """Where the statistics of a reference are kept, and what they are of."""

    path: Path
    identity: dict[str, str]

    def write(self, stats: FeatureStats) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_io.atomic_file(self.path) as temporary:
            save_file(stats.to_tensors(), temporary, {"gesso": json.dumps(self.identity)})


def cached_reference(reference: ImageSet, network: nn.Module, needs_features: bool) -> CachedReference:
    """rows: whether those are needed too."""
    told = {"pictures": reference.fingerprint, "network": network.name, "weights": _weights_digest(network)}
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]
    return CachedReference(
        atomic_io.cache_dir("statistics") / f"{key}{'-rows' if needs_features else ''}.safetensors", told
    )


def reference_stats(
    reference: ImageSet,
    network: nn.Module,
    needs_features: bool,
    batch_size: int,
    device: torch.device | str,
    progress: Progress,
) -> FeatureStats:
    """Those kept from an earlier time, where pictures and network are the same."""
    place = cached_reference(reference, network, needs_features)
    if place.path.is_file():
        found = load_stats(place.path)
        progress(reference.num_images)
        return found
    found = compute_stats(reference, network, batch_size, needs_features, device, progress)
    place.write(found)
    return found


def _weights_digest(network: nn.Module) -> str:
    """Of all weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
