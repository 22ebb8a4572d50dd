"""Random data that replace a missing source, to estimate the cost of a run."""

import os

import torch
from torch import Tensor

from gesso.config import RunConfig
from gesso.data.base import Dataset, SampleBatch
from gesso.data.encoders.text import DEFAULT_WORD_DIM, EncodedText
from gesso.data.factory import is_cache_uri
from gesso.data.sources import NAMED_SOURCES, split_uri

NUM_IMAGES, NUM_CLASSES, TEXT_DIM = 4096, 1000, 768
"""Number of images; number of classes, as in ImageNet; channels of a token, as in CLIP ViT-L/14."""


class SyntheticDataset(Dataset):
    """Dataset of random samples with the shapes that the settings of a run imply."""

    notes, unreadable = [], []

    def __init__(self, run: RunConfig):
        self.run, self.uri, self.has_latents = run, run.data.source, bool(run.latent.vae)
        self.labels = torch.arange(NUM_IMAGES) % NUM_CLASSES
        self.captions = [""] * NUM_IMAGES
        self.text_config = run.semantic if run.semantic.kind == "text" else None
        self.class_names = () if self.text_config else tuple(str(i) for i in range(NUM_CLASSES))

    def get(self, indices: Tensor, sample_index: Tensor) -> SampleBatch:
        """Return random samples of len(indices)."""
        n, run, side = len(indices), self.run, self.run.input_spec.resolution
        x = torch.randint(256, (n, run.x0_channels, side, side), dtype=torch.uint8)
        if self.has_latents:
            shape = (n, run.x0_channels, side, side)
            x = torch.cat([torch.randn(shape), torch.full(shape, 0.1)], dim=1)
        boxes = torch.tensor([0.0, 0.0, 1000.0, 1000.0]).expand(n, 4)
        texts, cfg = None, run.semantic
        if self.text_config:
            assert cfg.embed_dim is not None and cfg.pooled_dim is not None
            tokens, pooled = torch.randn(n, cfg.max_tokens, cfg.embed_dim), torch.randn(n, cfg.pooled_dim)
            texts = EncodedText(tokens, torch.full((n,), -(-cfg.max_tokens // 4)), pooled)
        sizes, flips = torch.full((n, 2), run.data.resolution), torch.zeros(n, dtype=torch.bool)
        return SampleBatch(x, sizes, boxes, flips, torch.full((n, 2), 99.0), self.labels[indices], indices, texts)

    def get_unaugmented(self, indices: Tensor) -> SampleBatch:
        """Return random samples, as `get` does."""
        return self.get(indices, indices)

    def channel_stats(self) -> tuple[Tensor, Tensor]:
        """Raise NotImplementedError: random data have no statistics."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Return a constant."""
        return "synthetic"


def with_synthetic_data(run: RunConfig) -> tuple[RunConfig, Dataset]:
    """Return the run, completed as a typical dataset would complete it, and its random dataset."""
    width = run.semantic.embed_dim or (DEFAULT_WORD_DIM if run.semantic.encoder == "words" else TEXT_DIM)
    dims = dict(embed_dim=width, pooled_dim=run.semantic.pooled_dim or width) if run.semantic.kind == "text" else {}
    channels = run.x0_channels
    classes = NUM_CLASSES if run.semantic.kind == "label" else 0
    data = dict(num_classes=classes, num_images=NUM_IMAGES, mean=(0.0,) * channels, std=(1.0,) * channels)
    changes = {"semantic": run.semantic.model_copy(update=dims), "data": run.data.model_copy(update=data)}
    run = run.model_copy(update=changes)
    return run, SyntheticDataset(run)


def source_exists(source: str) -> bool:
    """Return True if data.source is a toy source, a cache, a pattern or an existing path."""
    return (
        source.partition(":")[0] in NAMED_SOURCES
        or is_cache_uri(source)
        or "{" in source
        or (source != "" and os.path.exists(split_uri(source)[0]))
    )
