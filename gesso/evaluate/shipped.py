"""Judges without weights from elsewhere: what digits and drawn shapes show beside what they were to show.

Legend: B pictures, K questions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gesso.errors import UsageError
from gesso.evaluate import shapes
from gesso.evaluate.features import DigitFeatures

TEXT = ("colour", "kind", "pair", "place", "side", "relation", "all", "sided", "flipped", "border")
KIND = ("kind", "all", "border")
"""questions that are asked of a picture drawn for a caption, for a class"""


class Agreement(nn.Module):
    """Whether digits are read as what they were to be: RGB (B, 3, 8, 8) uint8 and labels (B,) -> (B, 1) of 0 and 1."""

    features = 1

    def __init__(self, network: DigitFeatures):
        super().__init__()
        self.network, self.name = network, network.name
        self.questions = ("class_agreement",)

    def forward(self, images: Tensor, labels: Sequence[int], captions: Sequence[str] | None) -> Tensor:
        _, logits = self.network.classify(images[:, :1])
        return (logits.argmax(dim=1).cpu() == torch.tensor(list(labels)))[:, None].float()


class Apart(nn.Module):
    """How far two samples are apart that were told different sizes: Euclidean, in the features of digits. Not LPIPS."""

    def __init__(self, network: DigitFeatures):
        super().__init__()
        self.network, self.name = network, network.name

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """RGB (B, 3, 8, 8) uint8 each -> (B,)."""
        return (self.network(a[:, :1]) - self.network(b[:, :1])).norm(dim=1)


class Drawn(nn.Module):
    """Whether shapes are drawn as their caption or class says: (B, K) of 0 and 1, -1 where it says nothing."""

    name = "shapes read back"

    def __init__(self, text: bool):
        super().__init__()
        self.text, self.questions = text, TEXT if text else KIND
        self.features = len(self.questions)

    def forward(self, images: Tensor, labels: Sequence[int], captions: Sequence[str] | None) -> Tensor:
        """Raises UsageError for captions that are not those of shapes."""
        found = shapes.read(images.cpu())
        if self.text:
            if captions is None:
                raise UsageError("shapes are read beside captions, and there are none")
            rows = [shapes.judged(caption, some) for caption, some in zip(captions, found, strict=True)]
        else:
            rows = [shapes.class_judged(label, some) for label, some in zip(labels, found, strict=True)]
        return torch.tensor(
            [[-1 if row[name] is None else int(row[name]) for name in self.questions] for row in rows]
        ).float()


def rates(network: Agreement | Drawn, rows: Tensor) -> dict[str, float]:
    """By question: the share that holds among those asked; 0 among none."""
    asked = rows >= 0
    return {
        name: float((rows[:, k] * asked[:, k]).sum() / asked[:, k].sum().clamp(min=1))
        for k, name in enumerate(network.questions)
    }
