"""Encode captions as tokens with frozen encoders: `WordVectors`, which needs no download, CLIP and T5.

The tokens of a caption depend on the caption alone, not on the others or their number, since every pass has BATCH_SIZE
captions of T tokens. A blank caption is encoded as no text: zero tokens, length 0, zero pooled text.

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

from gesso import rng
from gesso.config import SemanticConfig
from gesso.data.encoders import hub
from gesso.errors import UsageError, error_summary

DEFAULT_WORD_DIM = 64
"""Default dimension of WordVectors."""
ENCODER_BATCH_SIZE = 16
"""Captions per pass through CLIP or T5; fixed, since the last bits depend on the shape."""


class EncodedText(NamedTuple):
    """Tokens (N, T, D) float32, zeros after each caption; lengths (N,) int64; pooled (N, P) float32, on the CPU."""

    tokens: Tensor
    lengths: Tensor
    pooled: Tensor


class TextEncoder(Protocol):
    """Interface of a text encoder; max_tokens is T, embed_dim is D, pooled_dim is P."""

    max_tokens: int
    embed_dim: int
    pooled_dim: int

    def __call__(self, captions: Sequence[str]) -> EncodedText:
        """Encode captions."""

    def truncation_notes(self, captions: Sequence[str]) -> list[str]:
        """Return a line for each truncated caption, with the part that is cut off."""
        ...

    def identity(self) -> dict[str, str | int]:
        """Return everything except the captions that the tokens depend on, for a manifest."""
        ...


def build_text_encoder(cfg: SemanticConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """Return the encoder of the settings on `device`; its model is loaded once per process.

    Raises:
        UsageError: It cannot be loaded, or does not fit semantic.max_tokens, embed_dim or pooled_dim.
    """
    encoder: TextEncoder = WordVectors(cfg) if cfg.encoder == "words" else _build_transformer(cfg, device)
    for name, value, actual in (
        ("embed_dim", cfg.embed_dim, encoder.embed_dim),
        ("pooled_dim", cfg.pooled_dim, encoder.pooled_dim),
    ):
        if value not in (None, actual):
            raise UsageError(
                f"semantic.{name}={value}, but semantic.encoder={cfg.encoder} has {actual}: set semantic.{name}=null"
            )
    return encoder


def text_dims(cfg: SemanticConfig) -> dict[str, int]:
    """Return the settings that the encoder determines, empty without text; errors as `build_text_encoder`."""
    if cfg.kind != "text":
        return {}
    encoder = build_text_encoder(cfg)
    return {"embed_dim": encoder.embed_dim, "pooled_dim": encoder.pooled_dim}


def split_words(caption: str) -> list[str]:
    """Return the words of a caption, in lower case."""
    return re.findall(r"\w+", caption.lower())


class WordVectors:
    """Random vector of each word (letters and digits, in lower case) plus sinusoids of its position.

    Pooled text is the mean over the caption's tokens.
    """

    def __init__(self, cfg: SemanticConfig):
        self.max_tokens = cfg.max_tokens
        self.embed_dim = self.pooled_dim = cfg.embed_dim or DEFAULT_WORD_DIM

    def __call__(self, captions: Sequence[str]) -> EncodedText:
        """Encode captions."""
        split = [split_words(caption) for caption in captions]
        vectors = self._vectors(sorted({word for words in split for word in words}))
        positions = self._positions()
        tokens = torch.zeros(len(captions), self.max_tokens, self.embed_dim)
        for i, words in enumerate(split):
            for j, word in enumerate(words[: self.max_tokens]):
                tokens[i, j] = (vectors[word] + positions[j]) / math.sqrt(1.5)
        lengths = torch.tensor([min(len(words), self.max_tokens) for words in split], dtype=torch.int64)
        return EncodedText(tokens, lengths, mean_tokens(tokens, lengths))

    def truncation_notes(self, captions: Sequence[str]) -> list[str]:
        """Return a line for each truncated caption."""
        long = [(caption, words) for caption in captions if len(words := split_words(caption)) > self.max_tokens]
        return [
            _truncation_note(caption, "words", len(words), self.max_tokens, words[self.max_tokens])
            for caption, words in long
        ]

    def identity(self) -> dict[str, str | int]:
        """Return everything that the tokens depend on."""
        return {"encoder": "words", "max_tokens": self.max_tokens, "embed_dim": self.embed_dim}

    def _vectors(self, words: list[str]) -> dict[str, Tensor]:
        if not words:
            return {}
        keys = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:7]) for word in words]
        return dict(
            zip(words, rng.normal(0, torch.tensor(keys), "word", (self.embed_dim,), torch.float32), strict=True)
        )

    def _positions(self) -> Tensor:
        """Return (T, D) sines and cosines of the position, mean square 1/2."""
        half = (self.embed_dim + 1) // 2
        angle = torch.arange(self.max_tokens)[:, None] * 1e2 ** (-torch.arange(half) / half)
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, : self.embed_dim]


def mean_tokens(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean (N, D) over the tokens of each text (N, T, D), zeros after it; zero for no text."""
    return tokens.sum(1) / lengths.clamp(min=1)[:, None]


def _truncation_note(caption: str, unit: str, n: int, num_used: int, rest: str) -> str:
    return f"{caption!r}: only the first {num_used} of {n} {unit} are used, truncated at {rest!r}"


class LoadedEncoder(NamedTuple):
    """A model and its tokenizer, with their folders."""

    model: Any
    tokenizer: Any
    config: dict[str, Any]
    folder: Path
    tokenizer_folder: Path


class TransformerTextEncoder:
    """A frozen text transformer in float32; subclasses define the differences of CLIP and T5.

    Attributes:
        model_classes: Names of classes in config.json; the first is used for all other names.
        tokenizer_class: Class of the tokenizer.
        tokenizer_files: Alternative sets of files of the tokenizer.
    """

    model_classes: ClassVar[tuple[str, ...]]
    tokenizer_class: ClassVar[str]
    tokenizer_files: ClassVar[tuple[tuple[str, ...], ...]]
    embed_dim: int
    pooled_dim: int

    def __init__(self, cfg: SemanticConfig, loaded: LoadedEncoder):
        self.model_id, self.max_tokens, self.loaded = cfg.encoder, cfg.max_tokens, loaded
        self.num_special_tokens = loaded.tokenizer.num_special_tokens_to_add()
        if self.max_tokens <= self.num_special_tokens:
            raise UsageError(
                f"semantic.max_tokens={self.max_tokens} is too small, as semantic.encoder={cfg.encoder} adds "
                f"{self.num_special_tokens} special tokens to a caption: set it higher"
            )

    def _encode_ids(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return states (B, T, D) and pooled text (B, P) of ids (B, T); `mask` (B, T) is 0 at padding."""
        raise NotImplementedError

    def __call__(self, captions: Sequence[str]) -> EncodedText:
        """Encode captions; lengths include the special tokens."""
        unique = list(dict.fromkeys(caption for caption in captions if caption.strip()))
        row = {caption: i for i, caption in enumerate(unique, start=1)}  # row 0 is no text
        no_text = EncodedText(
            torch.zeros(1, self.max_tokens, self.embed_dim),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(1, self.pooled_dim),
        )
        starts = range(0, len(unique), ENCODER_BATCH_SIZE)
        parts = [no_text, *(self._encode_batch(unique[i : i + ENCODER_BATCH_SIZE]) for i in starts)]
        index = torch.tensor([row.get(caption, 0) for caption in captions], dtype=torch.int64)
        return EncodedText(*(torch.cat(field)[index] for field in zip(*parts, strict=True)))

    def _encode_batch(self, captions: list[str]) -> EncodedText:
        """Encode at most BATCH_SIZE captions, padded to BATCH_SIZE."""
        n, device = len(captions), next(self.loaded.model.parameters()).device
        with torch.no_grad(), hub.model_errors(f"semantic.encoder={self.model_id}"):
            encoding = self.loaded.tokenizer(
                captions + [""] * (ENCODER_BATCH_SIZE - n),
                padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt",
            )  # fmt: skip
            ids, mask = encoding["input_ids"].to(device), encoding["attention_mask"].to(device)
            states, pooled = self._encode_ids(ids, mask)
        return EncodedText(*(field[:n].cpu() for field in (states * mask[:, :, None], mask.sum(1), pooled)))

    def truncation_notes(self, captions: Sequence[str]) -> list[str]:
        """Return a line for each truncated caption."""
        limit, lines = self.max_tokens - self.num_special_tokens, []
        for start in range(0, len(captions), 10_000):
            chunk = list(captions[start : start + 10_000])
            encoding = self.loaded.tokenizer(
                chunk, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            for caption, offsets in zip(chunk, encoding["offset_mapping"], strict=True):
                if len(offsets) > limit:
                    rest = caption[offsets[limit][0] :]
                    word = next(iter(rest.split(maxsplit=1)), rest)
                    lines.append(_truncation_note(caption, "tokens", len(offsets), limit, word))
        return lines

    def identity(self) -> dict[str, str | int]:
        """Return everything that the tokens depend on, with SHA-256 of settings, weights and tokenizer files."""
        model, tokenizer = self.loaded.folder, self.loaded.tokenizer_folder
        return {
            "encoder": self.model_id,
            "type": self.loaded.config["model_type"],
            "config": hub.sha256_config(self.loaded.config),
            "weights": hub.sha256_files(hub.weight_files(model, "model", self.model_id)),
            "tokenizer": hub.sha256_files(path for name in TOKENIZER_FILES if (path := tokenizer / name).is_file()),
            "max_tokens": self.max_tokens,
            "embed_dim": self.embed_dim,
            "pooled_dim": self.pooled_dim,
        }


class CLIPTextEncoder(TransformerTextEncoder):
    """CLIP's text transformer: tokens are the states after its last norm, from BOS to EOT.

    Pooled text is the state at EOT, projected by a CLIPTextModelWithProjection.
    """

    model_classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    tokenizer_class = "CLIPTokenizerFast"
    tokenizer_files = (("tokenizer.json",), ("vocab.json", "merges.txt"))

    def __init__(self, cfg: SemanticConfig, loaded: LoadedEncoder):
        super().__init__(cfg, loaded)
        settings = loaded.model.config
        if cfg.max_tokens > settings.max_position_embeddings:
            raise UsageError(
                f"semantic.max_tokens={cfg.max_tokens}, but semantic.encoder={cfg.encoder} takes at most "
                f"{settings.max_position_embeddings} tokens"
            )
        projected = type(loaded.model).__name__ == "CLIPTextModelWithProjection"
        self.projection = loaded.model.text_projection if projected else nn.Identity()
        self.embed_dim = settings.hidden_size
        self.pooled_dim = settings.projection_dim if projected else settings.hidden_size

    def _encode_ids(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # No mask: attention is causal, so the tokens of a caption do not depend on the padding after them.
        states = self.loaded.model(input_ids=ids).last_hidden_state
        return states, self.projection(states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])


class T5TextEncoder(TransformerTextEncoder):
    """T5's encoder: tokens are the states of a caption and EOS, which do not depend on padding.

    T5 has no pooled text; the mean over the tokens is used, which works best for T5 (Ni et al. 2022, Sentence-T5).
    """

    model_classes = ("T5EncoderModel",)
    tokenizer_class = "T5TokenizerFast"
    tokenizer_files = (("tokenizer.json",), ("spiece.model",))

    def __init__(self, cfg: SemanticConfig, loaded: LoadedEncoder):
        super().__init__(cfg, loaded)
        self.embed_dim = self.pooled_dim = loaded.model.config.d_model

    def _encode_ids(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.loaded.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states, mean_tokens(states * mask[:, :, None], mask.sum(1))


ENCODER_CLASSES: dict[str, type[TransformerTextEncoder]] = {
    "clip": CLIPTextEncoder,
    "clip_text_model": CLIPTextEncoder,
    "t5": T5TextEncoder,
}
"""Encoder classes by model_type in config.json."""
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "spiece.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Files of a tokenizer."""


def _build_transformer(cfg: SemanticConfig, device: torch.device | str) -> TransformerTextEncoder:
    loaded = _load_encoder(cfg.encoder)
    with hub.model_errors(f"semantic.encoder={cfg.encoder}"):
        loaded.model.to(device)
        return ENCODER_CLASSES[loaded.config["model_type"]](cfg, loaded)


@functools.lru_cache(maxsize=2)
def _load_encoder(model_id: str) -> LoadedEncoder:
    """Load model and tokenizer of a folder, hub id or pipeline; raise UsageError if that fails."""
    label = f"semantic.encoder={model_id}"
    hub.import_names("transformers", "text", [])
    names = (*hub.model_file_patterns("model"), *TOKENIZER_FILES)
    folder = hub.model_folder(model_id, label, ("text_encoder", "tokenizer"), names)
    config = hub.read_config(folder, label)
    model_type = str(config.get("model_type"))
    encoder_class = ENCODER_CLASSES.get(model_type)
    if encoder_class is None:
        raise UsageError(
            f"{label} is a model of type {model_type}; supported types are {', '.join(ENCODER_CLASSES)}, or set "
            "semantic.encoder=words"
        )
    hub.weight_files(folder, "model", label)
    name = (config.get("architectures") or [""])[0]
    name = name if name in encoder_class.model_classes else encoder_class.model_classes[0]
    model_class, tokenizer_class = hub.import_names("transformers", "text", [name, encoder_class.tokenizer_class])
    tokenizer_folder = _find_tokenizer(folder, encoder_class, label)
    tokenizer = _load_tokenizer(tokenizer_class, tokenizer_folder, label)
    model = hub.load_model(model_class, "transformers", folder, label).float()
    if len(tokenizer) > model.config.vocab_size:
        raise UsageError(
            f"{label}: the tokenizer in {tokenizer_folder} has {len(tokenizer):,} entries, but the model has "
            f"{model.config.vocab_size:,}: use the tokenizer of the model"
        )
    return LoadedEncoder(model, tokenizer, config, folder, tokenizer_folder)


def _find_tokenizer(folder: Path, encoder_class: type[TransformerTextEncoder], label: str) -> Path:
    """Return the folder of the tokenizer: that of the model, or tokenizer/ (tokenizer_2/) of a pipeline."""
    for path in (folder, folder.with_name(folder.name.replace("text_encoder", "tokenizer"))):
        if any(all((path / name).is_file() for name in names) for names in encoder_class.tokenizer_files):
            return path
    files = ", or ".join(" and ".join(names) for names in encoder_class.tokenizer_files)
    raise UsageError(f"{label}: no tokenizer ({files}) next to the model in {folder}")


def _load_tokenizer(tokenizer_class: Any, folder: Path, label: str) -> Any:
    if tokenizer_class.__name__.startswith("T5") and not (folder / "tokenizer.json").is_file():
        hub.import_names("sentencepiece", "text", [])  # the library would name another package
        hub.import_names("google.protobuf", "text", [])
    try:
        with hub.quiet_logging("transformers"):
            tokenizer = tokenizer_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # damaged files raise any error
        raise UsageError(f"{label}: the tokenizer in {folder} cannot be opened: {error_summary(error)}") from error
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer
