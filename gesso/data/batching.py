"""Make training batches: x0 and conditions for given sample indices.

The sample index k = 0, 1, 2, ... counts samples since the start of training, over all ranks. Everything about sample k
is a function of (seed, k): image, crop, flip, condition dropout, latent noise, and in the training loop noise level and
noise. So the state of the data is one integer, `nimg`.

Legend: B samples, n control variables; x0 (B, C, H, W).
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

MAX_TEXT_BYTES = 2**30
"""Maximum bytes of encoded captions held in memory; if all captions need more, none are held."""


class Batcher:
    """Function from sample indices (B,) to x0, of standard deviation `sigma_data`, and conditions on `device`."""

    def __init__(self, dataset: Dataset, run: RunConfig, sigma_data: float, device: torch.device):
        self.dataset, self.run, self.device = dataset, run, device
        self.dtype = getattr(torch, run.train.dtype)
        self.normalizer = Normalizer(run.data, run.latent, sigma_data, device)
        self.control_names = run.control.column_names("high") + run.control.column_names("low")
        self.caption_encoder = None
        if run.semantic.kind == "text" and dataset.text_config is None:
            self.caption_encoder = _CaptionEncoder(text.build_text_encoder(run.semantic, device), dataset)

    @functools.cached_property
    def sample_order(self) -> Callable[[Tensor], Tensor]:
        """Return the function that maps sample indices (B,) to image indices (B,)."""
        return self.dataset.sample_order(self.run.train.seed, self.run.train.batch_size)

    def __call__(self, sample_index: Tensor) -> tuple[Tensor, Cond]:
        """Return x0 (B, C, H, W) and the conditions of the samples `sample_index` (B,)."""
        return self.to_device(sample_index, self.fetch(sample_index))

    def fetch(self, sample_index: Tensor) -> SampleBatch:
        """Read the samples `sample_index` (B,) on the CPU; thread-safe."""
        samples = self.dataset.get(self.sample_order(sample_index), sample_index)
        return samples._replace(x=samples.x.pin_memory()) if self.device.type == "cuda" else samples

    def prefetch(self, sample_indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Cond]]:
        """Yield (sample_index, x0, conditions) of each batch; the next batch is read in a thread meanwhile."""
        if self.dataset.is_cheap:
            yield from ((sample_index, *self(sample_index)) for sample_index in sample_indices)
            return
        with ThreadPoolExecutor(1, "fetch") as pool:
            submitted = ((sample_index, pool.submit(self.fetch, sample_index)) for sample_index in sample_indices)
            pending = next(submitted, None)
            while pending:
                sample_index, future = pending
                pending = next(submitted, None)
                yield sample_index, *self.to_device(sample_index, future.result())

    def to_device(self, sample_index: Tensor, samples: SampleBatch) -> tuple[Tensor, Cond]:
        """Return x0 and the conditions of `samples` on the device, with condition dropout applied."""
        seed = self.run.train.seed
        x0 = self.normalizer.to_x0(samples.x.to(self.device, non_blocking=True), seed, sample_index, self.dtype)
        has_semantic, has_control = condition_dropout(self.run, sample_index)
        semantic, control = self._semantic_fields(sample_index, samples), self._control_fields(samples)
        fields = semantic | ({"has_semantic": has_semantic} if semantic else {})
        fields |= control | ({"has_control": has_control} if control else {})
        return x0, Cond(**fields).to(self.device)

    def _semantic_fields(self, sample_index: Tensor, samples: SampleBatch) -> dict[str, Tensor | None]:
        cfg, seed = self.run.semantic, self.run.train.seed
        if cfg.kind == "text":
            return text_tensors(cfg, self.encoded_text(samples), seed, sample_index)
        return {"label": samples.labels} if cfg.kind == "label" and self.run.data.num_classes else {}

    def encoded_text(self, samples: SampleBatch) -> text.EncodedText:
        """Return the encoded captions of samples, stored by the dataset or encoded here."""
        if self.caption_encoder:
            return self.caption_encoder(samples)
        assert samples.encoded_text is not None  # without an encoder, the dataset stores tokens
        return samples.encoded_text

    def control_rows(self, sample_index: Tensor) -> Tensor:
        """Return the control variables (B, n) of the samples, in the order of `control_names`."""
        batches = sample_index.split(self.run.train.batch_size)  # images of one batch have one size
        return torch.cat([self._stack_columns(self.dataset.get(self.sample_order(k), k)) for k in batches])

    def _stack_columns(self, samples: SampleBatch) -> Tensor:
        columns = samples.control_columns()
        return torch.stack([columns[name] for name in self.control_names], dim=1)

    def _control_fields(self, samples: SampleBatch) -> dict[str, Tensor]:
        return control_tensors(self.run, self._stack_columns(samples)) if self.control_names else {}


class _CaptionEncoder:
    """Encoder of the captions of samples; holds the results in memory if all fit into MAX_TEXT_BYTES."""

    def __init__(self, encoder: text.TextEncoder, dataset: Dataset):
        self.encoder, self.captions, n = encoder, dataset.captions, len(dataset)
        self.is_encoded = torch.zeros(n, dtype=torch.bool)
        self.encoded: text.EncodedText | None = None
        if 4 * n * encoder.max_tokens * encoder.embed_dim <= MAX_TEXT_BYTES:
            self.encoded = text.EncodedText(
                torch.zeros(n, encoder.max_tokens, encoder.embed_dim),
                torch.zeros(n, dtype=torch.int64),
                torch.zeros(n, encoder.pooled_dim),
            )

    def __call__(self, samples: SampleBatch) -> text.EncodedText:
        index = samples.indices
        if self.encoded is None:
            return self._encode(index)
        if len(new := index[~self.is_encoded[index]].unique()):
            for stored, values in zip(self.encoded, self._encode(new), strict=True):
                stored[new] = values
            self.is_encoded[new] = True
        return text.EncodedText(*(field[index] for field in self.encoded))

    def _encode(self, indices: Tensor) -> text.EncodedText:
        return self.encoder([self.captions[i] for i in indices.tolist()])


def condition_dropout(run: RunConfig, sample_index: Tensor) -> tuple[Tensor, Tensor]:
    """Draw condition dropout: return has_semantic and has_control, (B,) bool, with the probabilities of run.dropout."""
    d, u = run.dropout, rng.uniform(run.train.seed, sample_index, "label dropout")[:, 0]
    drop_both, drop_semantic = u < d.both, u < d.both + d.semantic
    drop_control = drop_both | ~drop_semantic & (u < d.both + d.semantic + d.control)
    return ~drop_semantic, ~drop_control


def control_tensors(run: RunConfig, rows: Tensor) -> dict[str, Tensor]:
    """Split control variables (B, n) into the fields control_high and control_low of Cond; omit empty ones."""
    high = len(run.control.column_names("high"))
    fields = {"control_high": rows[:, :high], "control_low": rows[:, high:]}
    return {name: values for name, values in fields.items() if values.shape[1]}


def text_tensors(
    cfg: SemanticConfig, encoded: text.EncodedText, seed: int, sample_index: Tensor
) -> dict[str, Tensor | None]:
    """Return encoded captions as fields of Cond; the padding noise is keyed to `sample_index` (B,)."""
    tokens, lengths, pooled = encoded
    eps = rng.normal(seed, sample_index, "text padding", tokens.shape[1:]) if cfg.padding == "noisy" else None
    padded, mask = pad_text(tokens, lengths, cfg.padding, cfg.padding_noise, eps)
    return {"text": padded, "text_mask": mask, "pooled": pooled}
