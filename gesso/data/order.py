"""Which image a sample counter stands for, and the batch that a run of counters makes.

The counter k = 0, 1, 2, ... counts samples since the beginning of training, over all ranks. Everything
about sample k is a function of (seed, k): order, flip, dropped label, and in the loop noise level and
noise. The state of the data is therefore one integer, `nimg`.
"""

import functools

import torch
from torch import Tensor

from gesso import keyed
from gesso.cond import Cond, pad
from gesso.config import Run, Semantic
from gesso.data import text
from gesso.data.images import Images, measured, to_float


class Order:
    """Every epoch a permutation of 0..n-1: a pure function of (seed, epoch, position)."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._permutation = functools.lru_cache(maxsize=2)(self._make)

    def _make(self, epoch: int) -> Tensor:
        # Sorting random 64-bit keys; a tie (n^2 / 2^64) falls to the lower index.
        high, low = keyed.words(self.seed, torch.arange(self.n), f"order of epoch {epoch}", 2).unbind(1)
        return ((high << 32) | low).argsort(stable=True)

    def __call__(self, counter: Tensor) -> Tensor:
        """(B,) counters -> (B,) indices into the data set."""
        epoch, position = counter // self.n, counter % self.n
        out = torch.empty_like(counter)
        for e in epoch.unique().tolist():
            here = epoch == e
            out[here] = self._permutation(e)[position[here]]
        return out


class Batches:
    """x0 and conditions for any run of sample counters, on `device`; x0 of standard deviation sd."""

    def __init__(self, images: Images, run: Run, sd: float, device: torch.device):
        self.images, self.run, self.sd, self.device = images, run, sd, device
        self.dtype = getattr(torch, run.train.dtype)
        self.order = Order(len(images), run.train.seed)
        self.columns = run.control.columns("high") + run.control.columns("low")
        self.measured = measured(images) if self.columns else {}
        if run.semantic.kind == "text":
            self.encoded = text.build(run.semantic, device)(images.captions)

    def __call__(self, counter: Tensor) -> tuple[Tensor, Cond]:
        """x0 (B, C, R, R) and the conditions of the samples `counter` (B,)."""
        data = self.run.data
        index = self.order(counter)
        pixels = self.images.pixels[index]
        if data.flip:
            pixels = torch.where(self._mirrored(counter)[:, None, None, None], pixels.flip(3), pixels)
        x0 = to_float(pixels.to(self.device, non_blocking=True), data, self.sd, self.dtype)
        return x0, Cond(**self._semantic(counter, index), **self._control(counter)).to(self.device)

    def _mirrored(self, counter: Tensor) -> Tensor:
        """(B,) bool"""
        return keyed.uniform(self.run.train.seed, counter, "flip")[:, 0] < 0.5

    def _semantic(self, counter: Tensor, index: Tensor) -> dict[str, Tensor | None]:
        cfg, seed = self.run.semantic, self.run.train.seed
        if cfg.kind == "text":
            some = text.Encoded(*(field[index] for field in self.encoded))
            fields = text_fields(cfg, some, seed, counter)
        elif cfg.kind == "label" and self.run.data.num_classes:
            fields = {"label": self.images.labels[index]}
        else:
            return {}
        return fields | {"has_semantic": keyed.uniform(seed, counter, "label dropout")[:, 0] >= cfg.dropout}

    def rows(self, counter: Tensor) -> Tensor:
        """(B, n) control variables of the samples, in the order of `columns`."""
        index, flip = self.order(counter), torch.zeros(len(counter))
        if self.run.data.flip:
            flip = 1000 * self._mirrored(counter).float()
        values = [flip if name == "flip" else self.measured[name][index] for name in self.columns]
        return torch.stack(values, dim=1)

    def _control(self, counter: Tensor) -> dict[str, Tensor]:
        if not self.columns:
            return {}
        kept = keyed.uniform(self.run.train.seed, counter, "control dropout")[:, 0] >= self.run.control.dropout
        return control_fields(self.run, self.rows(counter)) | {"has_control": kept}


def control_fields(run: Run, rows: Tensor) -> dict[str, Tensor]:
    """Rows (B, n) as the two fields of Cond; a level without variables is absent."""
    high = len(run.control.columns("high"))
    fields = {"control_high": rows[:, :high], "control_low": rows[:, high:]}
    return {name: values for name, values in fields.items() if values.shape[1]}


def text_fields(cfg: Semantic, encoded: text.Encoded, seed: int, sample: Tensor) -> dict[str, Tensor | None]:
    """B texts as the fields of Cond; the noise of the padding is keyed to the sample (B,)."""
    tokens, lengths, pooled = encoded
    eps = keyed.normal(seed, sample, "text padding", tokens.shape[1:]) if cfg.padding == "noisy" else None
    padded, mask = pad(tokens, lengths, cfg.padding, cfg.noise, eps)
    return {"text": padded, "text_mask": mask, "pooled": pooled}
