"""Gradients and attention at the text tokens of a trained network: Figures A3 and A4 of Berrada et al. 2024.

Legend: B samples, S text tokens, T image tokens, D channels of a token.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gesso import ema, rng, snapshot
from gesso.conditioning import Cond
from gesso.config.net import TransformerConfig
from gesso.data.batching import Batcher
from gesso.data.factory import open_dataset
from gesso.diffusion.denoiser import Denoiser, loss
from gesso.errors import UsageError
from gesso.reproduce.plan import MeasurementJob
from gesso.sampling import run_device

NUM_SAMPLES = 256
"""Number of training images with captions, each at one noise level of training."""


class _Batch(NamedTuple):
    """A batch of captioned images whose captions end before the last token.

    x0 (B, C, H, W); cond without dropped conditions; text (B, S, D), the tokens of cond; lengths (B,) of the captions.
    """

    denoiser: Denoiser
    patch_size: int
    x0: Tensor
    cond: Cond
    text: Tensor
    lengths: Tensor

    def loss(self, text: Tensor) -> Tensor:
        """Return the loss of each image with other text tokens."""
        counter = torch.arange(len(self.x0), device=self.x0.device)
        process = self.denoiser.process
        s = process.icdf(rng.uniform(0, counter, "level of a look inside")[:, 0]).to(self.x0)
        eps = rng.normal(0, counter, "noise of a look inside", self.x0.shape[1:]).to(self.x0)
        return loss(self.denoiser, process, self.x0, s, eps, dataclasses.replace(self.cond, text=text))


def measure_padding_gradients(job: MeasurementJob) -> dict[str, Any]:
    """Return `padding_fraction`: the fraction of the loss's gradient norms by text tokens that is at padding tokens."""
    batch = _open_run(job)
    text = batch.text.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(batch.loss(text).sum(), text)
    return {"values": {"padding_fraction": _padding_fraction(gradient.norm(dim=2), batch.lengths)}}


@torch.no_grad()
def measure_padding_attention(job: MeasurementJob) -> dict[str, Any]:
    """Return statistics of the attention of image tokens to text tokens, averaged over blocks and heads.

    padding_fraction: the fraction on padding tokens; entropy: relative to uniform attention; copy_similarity: mean
    cosine similarity of tokens and their copies.
    """
    batch = _open_run(job)
    S, T = batch.text.shape[1], math.prod(batch.x0.shape[2:]) // batch.patch_size**2
    with _AttentionRecorder(S, T) as recorder:
        batch.loss(batch.text)
    weights = torch.stack(recorder.weights).mean(dim=0)  # (B, S), sums to 1
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(dim=1) / math.log(S)
    values = {
        "padding_fraction": _padding_fraction(weights, batch.lengths),
        "entropy": float(entropy.mean()),
        "copy_similarity": _copy_similarity(batch.text, batch.lengths),
    }
    return {"values": values}


def _open_run(job: MeasurementJob) -> _Batch:
    """Return a batch of a run. Raises UsageError if the run has no transformer with captions."""
    assert job.training is not None
    folder = job.training.folder
    weights, run, _, _ = snapshot.reconstruct_from_run(folder, [ema.sampling_profile(job.training.run.sample)])
    device = run_device(run)
    denoiser = snapshot.denoiser_from_weights(weights[0], run, device)
    dataset = open_dataset(run.data, run.latent, run.train.seed)
    batcher = Batcher(dataset, run, denoiser.process.sigma_data, device)
    sample_index = torch.arange(NUM_SAMPLES)
    samples = batcher.fetch(sample_index)
    x0, cond = batcher.to_device(sample_index, samples)
    if cond.text is None or not isinstance(run.net, TransformerConfig):
        raise UsageError(
            f"{folder} is not a transformer with captions: set semantic.kind=text and a transformer in net.name"
        )
    encoded = batcher.encoded_text(samples)
    has_padding = (encoded.lengths < encoded.tokens.shape[1]) & (encoded.lengths > 0)
    text = cond.text[has_padding]
    cond = dataclasses.replace(cond, has_semantic=None, has_control=None)[has_padding]
    lengths = encoded.lengths[has_padding].to(x0.device)
    return _Batch(denoiser, run.net.patch_size, x0[has_padding], cond, text, lengths)


class _AttentionRecorder(TorchFunctionMode):
    """Record the attention weights of image tokens to text tokens, (B, S) with sum 1, of every joint attention."""

    def __init__(self, num_text_tokens: int, num_image_tokens: int):
        super().__init__()
        self.num_text_tokens = num_text_tokens
        self.num_image_tokens = num_image_tokens
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[1].shape[2] == self.num_text_tokens + self.num_image_tokens:
            self._record(args[0], args[1], kwargs["attn_mask"])
        return func(*args, **kwargs)

    def _record(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        scores = q[:, :, -self.num_image_tokens :] @ k.transpose(2, 3) / q.shape[3] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=3)[..., : self.num_text_tokens].mean(dim=(1, 2))
        self.weights.append(weights / weights.sum(dim=1, keepdim=True))


def _padding_fraction(values: Tensor, lengths: Tensor) -> float:
    """Return the fraction of values (B, S) at positions from `lengths` (B,) on, averaged over B."""
    is_padding = torch.arange(values.shape[1], device=values.device) >= lengths[:, None]
    return float(((values * is_padding).sum(dim=1) / values.sum(dim=1)).mean())


def _copy_similarity(text: Tensor, lengths: Tensor) -> float:
    """Return the mean cosine similarity of padding tokens and the caption tokens that they would copy."""
    position = torch.arange(text.shape[1], device=text.device)
    is_padding = position >= lengths[:, None]
    source = text.gather(1, (position % lengths[:, None])[:, :, None].expand_as(text))
    return float(F.cosine_similarity(text, source, dim=2)[is_padding].mean())
