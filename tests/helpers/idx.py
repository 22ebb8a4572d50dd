"""Small IDX files, and the folder of Fashion-MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np

FASHION_MNIST = Path(__file__).parents[3] / "shared" / "data" / "fashion-mnist"
"""next to the repository; tests that need it are skipped without it"""
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
LABELS = np.array([0, 2, 1, 2, 0, 1, 2], np.uint8)


def to_idx(array: np.ndarray) -> bytes:
    """Return an array of unsigned bytes in IDX format."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, split: str = "train", gz: bool = False, images=IMAGES, labels=LABELS) -> Path:
    """Write images and labels of one split as IDX files; return the folder."""
    folder.mkdir(exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = to_idx(array)
        path = folder / f"{split}-{kind}-ubyte{'.gz' if gz else ''}"
        path.write_bytes(gzip.compress(content) if gz else content)
    return folder
