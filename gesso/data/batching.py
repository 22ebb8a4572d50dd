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

from gesso import rng
from gesso.conditioning import Cond, pad_text
from gesso.config import RunConfig, SemanticConfig
from gesso.data.base import Dataset, SampleBatch
from gesso.data.encoders import text
from gesso.data.normalization import Normalizer

MAX_CACHED_TEXT_BYTES = 2**30
"""bytes of text tokens that are kept once they were encoded; where all would take more, none are"""


class Batcher:
    """x0 and conditions for any run of sample counters, on `device`; x0 of standard deviation sd."""

    def __init__(self, dataset: Dataset, run: RunConfig, sigma_data: float, device: torch.device):
        self.dataset, self.run, self.device = dataset, run, device
        self.dtype = getattr(torch, run.train.dtype)
        self.normalizer = Normalizer(run.data, run.latent, sigma_data, device)
        self.control_names = run.control.column_names("high") + run.control.column_names("low")
        self.text_cache = None
        if run.semantic.kind == "text" and dataset.text_config is None:
            self.text_cache = _TextTokenCache(text.build_text_encoder(run.semantic, device), dataset)

    @functools.cached_property
    def sample_order(self) -> Callable[[Tensor], Tensor]:
        """Which image a sample counter stands for."""
        return self.dataset.sample_order(self.run.train.seed, self.run.train.batch_size)

    def __call__(self, sample_index: Tensor) -> tuple[Tensor, Cond]:
        """x0 and the conditions of the samples `counter` (B,)."""
        return self.to_device(sample_index, self.fetch(sample_index))

    def fetch(self, sample_index: Tensor) -> SampleBatch:
        """What comes from disk and processor; any thread may do it."""
        samples = self.dataset.get(self.sample_order(sample_index), sample_index)
        return samples._replace(x=samples.x.pin_memory()) if self.device.type == "cuda" else samples

    def prefetch(self, sample_indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Cond]]:
        """(counter, x0, conditions) of each; while one is used, the next is fetched."""
        if self.dataset.is_cheap:
            yield from ((counter, *self(counter)) for counter in sample_indices)
            return
        with ThreadPoolExecutor(1, "fetch") as pool:
            waiting = None
            for counter in sample_indices:
                following = counter, pool.submit(self.fetch, counter)
                if waiting:
                    yield waiting[0], *self.to_device(waiting[0], waiting[1].result())
                waiting = following
            if waiting:
                yield waiting[0], *self.to_device(waiting[0], waiting[1].result())

    def to_device(self, sample_index: Tensor, samples: SampleBatch) -> tuple[Tensor, Cond]:
        """x0 and conditions on the device."""
        seed = self.run.train.seed
        x0 = self.normalizer.to_x0(samples.x.to(self.device, non_blocking=True), seed, sample_index, self.dtype)
        has_semantic, has_control = shown(self.run, sample_index)
        semantic, control = self._semantic_fields(sample_index, samples), self._control_fields(samples)
        fields = semantic | ({"has_semantic": has_semantic} if semantic else {})
        fields |= control | ({"has_control": has_control} if control else {})
        return x0, Cond(**fields).to(self.device)

    def _semantic_fields(self, sample_index: Tensor, samples: SampleBatch) -> dict[str, Tensor | None]:
        cfg, seed = self.run.semantic, self.run.train.seed
        if cfg.kind == "text":
            return text_tensors(
                cfg, self.text_cache(samples) if self.text_cache else samples.encoded_text, seed, sample_index
            )
        return {"label": samples.labels} if cfg.kind == "label" and self.run.data.num_classes else {}

    def control_rows(self, sample_index: Tensor) -> Tensor:
        """(B, n) control variables of the samples, in the order of `columns`."""
        parts = sample_index.split(self.run.train.batch_size)  # what is taken at once has one size
        return torch.cat([self._stack_columns(self.dataset.get(self.sample_order(some), some)) for some in parts])

    def _stack_columns(self, samples: SampleBatch) -> Tensor:
        columns = samples.control_columns()
        return torch.stack([columns[name] for name in self.control_names], dim=1)

    def _control_fields(self, samples: SampleBatch) -> dict[str, Tensor]:
        return control_tensors(self.run, self._stack_columns(samples)) if self.control_names else {}


class _TextTokenCache:
    """Tokens of the captions of samples: encoded when they first come, and kept where there is room."""

    def __init__(self, encoder: text.TextEncoder, dataset: Dataset):
        self.encoder, self.captions, n = encoder, dataset.captions, len(dataset)
        self.is_cached = torch.zeros(n, dtype=torch.bool)
        self.cached: text.EncodedText | None = None
        if 4 * n * encoder.max_tokens * encoder.embed_dim <= MAX_CACHED_TEXT_BYTES:
            self.cached = text.EncodedText(
                torch.zeros(n, encoder.max_tokens, encoder.embed_dim),
                torch.zeros(n, dtype=torch.int64),
                torch.zeros(n, encoder.pooled_dim),
            )

    def __call__(self, samples: SampleBatch) -> text.EncodedText:
        index = samples.indices
        if self.cached is None:
            return self._encode(index)
        if len(new := index[~self.is_cached[index]].unique()):
            for kept, some in zip(self.cached, self._encode(new), strict=True):
                kept[new] = some
            self.is_cached[new] = True
        return text.EncodedText(*(field[index] for field in self.cached))

    def _encode(self, indices: Tensor) -> text.EncodedText:
        return self.encoder([self.captions[i] for i in indices.tolist()])


def shown(run: RunConfig, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Return has_semantic and has_control (B,) of the samples `counter`: one draw by the shares of run.dropout."""
    d, u = run.dropout, rng.uniform(run.train.seed, counter, "label dropout")[:, 0]
    neither, lacks_semantic = u < d.both, u < d.both + d.semantic
    lacks_control = ~lacks_semantic & (u < d.both + d.semantic + d.control)
    return ~lacks_semantic, ~(neither | lacks_control)


def control_tensors(run: RunConfig, rows: Tensor) -> dict[str, Tensor]:
    """Rows (B, n) as the two fields of Cond; a level without variables is absent."""
    high = len(run.control.column_names("high"))
    fields = {"control_high": rows[:, :high], "control_low": rows[:, high:]}
    return {name: values for name, values in fields.items() if values.shape[1]}


def text_tensors(
    cfg: SemanticConfig, encoded: text.EncodedText, seed: int, sample_index: Tensor
) -> dict[str, Tensor | None]:
    """B texts as the fields of Cond; the noise of the padding is keyed to the sample (B,)."""
    tokens, lengths, pooled = encoded
    eps = rng.normal(seed, sample_index, "text padding", tokens.shape[1:]) if cfg.padding == "noisy" else None
    padded, mask = pad_text(tokens, lengths, cfg.padding, cfg.padding_noise, eps)
    return {"text": padded, "text_mask": mask, "pooled": pooled}
