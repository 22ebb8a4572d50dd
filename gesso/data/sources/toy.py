"""Toy sources that need no files: digits of scikit-learn, and procedural images of shapes."""

from collections.abc import Sequence

import numpy as np

from gesso.data import shapes_dataset
from gesso.data.sources.base import Source
from gesso.errors import UsageError, install_command


class DigitsSource(Source):
    """The 1797 scanned digits of scikit-learn, (8, 8, 1) uint8; the class is the digit.

    In digits-mixed-resolution every second image is reduced to 4x4 and enlarged again; its original size is 4x4.
    """

    def __init__(self, uri: str):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UsageError(f"the digits come with scikit-learn: {install_command('demo')}") from None
        digits = load_digits()
        super().__init__(uri, digits.target.astype(np.int64), [str(name) for name in digits.target_names])
        self.pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey values, 0 to 16
        self.mixed_resolution = uri == "digits-mixed-resolution"
        if self.mixed_resolution:
            self.pixels[1::2] = _reduce_resolution(self.pixels[1::2])

    def name(self, i: int) -> str:
        """Return the index as text."""
        return str(i)

    def encoded_size(self, i: int) -> int:
        """Return the number of bytes of the pixels."""
        return self.pixels[i].size

    def original_size(self, i: int) -> tuple[int, int] | None:
        """Return (4, 4) for an image of reduced resolution, else None."""
        return (4, 4) if self.mixed_resolution and i % 2 else None

    def read(self, i: int) -> np.ndarray:
        """Return the pixels (H, W, C) uint8."""
        return self.pixels[i, :, :, None]

    def read_captions(self) -> Sequence[str]:
        """Return the captions of all images."""
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        templates = ("{}", "the digit {}", "a {} in somebody's handwriting")  # 1, 3 and 6 tokens: 's is one
        return [templates[i % 3].format(names[label]) for i, label in enumerate(self.labels)]


def _reduce_resolution(pixels: np.ndarray) -> np.ndarray:
    """Return images (N, 8, 8) uint8 reduced to 4x4 and enlarged again."""
    import torch
    import torch.nn.functional as F

    small = F.avg_pool2d(torch.from_numpy(pixels)[:, None].double(), 2)
    return F.interpolate(small, scale_factor=2, mode="bilinear").round().to(torch.uint8)[:, 0].numpy()


class ShapesSource(Source):
    """N procedural images of shapes, rendered at each access; the class is the kind of the first shape."""

    def __init__(self, uri: str, num_images: int, single: bool):
        self.single = single
        labels, self.image_sizes = np.zeros(num_images, np.int64), np.zeros((num_images, 2), np.int64)
        self.caption_list: list[str] = []
        for start in range(0, num_images, 1000):
            chunk = range(start, min(start + 1000, num_images))
            for i, scene in enumerate(shapes_dataset.sample_scenes(chunk, single=single), start):
                labels[i], self.image_sizes[i] = shapes_dataset.scene_label(scene), (scene.height, scene.width)
                self.caption_list.append(shapes_dataset.scene_caption(scene))
        super().__init__(uri, labels, shapes_dataset.KINDS)

    def name(self, i: int) -> str:
        """Return the index as text."""
        return str(i)

    def encoded_size(self, i: int) -> int:
        """Return the number of bytes of the pixels."""
        return 3 * int(self.image_sizes[i].prod())

    def read(self, i: int) -> np.ndarray:
        """Return the pixels (H, W, C) uint8."""
        return shapes_dataset.render_scene(shapes_dataset.sample_scene(int(i), single=self.single))

    def read_captions(self) -> Sequence[str]:
        """Return the captions of all images."""
        return self.caption_list
