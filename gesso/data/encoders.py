"""Text into tokens. `Words` needs no download: a fixed random vector for every word that there is.

Legend: N captions, T tokens, D channels of a token.
"""

import hashlib
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from gesso import keyed
from gesso.config import Semantic


def words_of(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


class Words:
    """Each word (letters and digits, in lower case) is one token: its random vector plus its position's sinusoids."""

    def __init__(self, cfg: Semantic):
        self.T, self.D = cfg.tokens, cfg.width

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, D) float32, zeros after each caption; lengths (N,)."""
        split = [words_of(caption) for caption in captions]
        vectors = self._vectors(sorted({word for words in split for word in words}))
        positions = self._positions()
        tokens = torch.zeros(len(captions), self.T, self.D)
        for i, words in enumerate(split):
            for j, word in enumerate(words[: self.T]):
                tokens[i, j] = (vectors[word] + positions[j]) / math.sqrt(1.5)
        return tokens, torch.tensor([min(len(words), self.T) for words in split])

    def cut(self, captions: Sequence[str]) -> list[str]:
        """A line for each caption of more than T words: what is not seen of it."""
        long = [(caption, words) for caption in captions if len(words := words_of(caption)) > self.T]
        return [
            f"{caption!r}: of {len(words)} words the first {self.T} are seen, cut from {words[self.T]!r} on"
            for caption, words in long
        ]

    def _vectors(self, words: list[str]) -> dict[str, Tensor]:
        if not words:
            return {}
        keys = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:7]) for word in words]
        return dict(zip(words, keyed.normal(0, torch.tensor(keys), "word", (self.D,), torch.float32), strict=True))

    def _positions(self) -> Tensor:
        """(T, D) sines and cosines of the place, mean square 1/2."""
        half = (self.D + 1) // 2
        angle = torch.arange(self.T)[:, None] * 1e2 ** (-torch.arange(half) / half)
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, : self.D]
