"""Map-style data sets of the user as a source (gesso.extend)."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from gesso import extensions
from gesso.data.sources.base import RawImage, Source, validate_labels
from gesso.errors import UsageError


class CustomSource(Source):
    """A map-style data set: d[i] is an image, a pair (image, label), or a mapping of image, label and caption.

    All items are read once when the source is opened, for labels, captions and the fingerprint. A data set that has the
    attributes `labels` (N,) and `fingerprint` (text that changes with the images) is not read then; `captions` (N) and
    `class_names` are optional attributes.
    """

    def __init__(self, uri: str, name: str):
        if name not in extensions.DATASETS:
            raise extensions.missing("data.source", uri, extensions.DATASETS)
        self.dataset = extensions.DATASETS[name]()
        count = len(self.dataset)
        if not count:
            raise UsageError(f"data.source={uri}: the data set is empty")
        labels, captions = getattr(self.dataset, "labels", None), getattr(self.dataset, "captions", None)
        known = getattr(self.dataset, "fingerprint", None)
        self.hashes: Sequence[str] = ()
        if known is None or labels is None:
            labels, captions, self.hashes = self._read_all(uri, count)
        self.all_captions = list(captions) if captions is not None else [""] * count
        values = [int(label) for label in labels]
        array = validate_labels(uri, values, self.name)
        if len(array) != count or len(self.all_captions) != count:
            raise UsageError(
                f"data.source={uri}: {len(array)} labels, {len(self.all_captions)} captions, {count} items"
            )
        class_names = tuple(map(str, getattr(self.dataset, "class_names", ())))
        if not class_names and array.any():
            class_names = tuple(str(i) for i in range(int(array.max()) + 1))
        elif class_names and array.max() >= len(class_names):
            raise UsageError(f"data.source={uri}: label {array.max()}, but {len(class_names)} class_names")
        self.known_fingerprint = str(known) if known is not None and not self.hashes else None
        super().__init__(uri, array, class_names)

    def _read_all(self, uri: str, count: int) -> tuple[list[int], list[str], list[str]]:
        """Return labels, captions and hashes of all items."""
        labels, captions, hashes = [], [], []
        for i in range(count):
            image, label, caption = _split_item(uri, i, self.dataset[i])
            labels.append(label)
            captions.append(caption)
            hashes.append(hashlib.sha256(_to_array(uri, i, image).tobytes()).hexdigest())
        return labels, captions, hashes

    def name(self, i: int) -> str:
        """Return the index as text."""
        return str(i)

    def encoded_size(self, i: int) -> int:
        """Return a number that changes with the image; 0 if the data set has a fingerprint of its own."""
        return int(self.hashes[i][:15], 16) if self.hashes else 0

    def read(self, i: int) -> RawImage:
        """Return the pixels (H, W, C) uint8."""
        return _to_array(self.uri, i, _split_item(self.uri, i, self.dataset[i])[0])

    def read_captions(self) -> Sequence[str]:
        """Return all captions."""
        return self.all_captions

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the images, labels, classes and captions."""
        listed = super().fingerprint()
        if self.known_fingerprint is None:
            return listed
        return hashlib.sha256(f"{listed} {self.known_fingerprint}".encode()).hexdigest()[:16]


def _split_item(uri: str, i: int, item: Any) -> tuple[Any, int, str]:
    """Return image, label (0 without classes) and caption of an item."""
    if isinstance(item, Mapping):
        if unknown := item.keys() - {"image", "label", "caption"}:
            raise UsageError(
                f"data.source={uri}: item {i} has the key {sorted(unknown)[0]!r}; use image, label, caption"
            )
        if "image" not in item:
            raise UsageError(f"data.source={uri}: item {i} has no key 'image'")
        return item["image"], int(item.get("label", 0)), str(item.get("caption", ""))
    if isinstance(item, tuple | list):
        if len(item) != 2:
            raise UsageError(f"data.source={uri}: item {i} has {len(item)} parts; return (image, label) or a mapping")
        return item[0], int(item[1]), ""
    return item, 0, ""


def _to_array(uri: str, i: int, image: Any) -> np.ndarray:
    """Return pixels (H, W, C) uint8, C 1 or 3."""
    if isinstance(image, Image.Image):
        image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    elif isinstance(image, Tensor):
        image = image.numpy() if image.ndim == 2 else image.permute(1, 2, 0).numpy()
    array = np.asarray(image)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise UsageError(
            f"data.source={uri}: item {i} is {array.dtype} of shape {array.shape}; return a PIL image or uint8 pixels, "
            "(H, W), (H, W, C) in NumPy or (C, H, W) in torch, with 1 or 3 channels"
        )
    return np.ascontiguousarray(array)
