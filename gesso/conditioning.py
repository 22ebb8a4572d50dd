"""Conditions of a batch in the same form for every network, padding of text tokens, and labels as a user types them.

Legend: B samples, T tokens, D channels of a token.
"""

import dataclasses
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from gesso import config
from gesso.config import RunConfig
from gesso.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Cond:
    """Conditions of a batch of images; every field may be absent (None).

    label         (B,) int64; the number of classes is the null class
    text          (B, T, D) tokens
    text_mask     (B, T) bool, True for tokens of the text, False for padding
    pooled        (B, D) pooled text
    control_high  (B, n) control variables of the composition (flip, crop)
    control_low   (B, n) control variables of low-level detail (original size)
    has_semantic  (B,) bool, False withholds label and text of a sample; None withholds nothing
    has_control   (B,) bool, the same for the control variables
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    control_high: Tensor | None = None
    control_low: Tensor | None = None
    has_semantic: Tensor | None = None
    has_control: Tensor | None = None

    def _present_fields(self) -> dict[str, Tensor]:
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}

    def to(self, device: torch.device | str) -> "Cond":
        """Return the conditions on a device."""
        return Cond(**{name: value.to(device) for name, value in self._present_fields().items()})

    def __getitem__(self, index: slice | Tensor) -> "Cond":
        """Return the conditions of a subset of the samples."""
        return Cond(**{name: value[index] for name, value in self._present_fields().items()})

    def without(self, *, semantic: bool = False, control: bool = False) -> "Cond":
        """Return the batch with the semantic condition, the control variables or both withheld."""
        first = next(iter(self._present_fields().values()), None)
        if first is None:
            return self
        withheld = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        return dataclasses.replace(
            self,
            has_semantic=withheld if semantic else self.has_semantic,
            has_control=withheld if control else self.has_control,
        )

    def label_or_null(self, num_classes: int) -> Tensor | None:
        """Return labels (B,) with `num_classes` where the label is withheld; None without labels."""
        if self.label is None or self.has_semantic is None:
            return self.label
        return torch.where(self.has_semantic, self.label, num_classes)

    def text_or_zero(self) -> Tensor | None:
        """Return text tokens (B, T, D), zero where the text is withheld; every network treats zeros as no text."""
        if self.text is None or self.has_semantic is None:
            return self.text
        return torch.where(self.has_semantic[:, None, None], self.text, 0)

    def attention_mask(self) -> Tensor | None:
        """Return the mask (B, T) of tokens to attend to: all of them where the text is withheld."""
        if self.text_mask is None or self.has_semantic is None:
            return self.text_mask
        return self.text_mask | ~self.has_semantic[:, None]

    def pooled_or_zero(self) -> Tensor | None:
        """Return pooled text (B, D), zero where the text is withheld."""
        if self.pooled is None or self.has_semantic is None:
            return self.pooled
        return torch.where(self.has_semantic[:, None], self.pooled, 0)


def concat_conds(conds: list[Cond]) -> Cond:
    """Return several batches as one; where only some batches have a has_* field, it is True in the others.

    Raises:
        ValueError: Another field is present in some of the batches only.
    """
    sizes = [len(next(iter(c._present_fields().values()), ())) for c in conds]
    fields: dict[str, Tensor] = {}
    for field in dataclasses.fields(Cond):
        values = [getattr(c, field.name) for c in conds]
        if all(v is None for v in values):
            continue
        if field.name.startswith("has_"):
            device = next(v.device for v in values if v is not None)
            values = [
                v if v is not None else torch.ones(n, dtype=torch.bool, device=device)
                for v, n in zip(values, sizes, strict=True)
            ]
        elif any(v is None for v in values):
            raise ValueError(f"Cond.{field.name} is present in some of the batches and absent in others")
        fields[field.name] = torch.cat(values)
    return Cond(**fields)


def pad_text(
    tokens: Tensor, lengths: Tensor, padding: str, beta: float = 0.0, eps: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Fill the positions after each text (Berrada et al. Section 2.1, Appendix C).

    "zero" fills with zeros, "masked" as well and excludes them from attention, "replicate" repeats the text until T.
    "noisy" repeats it and adds beta sqrt(m-1) std eps (Eq. 7) to all tokens, with m = ceil(T / length) copies and
    std (D,) over the tokens of the text. beta is a factor on the standard deviation; the paper calls it a variance.
    Empty texts become T zeros.

    Args:
        tokens: Text tokens, (B, T, D); the first `lengths` of each row are text.
        lengths: Number of text tokens, (B,).
        padding: "zero", "masked", "replicate" or "noisy".
        beta: Strength of the noise.
        eps: Standard normal noise, (B, T, D), for "noisy".

    Returns:
        The tokens (B, T, D) and the mask (B, T) of tokens to attend to, None for all.
    """
    B, T, D = tokens.shape
    position, n = torch.arange(T, device=tokens.device), lengths.clamp(min=1)[:, None]
    real = position < lengths[:, None]
    tokens = tokens * real[:, :, None]
    if padding in ("zero", "masked"):
        return tokens, real | (lengths == 0)[:, None] if padding == "masked" else None
    copies = tokens.gather(1, (position % n)[:, :, None].expand(B, T, D))
    if padding == "noisy":
        if eps is None:
            raise ValueError("padding=noisy needs the argument `eps`")
        mean = tokens.sum(1, keepdim=True) / n[:, :, None]
        variance = ((tokens - mean).square() * real[:, :, None]).sum(1, keepdim=True) / n[:, :, None]
        m = (T + n - 1) // n
        copies = copies + beta * (m - 1).to(tokens.dtype).sqrt()[:, :, None] * variance.sqrt() * eps
    return copies, None


def parse_int_ranges(text: str, option: str) -> list[int]:
    """Parse "0-3,7" to [0, 1, 2, 3, 7].

    Raises:
        UsageError: The text is not a list of ranges, or a number has more than 63 bits; the error names `option`.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not _is_number(first) or (dash and not _is_number(last)) or (dash and int(last) < int(first)):
            raise UsageError(f"{option} {text!r}: write numbers such as 0-15 or 1,5,9")
        if int(last or first) >= 2**63:
            raise UsageError(f"{option} {text!r}: numbers must be below 2^63")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def check_labels(run: RunConfig, labels: Sequence[int]) -> None:
    """Raise UsageError for a label that the run does not have."""
    classes = run.input_spec.num_classes
    has_null = run.dropout.both + run.dropout.semantic > 0  # otherwise the null class was not trained
    if not classes:
        kind = "text: use --prompt" if run.semantic.kind == "text" else "no classes: it takes no label"
        raise UsageError(f"this run was trained with {kind}")
    wrong = sorted({label for label in labels if not 0 <= label < classes + has_null})
    if wrong:
        valid = f"labels 0 to {classes - 1}" + (f" (and {classes} for none)" if has_null else "")
        raise UsageError(f"label {wrong[0]} is out of range: the run has {valid}")


def parse_labels(run: RunConfig, text: str) -> list[int]:
    """Return the class indices that "cat, 3, 5-7" selects.

    A part is a class name if there is one, also with commas or spaces inside ("red, round" before "red"). Names match
    exactly, else without spaces around them and in any Unicode normalization. A number or a range selects classes whose
    names are numbers by name, and classes by index where no name is a number.

    Raises:
        UsageError: There is no such class, or several classes have that number as a name.
    """
    if not run.input_spec.num_classes:
        check_labels(run, [])
    parts, labels, start = text.split(","), list[int](), 0
    while start < len(parts):
        for stop in range(len(parts), start, -1):
            index = _index_of_name(run, ",".join(parts[start:stop]))
            if index is not None:
                labels.append(index)
                break
        else:
            stop = start + 1
            labels += _parse_numbers(run, parts[start])
        start = stop
    return labels


def _canonical_name(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _index_of_name(run: RunConfig, text: str) -> int | None:
    """Return the index of the class with this name; None if there is none, or several that match inexactly."""
    names = run.data.class_names or ()
    if text in names:
        return names.index(text)
    canonical = [_canonical_name(name) for name in names]
    matches = [i for i, name in enumerate(canonical) if name == _canonical_name(text)]
    return matches[0] if len(matches) == 1 else None


def _parse_numbers(run: RunConfig, text: str) -> list[int]:
    """Return the class indices of a number or a range: by name if some names are numbers, else by index."""
    names = list(run.data.class_names or ())
    if not _is_number(text.strip()[:1]):
        raise UsageError(f"label {text.strip()!r}: no such class; {config.suggest(text.strip(), names)}")
    numbers, null = parse_int_ranges(text, "--label"), run.input_spec.num_classes
    by_number: dict[int, list[int]] = {}
    for i, name in enumerate(names):
        if _is_number(name.strip()):
            by_number.setdefault(int(name), []).append(i)
    if not by_number or by_number == {i: [i] for i in range(len(names))}:
        check_labels(run, numbers)
        return numbers
    labels = []
    for number in numbers:
        matches = by_number.get(number, [null] if number == null else [])
        if len(matches) > 1:
            raise UsageError(f"label {number} may be {' or '.join(repr(names[i]) for i in matches)}: write the name")
        if not matches:
            known = [name for name in names if _is_number(name.strip())]
            raise UsageError(
                f"label {number}: no class has this name, and classes with numbers as names are selected by name; "
                f"there are: {', '.join(sorted(known, key=int)[:12])}{', ...' if len(known) > 12 else ''}"
            )
        labels += matches
    check_labels(run, labels)
    return labels


def trained_classes(run: RunConfig) -> list[int]:
    """Return the indices of the classes that have training images; empty without classes."""
    untrained = set(run.data.untrained_classes or ())
    return [i for i in range(run.input_spec.num_classes) if i not in untrained]


def expand_labels(run: RunConfig, labels: Sequence[int | str] | None, seeds: Sequence[int]) -> list[int] | None:
    """Return the class index of each seed: labels[seed mod number of labels], or of all trained classes for None.

    So the class of a seed does not depend on the other seeds.

    Args:
        run: Settings of the run.
        labels: Class indices, or names as on the command line; None for all classes.
        seeds: N seeds.

    Returns:
        N indices, or None for a run without classes.

    Raises:
        UsageError: A label is unknown.
    """
    if labels is None:
        indices = trained_classes(run)
        return [indices[seed % len(indices)] for seed in seeds] if indices else None
    if len(labels) == 0:
        raise UsageError("labels is empty: name a class, or pass None for all classes in turn")
    if not run.input_spec.num_classes:
        check_labels(run, [])
    indices = []
    for label in labels:
        index = _index_of_name(run, label) if isinstance(label, str) else int(label)
        indices += _parse_numbers(run, str(label)) if index is None else [index]
    check_labels(run, indices)
    return [indices[seed % len(indices)] for seed in seeds]


def describe_classes(run: RunConfig, indices: Sequence[int], limit: int = 12) -> str:
    """Return the distinct classes of samples as "cat (0), dog (1)", at most `limit` of them."""
    names = run.data.class_names or ()
    distinct = list(dict.fromkeys(indices))
    texts = [f"{names[i]!r} ({i})" if i < len(names) else f"none ({i})" for i in distinct[:limit]]
    return ", ".join(texts) + (f" and {len(distinct) - limit} more" if len(distinct) > limit else "")


def expand_prompts(run: RunConfig, prompts: Sequence[str], seeds: Sequence[int]) -> list[str] | None:
    """Return the prompt of each seed: prompts[seed mod number of prompts], or of the example captions if empty.

    Returns None for a run without text. Raises UsageError for prompts that the run does not take.
    """
    if run.semantic.kind != "text":
        if prompts:
            kind = "classes: use --label" if run.input_spec.num_classes else "neither classes nor text"
            raise UsageError(f"--prompt {prompts[0]!r}: this run was trained with {kind}")
        return None
    prompts = list(prompts) or list(run.data.example_captions or ("",))
    return [prompts[seed % len(prompts)] for seed in seeds]
