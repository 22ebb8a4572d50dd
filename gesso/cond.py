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
