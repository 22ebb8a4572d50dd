"""The batch that a run of sample counters makes.

The counter k = 0, 1, 2, ... counts samples since the beginning of training, over all ranks. Everything
about sample k is a function of (seed, k): order, crop, flip, withheld conditions, latent noise, and in the loop noise
level and noise. The state of the data is therefore one integer, `nimg`.

Legend: B samples, n numbers of control; x0 (B, C, H, W).
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from gesso import keyed
from gesso.cond import Cond, pad
from gesso.config import Run, Semantic
from gesso.data import text
from gesso.data.samples import Dataset, Samples
from gesso.data.space import Space

KEPT = 2**30
"""bytes of text tokens that are kept once they were encoded; where all would take more, none are"""


class Batches:
    """x0 and conditions for any run of sample counters, on `device`; x0 of standard deviation sd."""

    def __init__(self, dataset: Dataset, run: Run, sd: float, device: torch.device):
        self.dataset, self.run, self.device = dataset, run, device
        self.dtype = getattr(torch, run.train.dtype)
        self.space = Space(run.data, run.latent, sd, device)
        self.columns = run.control.columns("high") + run.control.columns("low")
        self.texts = None
        if run.semantic.kind == "text" and dataset.encoded is None:
            self.texts = _Texts(text.build(run.semantic, device), dataset)

    @functools.cached_property
    def order(self) -> Callable[[Tensor], Tensor]:
        """Which image a sample counter stands for."""
        return self.dataset.order(self.run.train.seed, self.run.train.batch_size)

    def __call__(self, counter: Tensor) -> tuple[Tensor, Cond]:
        """x0 and the conditions of the samples `counter` (B,)."""
        return self.finish(counter, self.fetch(counter))

    def fetch(self, counter: Tensor) -> Samples:
        """What comes from disk and processor; any thread may do it."""
        samples = self.dataset.take(self.order(counter), counter)
        return samples._replace(x=samples.x.pin_memory()) if self.device.type == "cuda" else samples

    def ahead(self, counters: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Cond]]:
        """(counter, x0, conditions) of each; while one is used, the next is fetched."""
        if self.dataset.immediate:
            yield from ((counter, *self(counter)) for counter in counters)
            return
        with ThreadPoolExecutor(1, "fetch") as pool:
            waiting = None
            for counter in counters:
                following = counter, pool.submit(self.fetch, counter)
                if waiting:
                    yield waiting[0], *self.finish(waiting[0], waiting[1].result())
                waiting = following
            if waiting:
                yield waiting[0], *self.finish(waiting[0], waiting[1].result())

    def finish(self, counter: Tensor, samples: Samples) -> tuple[Tensor, Cond]:
        """x0 and conditions on the device."""
        seed = self.run.train.seed
        x0 = self.space.x0(samples.x.to(self.device, non_blocking=True), seed, counter, self.dtype)
        has_semantic, has_control = shown(self.run, counter)
        semantic, control = self._semantic(counter, samples), self._control(samples)
        fields = semantic | ({"has_semantic": has_semantic} if semantic else {})
        fields |= control | ({"has_control": has_control} if control else {})
        return x0, Cond(**fields).to(self.device)

    def _semantic(self, counter: Tensor, samples: Samples) -> dict[str, Tensor | None]:
        cfg, seed = self.run.semantic, self.run.train.seed
        if cfg.kind == "text":
            return text_fields(cfg, self.texts(samples) if self.texts else samples.texts, seed, counter)
        return {"label": samples.labels} if cfg.kind == "label" and self.run.data.num_classes else {}

    def rows(self, counter: Tensor) -> Tensor:
        """(B, n) control variables of the samples, in the order of `columns`."""
        parts = counter.split(self.run.train.batch_size)  # what is taken at once has one size
        return torch.cat([self._rows(self.dataset.take(self.order(some), some)) for some in parts])

    def _rows(self, samples: Samples) -> Tensor:
        columns = samples.columns()
        return torch.stack([columns[name] for name in self.columns], dim=1)

    def _control(self, samples: Samples) -> dict[str, Tensor]:
        return control_fields(self.run, self._rows(samples)) if self.columns else {}


class _Texts:
    """Tokens of the captions of samples: encoded when they first come, and kept where there is room."""

    def __init__(self, encoder: text.TextEncoder, dataset: Dataset):
        self.encoder, self.captions, n = encoder, dataset.captions, len(dataset)
        self.known = torch.zeros(n, dtype=torch.bool)
        self.kept: text.Encoded | None = None
        if 4 * n * encoder.tokens * encoder.width <= KEPT:
            self.kept = text.Encoded(
                torch.zeros(n, encoder.tokens, encoder.width),
                torch.zeros(n, dtype=torch.int64),
                torch.zeros(n, encoder.pooled_width),
            )

    def __call__(self, samples: Samples) -> text.Encoded:
        index = samples.index
        if self.kept is None:
            return self._encoded(index)
        if len(new := index[~self.known[index]].unique()):
            for kept, some in zip(self.kept, self._encoded(new), strict=True):
                kept[new] = some
            self.known[new] = True
        return text.Encoded(*(field[index] for field in self.kept))

    def _encoded(self, index: Tensor) -> text.Encoded:
        return self.encoder([self.captions[i] for i in index.tolist()])


def shown(run: Run, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Return has_semantic and has_control (B,) of the samples `counter`: one draw by the shares of run.dropout."""
    d, u = run.dropout, keyed.uniform(run.train.seed, counter, "label dropout")[:, 0]
    neither, lacks_semantic = u < d.both, u < d.both + d.semantic
    lacks_control = ~lacks_semantic & (u < d.both + d.semantic + d.control)
    return ~lacks_semantic, ~(neither | lacks_control)


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
