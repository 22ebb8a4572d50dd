"""Captions into tokens by encoders that stay as they are: `Words`, which needs no download, CLIP and T5.

The tokens of a caption depend on nothing but the caption: not on the others, and not on their number, as every
pass takes BATCH captions of T tokens. A blank caption is no text: zero tokens, length 0, zero pooled text.

Legend: N captions, T tokens, D channels of a token, P channels of the pooled text.
"""

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gesso import keyed
from gesso.config import Semantic
from gesso.data import pretrained
from gesso.errors import UsageError

WORDS_WIDTH = 64
"""of `Words` where semantic.width does not say"""
BATCH = 16
"""captions of every pass through CLIP or T5: of the shape of a pass the last bits depend"""


class Encoded(NamedTuple):
    """tokens (N, T, D) float32, zeros after each caption; lengths (N,) int64; pooled (N, P) float32. On the CPU."""

    tokens: Tensor
    lengths: Tensor
    pooled: Tensor


class TextEncoder(Protocol):
    """tokens: T, width: D, pooled_width: P."""

    tokens: int
    width: int
    pooled_width: int

    def __call__(self, captions: Sequence[str]) -> Encoded: ...

    def cut(self, captions: Sequence[str]) -> list[str]:
        """A line for each caption that is too long: what is not seen of it."""
        ...

    def identity(self) -> dict[str, str | int]:
        """What the tokens depend on besides the captions, for a manifest."""
        ...


def build(cfg: Semantic, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder that `cfg` names; its model is opened once per process, and moved to `device`.

    Raises UsageError for one that cannot be opened or does not fit semantic.tokens, width and pooled_width.
    """
    encoder: TextEncoder = Words(cfg) if cfg.encoder == "words" else _transformer(cfg, device)
    for name, said, has in (
        ("width", cfg.width, encoder.width),
        ("pooled_width", cfg.pooled_width, encoder.pooled_width),
    ):
        if said not in (None, has):
            raise UsageError(
                f"semantic.{name}={said}, but semantic.encoder={cfg.encoder} has {has}: set semantic.{name}=null"
            )
    return encoder


def widths(cfg: Semantic) -> dict[str, int]:
    """What opening the encoder tells of the settings, by name; nothing where there is no text. Raises as `build`."""
    if cfg.kind != "text":
        return {}
    encoder = build(cfg)
    return {"width": encoder.width, "pooled_width": encoder.pooled_width}


def words_of(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())


class Words:
    """Each word (letters and digits, in lower case) is one token: its random vector plus its position's sinusoids.

    Pooled text is the mean over the caption's tokens.
    """

    def __init__(self, cfg: Semantic):
        self.tokens = cfg.tokens
        self.width = self.pooled_width = cfg.width or WORDS_WIDTH

    def __call__(self, captions: Sequence[str]) -> Encoded:
        split = [words_of(caption) for caption in captions]
        vectors = self._vectors(sorted({word for words in split for word in words}))
        positions = self._positions()
        tokens = torch.zeros(len(captions), self.tokens, self.width)
        for i, words in enumerate(split):
            for j, word in enumerate(words[: self.tokens]):
                tokens[i, j] = (vectors[word] + positions[j]) / math.sqrt(1.5)
        lengths = torch.tensor([min(len(words), self.tokens) for words in split], dtype=torch.int64)
        return Encoded(tokens, lengths, mean(tokens, lengths))

    def cut(self, captions: Sequence[str]) -> list[str]:
        long = [(caption, words) for caption in captions if len(words := words_of(caption)) > self.tokens]
        return [_cut(caption, "words", len(words), self.tokens, words[self.tokens]) for caption, words in long]

    def identity(self) -> dict[str, str | int]:
        return {"encoder": "words", "tokens": self.tokens, "width": self.width}

    def _vectors(self, words: list[str]) -> dict[str, Tensor]:
        if not words:
            return {}
        keys = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:7]) for word in words]
        return dict(zip(words, keyed.normal(0, torch.tensor(keys), "word", (self.width,), torch.float32), strict=True))

    def _positions(self) -> Tensor:
        """(T, D) sines and cosines of the place, mean square 1/2."""
        half = (self.width + 1) // 2
        angle = torch.arange(self.tokens)[:, None] * 1e2 ** (-torch.arange(half) / half)
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, : self.width]


def mean(tokens: Tensor, lengths: Tensor) -> Tensor:
    """(N, D) mean over the tokens of each text (N, T, D), zeros after it; zero for no text."""
    return tokens.sum(1) / lengths.clamp(min=1)[:, None]


def _cut(caption: str, unit: str, n: int, seen: int, rest: str) -> str:
    return f"{caption!r}: of {n} {unit} the first {seen} are seen, cut from {rest!r} on"


class Opened(NamedTuple):
    """A model and its tokenizer, and the folders that they came from."""

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    folder: Path
    tokenizer_folder: Path


class Transformer:
    """A frozen text transformer in float32. CLIP and T5 say what they differ in.

    model_classes by the name in config.json, the first for all other names; tokenizer_files: of these sets one is
    enough.
    """

    model_classes: ClassVar[tuple[str, ...]]
    tokenizer_class: ClassVar[str]
    tokenizer_files: ClassVar[tuple[tuple[str, ...], ...]]
    width: int
    pooled_width: int

    def __init__(self, cfg: Semantic, opened: Opened):
        self.where, self.tokens, self.opened = cfg.encoder, cfg.tokens, opened
        self.special = opened.tokenizer.num_special_tokens_to_add()
        if self.tokens <= self.special:
            raise UsageError(
                f"semantic.tokens={self.tokens} has no room for a word beside the {self.special} marks that "
                f"semantic.encoder={cfg.encoder} puts around a caption"
            )

    def _states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, T, D) and pooled text (B, P) of ids (B, T), of which those in the mask (B, T) are real."""
        raise NotImplementedError

    def __call__(self, captions: Sequence[str]) -> Encoded:
        """lengths count the marks around a caption."""
        place: dict[str, int] = {}  # of each caption that says something; place 0 is no text
        for caption in captions:
            if caption.strip():
                place.setdefault(caption, len(place) + 1)
        some, T = list(place), self.tokens
        nothing = Encoded(
            torch.zeros(1, T, self.width), torch.zeros(1, dtype=torch.int64), torch.zeros(1, self.pooled_width)
        )
        parts = [nothing, *(self._pass(some[i : i + BATCH]) for i in range(0, len(some), BATCH))]
        index = torch.tensor([place.get(caption, 0) for caption in captions], dtype=torch.int64)
        return Encoded(*(torch.cat(field)[index] for field in zip(*parts, strict=True)))

    def _pass(self, captions: list[str]) -> Encoded:
        """At most BATCH captions, filled up to BATCH."""
        n, device = len(captions), next(self.opened.model.parameters()).device
        told = self.opened.tokenizer(
            captions + [""] * (BATCH - n),
            padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt",
        )  # fmt: skip
        ids, mask = told["input_ids"].to(device), told["attention_mask"].to(device)
        with torch.no_grad():
            states, pooled = self._states(ids, mask)
        return Encoded(*(field[:n].cpu() for field in (states * mask[:, :, None], mask.sum(1), pooled)))

    def cut(self, captions: Sequence[str]) -> list[str]:
        room, lines = self.tokens - self.special, []
        for start in range(0, len(captions), 10_000):
            some = list(captions[start : start + 10_000])
            told = self.opened.tokenizer(some, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for caption, offsets in zip(some, told["offset_mapping"], strict=True):
                if len(offsets) > room:
                    rest = caption[offsets[room][0] :]
                    word = next(iter(rest.split(maxsplit=1)), rest)
                    lines.append(_cut(caption, "pieces of words", len(offsets), room, word))
        return lines

    def identity(self) -> dict[str, str | int]:
        """With SHA-256 of the model's settings, of its weights and of the tokenizer's files."""
        model, tokenizer = self.opened.folder, self.opened.tokenizer_folder
        return {
            "encoder": self.where,
            "type": self.opened.config["model_type"],
            "config": pretrained.config_digest(self.opened.config),
            "weights": pretrained.digest(pretrained.weights(model, "model", self.where)),
            "tokenizer": pretrained.digest(path for name in TOKENIZER if (path := tokenizer / name).is_file()),
            "tokens": self.tokens,
            "width": self.width,
            "pooled_width": self.pooled_width,
        }


class CLIP(Transformer):
    """CLIP's text transformer: the states after its last norm, from the mark before a caption (BOS) to that after (EOT).

    Pooled text is the state at EOT, projected in a CLIPTextModelWithProjection.
    """

    model_classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    tokenizer_class = "CLIPTokenizerFast"
    tokenizer_files = (("tokenizer.json",), ("vocab.json", "merges.txt"))

    def __init__(self, cfg: Semantic, opened: Opened):
        super().__init__(cfg, opened)
        settings = opened.model.config
        if cfg.tokens > settings.max_position_embeddings:
            raise UsageError(
                f"semantic.tokens={cfg.tokens}, but semantic.encoder={cfg.encoder} has no more than "
                f"{settings.max_position_embeddings} places"
            )
        projected = type(opened.model).__name__ == "CLIPTextModelWithProjection"
        self.projection = opened.model.text_projection if projected else nn.Identity()
        self.width = settings.hidden_size
        self.pooled_width = settings.projection_dim if projected else settings.hidden_size

    def _states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # Without the mask: attention is causal, so that a caption does not see what follows it.
        states = self.opened.model(input_ids=ids).last_hidden_state
        return states, self.projection(states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])


class T5(Transformer):
    """T5's encoder: the states of a caption and of the mark after it (EOS), which see no padding.

    It has no pooled text; ours is the mean over the tokens, which serves T5 best (Ni et al. 2022, Sentence-T5).
    """

    model_classes = ("T5EncoderModel",)
    tokenizer_class = "T5TokenizerFast"
    tokenizer_files = (("tokenizer.json",), ("spiece.model",))

    def __init__(self, cfg: Semantic, opened: Opened):
        super().__init__(cfg, opened)
        self.width = self.pooled_width = opened.model.config.d_model

    def _states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.opened.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states, mean(states * mask[:, :, None], mask.sum(1))


FAMILIES: dict[str, type[Transformer]] = {"clip": CLIP, "clip_text_model": CLIP, "t5": T5}
"""by model_type in config.json"""
TOKENIZER = (
    "tokenizer.json", "vocab.json", "merges.txt", "spiece.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""files of a tokenizer"""


def _transformer(cfg: Semantic, device: torch.device | str) -> Transformer:
    opened = _opened(cfg.encoder)
    opened.model.to(device)
    return FAMILIES[opened.config["model_type"]](cfg, opened)


@functools.lru_cache(maxsize=2)
def _opened(where: str) -> Opened:
    """Model and tokenizer of a folder or hub id, also of a pipeline's. Raises UsageError."""
    what = f"semantic.encoder={where}"
    pretrained.library("transformers", "text", [])
    names = (*pretrained.fetchable("model"), *TOKENIZER)
    folder = pretrained.folder(where, what, ("text_encoder", "tokenizer"), names)
    config = pretrained.config(folder, what)
    kind = config.get("model_type")
    family = FAMILIES.get(kind)
    if family is None:
        raise UsageError(f"{what}: a model of type {kind}, where {', '.join(FAMILIES)} (CLIP, T5) would do, or words")
    pretrained.weights(folder, "model", what)
    name = (config.get("architectures") or [""])[0]
    name = name if name in family.model_classes else family.model_classes[0]
    model_class, tokenizer_class = pretrained.library("transformers", "text", [name, family.tokenizer_class])
    tokenizer_folder = _tokenizer_folder(folder, family, what)
    tokenizer = _tokenizer(tokenizer_class, tokenizer_folder, what)
    model = pretrained.opened(model_class, "transformers", folder, what).float()
    if len(tokenizer) > model.config.vocab_size:
        raise UsageError(
            f"{what}: the tokenizer in {tokenizer_folder} has {len(tokenizer):,} entries, the model "
            f"{model.config.vocab_size:,}: they do not belong together"
        )
    return Opened(model, tokenizer, config, folder, tokenizer_folder)


def _tokenizer_folder(folder: Path, family: type[Transformer], what: str) -> Path:
    """The model's own, or tokenizer/ beside text_encoder/ (tokenizer_2/ beside text_encoder_2/)."""
    for place in (folder, folder.with_name(folder.name.replace("text_encoder", "tokenizer"))):
        if any(all((place / name).is_file() for name in names) for names in family.tokenizer_files):
            return place
    needed = ", or ".join(" and ".join(names) for names in family.tokenizer_files)
    raise UsageError(f"{what}: no tokenizer ({needed}) beside the model in {folder}")


def _tokenizer(kind: Any, folder: Path, what: str) -> Any:
    if kind.__name__.startswith("T5") and not (folder / "tokenizer.json").is_file():
        pretrained.library("sentencepiece", "text", [])  # else the library asks for another package
        pretrained.library("google.protobuf", "text", [])
    try:
        with pretrained.quiet("transformers"):
            tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of any kind, as files are damaged
        raise UsageError(f"{what}: the tokenizer in {folder} cannot be opened: {pretrained.brief(error)}") from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer
