"""Conditions of a batch, in the same form for every network, and the padding of text tokens.

Legend: B samples, T tokens, D channels of a token.
"""

import dataclasses

import torch
from torch import Tensor


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
