"""Random data in place of a missing source, to estimate the cost of a run."""

import os

import torch
from torch import Tensor

from gesso.config import RunConfig
from gesso.data.base import Dataset, SampleBatch
from gesso.data.encoders.text import DEFAULT_WORD_DIM, EncodedText
from gesso.data.factory import is_cache_uri
from gesso.data.sources import NAMED_SOURCES

NUM_CLASSES, TEXT_DIM = 1000, 768
"""Number of classes of ImageNet; channels of the tokens of CLIP ViT-L/14."""


class SyntheticDataset(Dataset):
    """Dataset of random samples with the shapes that the settings of a run imply."""

    notes, unreadable = [], []

    def __init__(self, run: RunConfig):
        self.run, self.uri, n = run, run.data.source, 4096
        text = run.semantic.kind == "text"
        self.labels = torch.arange(n) % NUM_CLASSES
        self.captions = [""] * n
        self.class_names = () if text else tuple(str(i) for i in range(NUM_CLASSES))
        self.has_latents = bool(run.latent.vae)
        self.text_config = run.semantic if text else None

    def get(self, indices: Tensor, sample_index: Tensor) -> SampleBatch:
        """Return random samples of len(indices)."""
        n, run, side = len(indices), self.run, self.run.input_spec.resolution
        x = torch.randint(256, (n, run.x0_channels, side, side), dtype=torch.uint8)
        if self.has_latents:
            x = torch.cat(
                [torch.randn(n, run.x0_channels, side, side), torch.full((n, run.x0_channels, side, side), 0.1)], 1
            )
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
        return "imagined"


def with_synthetic_data(run: RunConfig) -> tuple[RunConfig, Dataset]:
    """Return the run, completed as a typical dataset would complete it, and its random dataset."""
    width = run.semantic.embed_dim or (DEFAULT_WORD_DIM if run.semantic.encoder == "words" else TEXT_DIM)
    dims = dict(embed_dim=width, pooled_dim=run.semantic.pooled_dim or width) if run.semantic.kind == "text" else {}
    channels = run.x0_channels
    classes = NUM_CLASSES if run.semantic.kind == "label" else 0
    data = dict(num_classes=classes, num_images=4096, mean=(0.0,) * channels, std=(1.0,) * channels)
    changes = {"semantic": run.semantic.model_copy(update=dims), "data": run.data.model_copy(update=data)}
    run = run.model_copy(update=changes)
    return run, SyntheticDataset(run)


def source_exists(source: str) -> bool:
    """Return whether data.source names a toy source, a cache, a pattern or an existing path."""
    return (
        source.partition(":")[0] in NAMED_SOURCES
        or is_cache_uri(source)
        or "{" in source
        or (source != "" and os.path.exists(source))
    )
