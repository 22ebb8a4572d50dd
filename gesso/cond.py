"""Cond: one batch of conditions, the same for every network.

Legend: B samples, T tokens, D channels of a token.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Cond:
    """What a batch of images is conditioned on. Every field may be absent (None).

    label         (B,) int64; the number of classes means none
    text          (B, T, D) tokens, text_mask (B, T) bool: which of them are real
    pooled        (B, D) pooled text
    control_high  (B, n) control variables that shape the composition (flip, crop)
    control_low   (B, n) control variables of low-level detail (original size)
    has_semantic  (B,) bool: False withholds label and text of a sample; None withholds nothing
    has_control   (B,) bool: the same for the control variables
    """

    label: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    pooled: Tensor | None = None
    control_high: Tensor | None = None
    control_low: Tensor | None = None
    has_semantic: Tensor | None = None
    has_control: Tensor | None = None

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}

    def to(self, device: torch.device | str) -> "Cond":
        return Cond(**{name: value.to(device) for name, value in self._tensors().items()})

    def __getitem__(self, index: slice | Tensor) -> "Cond":
        """The conditions of some samples."""
        return Cond(**{name: value[index] for name, value in self._tensors().items()})

    def without(self, *, semantic: bool = False, control: bool = False) -> "Cond":
        """The same batch with the semantic condition, the control variables, or both withheld."""
        if not self._tensors():
            return self
        first = next(iter(self._tensors().values()))
        nothing = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        changes = {}
        if semantic:
            changes["has_semantic"] = nothing
        if control:
            changes["has_control"] = nothing
        return dataclasses.replace(self, **changes)

    def label_or_null(self, num_classes: int) -> Tensor | None:
        """(B,) labels with `num_classes` where the label is withheld; None when there are no labels."""
        if self.label is None or self.has_semantic is None:
            return self.label
        return torch.where(self.has_semantic, self.label, num_classes)

    def text_or_null(self) -> Tensor | None:
        """(B, T, D) text tokens, zero where the text is withheld: the one meaning of "no text" in every network."""
        if self.text is None or self.has_semantic is None:
            return self.text
        return torch.where(self.has_semantic[:, None, None], self.text, 0)

    def mask_or_null(self) -> Tensor | None:
        """(B, T) tokens to attend to; all of them where the text is withheld, whatever length it had."""
        if self.text_mask is None or self.has_semantic is None:
            return self.text_mask
        return self.text_mask | ~self.has_semantic[:, None]

    def pooled_or_null(self) -> Tensor | None:
        """(B, D) pooled text, zero where the text is withheld."""
        if self.pooled is None or self.has_semantic is None:
            return self.pooled
        return torch.where(self.has_semantic[:, None], self.pooled, 0)


def concat(conds: list[Cond]) -> Cond:
    """Several batches as one. A field must be present in all or in none; has_* is filled with True."""
    size = [len(next(iter(c._tensors().values()), ())) for c in conds]
    fields: dict[str, Tensor] = {}
    for field in dataclasses.fields(Cond):
        values = [getattr(c, field.name) for c in conds]
        if all(v is None for v in values):
            continue
        if field.name.startswith("has_"):
            device = next(v.device for v in values if v is not None)
            values = [
                v if v is not None else torch.ones(n, dtype=torch.bool, device=device)
                for v, n in zip(values, size, strict=True)
            ]
        elif any(v is None for v in values):
            raise ValueError(f"Cond.{field.name} is present in some of the batches and absent in others")
        fields[field.name] = torch.cat(values)
    return Cond(**fields)


def pad(
    tokens: Tensor, lengths: Tensor, how: str, beta: float = 0.0, eps: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Fill the places after each text (Berrada et al. Section 2.1, Appendix C).

    tokens (B, T, D), of which the first `lengths` (B,) are text. how: "zero", "masked", "replicate" (copies of the
    text, one after the other, the last cut off) or "noisy": copies, and on all of them, Eq. 7,
    beta sqrt(m-1) std eps with m = ceil(T / length) copies, std (D,) over the tokens of the text, eps (B, T, D) normal.
    beta is a factor on the standard deviation; the paper calls it a variance. Empty texts become T zeros.
    Returns the tokens and the mask (B, T) of those to attend to, None: all.
    """
    B, T, D = tokens.shape
    place, n = torch.arange(T, device=tokens.device), lengths.clamp(min=1)[:, None]
    real = place < lengths[:, None]
    tokens = tokens * real[:, :, None]
    if how in ("zero", "masked"):
        return tokens, real | (lengths == 0)[:, None] if how == "masked" else None
    copies = tokens.gather(1, (place % n)[:, :, None].expand(B, T, D))
    if how == "noisy":
        mean = tokens.sum(1, keepdim=True) / n[:, :, None]
        variance = ((tokens - mean).square() * real[:, :, None]).sum(1, keepdim=True) / n[:, :, None]
        m = (T + n - 1) // n
        copies = copies + beta * (m - 1).to(tokens.dtype).sqrt()[:, :, None] * variance.sqrt() * eps
    return copies, None
