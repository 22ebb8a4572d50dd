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

from gesso import files
from gesso.errors import RunError
from gesso.evaluate import embed, shipped
from gesso.evaluate.metrics import Moments
from gesso.evaluate.pictures import Pictures

Tick = Callable[[int, int], None]


class Told(NamedTuple):
    """What pictures of a batch were to show."""

    labels: Sequence[int] | None = None
    captions: Sequence[str] | None = None


class Statistics(NamedTuple):
    """Of the features of a set. rows (N, D) float32 where they were kept."""

    moments: Moments
    rows: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored; the covariance of a single picture as 0, for `joined`."""
        mean, n = self.moments.mean, self.moments.n
        found = {
            "mean": mean,
            "cov": self.moments.cov if n > 1 else mean.new_zeros(len(mean), len(mean)),
            "n": torch.tensor(n),
        }
        return found if self.rows is None else found | {"rows": self.rows}


def stored(path: Path) -> Statistics:
    """What `tensors` gave. Raises RunError where the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            moments = Moments.of(file.get_tensor("mean"), file.get_tensor("cov"), int(file.get_tensor("n")))
            return Statistics(moments, file.get_tensor("rows") if "rows" in file.keys() else None)  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); remove it") from None


def joined(parts: Iterable[Statistics]) -> Statistics:
    """Of all sets together, in order."""
    moments, rows = Moments(), []
    for part in parts:
        moments.merge(part.moments)
        rows.append(part.rows)
    return Statistics(moments, None if None in rows else torch.cat(rows))


class Seen:
    """Counts pictures over several sets."""

    def __init__(self, tick: Tick, total: int):
        self.tick, self.total, self.done = tick, total, 0

    def __call__(self, n: int) -> None:
        self.done += n
        self.tick(self.done, self.total)


@torch.no_grad()
def gathered(
    pictures: Pictures,
    network: nn.Module,
    size: int,
    keep: bool,
    device: torch.device | str,
    seen: Callable[[int], None],
    some: range | None = None,
) -> Statistics:
    """Of all pictures, or of some that follow one another. Raises RunError where features are not finite."""
    some = range(pictures.count) if some is None else some
    moments, rows, at = Moments(), [], some.start
    captions = pictures.captions() if isinstance(network, embed.CLIPScore) else None
    for batch in pictures.batches(size, some.start, some.stop):
        found = features_of(network, batch.to(device), Told(None, captions and captions[at : at + len(batch)]))
        moments.update(found)
        at += len(batch)
        if keep:
            rows.append(found)
        seen(len(batch))
    return Statistics(moments, torch.cat(rows) if keep else None)


def features_of(network: nn.Module, images: Tensor, told: Told) -> Tensor:
    """(B, D) on the CPU; of CLIP the scores (B, 1), of the judges that are shipped their answers (B, K)."""
    if isinstance(network, embed.CLIPScore):
        return network(images, told.captions)[:, None].cpu()
    if isinstance(network, shipped.Agreement | shipped.Drawn):
        return network(images, told.labels, told.captions)
    return network(images).cpu()


class Kept(NamedTuple):
    """Where the statistics of a reference are kept, and what they are of."""

    path: Path
    told: dict[str, str]

    def write(self, found: Statistics) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(self.path) as temporary:
            save_file(found.tensors(), temporary, {"gesso": json.dumps(self.told)})


def kept(reference: Pictures, network: nn.Module, rows: bool) -> Kept:
    """rows: whether those are needed too."""
    told = {"pictures": reference.fingerprint, "network": network.name, "weights": _digest(network)}
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]
    return Kept(files.kept("statistics") / f"{key}{'-rows' if rows else ''}.safetensors", told)


def of_reference(
    reference: Pictures, network: nn.Module, rows: bool, size: int, device: torch.device | str, seen: Seen
) -> Statistics:
    """Those kept from an earlier time, where pictures and network are the same."""
    place = kept(reference, network, rows)
    if place.path.is_file():
        found = stored(place.path)
        seen(reference.count)
        return found
    found = gathered(reference, network, size, rows, device, seen)
    place.write(found)
    return found


def _digest(network: nn.Module) -> str:
    """Of all weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()
