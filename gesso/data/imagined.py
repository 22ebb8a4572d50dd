"""Random samples in the place of a source that is not there yet: what a run costs does not depend on what it sees."""

import os

import torch
from torch import Tensor

from gesso.config import Run
from gesso.data.dataset import is_cached
from gesso.data.samples import Dataset, Samples
from gesso.data.sources import NAMED
from gesso.data.text import WORDS_WIDTH, Encoded

CLASSES, CAPTION = 1000, 768
"""ImageNet's classes; channels of CLIP ViT-L/14's tokens"""


class Imagined(Dataset):
    """Random samples of the shape that the settings say, in the place of a source that is not there yet."""

    notes, unreadable = [], []

    def __init__(self, run: Run):
        self.run, self.where, n = run, run.data.source, 4096
        text = run.semantic.kind == "text"
        self.labels = torch.arange(n) % CLASSES
        self.captions = [""] * n
        self.class_names = () if text else tuple(str(i) for i in range(CLASSES))
        self.latents = bool(run.latent.vae)
        self.encoded = run.semantic if text else None

    def take(self, index: Tensor, counter: Tensor) -> Samples:
        n, run, side = len(index), self.run, self.run.inputs.resolution
        x = torch.randint(256, (n, run.channels, side, side), dtype=torch.uint8)
        if self.latents:
            x = torch.cat([torch.randn(n, run.channels, side, side), torch.full((n, run.channels, side, side), 0.1)], 1)
        whole = torch.tensor([0.0, 0.0, 1000.0, 1000.0]).expand(n, 4)
        texts, cfg = None, run.semantic
        if self.encoded:
            tokens, pooled = torch.randn(n, cfg.tokens, cfg.width), torch.randn(n, cfg.pooled_width)
            texts = Encoded(tokens, torch.full((n,), -(-cfg.tokens // 4)), pooled)
        sizes, flips = torch.full((n, 2), run.data.resolution), torch.zeros(n, dtype=torch.bool)
        return Samples(x, sizes, whole, flips, torch.full((n, 2), 99.0), self.labels[index], index, texts)

    def pictures(self, index: Tensor) -> Tensor:
        raise NotImplementedError

    def moments(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "imagined"


def imagined(run: Run) -> tuple[Run, Dataset]:
    """A run completed by what a usual source would tell."""
    width = run.semantic.width or (WORDS_WIDTH if run.semantic.encoder == "words" else CAPTION)
    told = dict(width=width, pooled_width=run.semantic.pooled_width or width) if run.semantic.kind == "text" else {}
    channels = run.channels
    classes = CLASSES if run.semantic.kind == "label" else 0
    data = dict(num_classes=classes, num_images=4096, mean=(0.0,) * channels, std=(1.0,) * channels)
    changes = {"semantic": run.semantic.model_copy(update=told), "data": run.data.model_copy(update=data)}
    run = run.model_copy(update=changes)
    return run, Imagined(run)


def is_there(source: str) -> bool:
    return (
        source.partition(":")[0] in NAMED
        or is_cached(source)
        or "{" in source
        or (source != "" and os.path.exists(source))
    )
