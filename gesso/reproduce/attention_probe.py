"""Gradients and attention at the text tokens of a trained network: Figures A3 and A4 of Berrada et al. 2024.

Legend: B samples, S text tokens, T image tokens, D channels of a token.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gesso import ema, rng, snapshot
from gesso.conditioning import Cond
from gesso.data.batching import Batcher
from gesso.data.factory import open_dataset
from gesso.diffusion.denoiser import Denoiser, loss
from gesso.reproduce.plan import MeasurementJob
from gesso.sampling import run_device

NUM_SAMPLES = 256
"""Number of training images with captions, each at one noise level of training."""


def measure_padding_gradients(job: MeasurementJob) -> dict[str, Any]:
    """Return `padding_fraction`: the fraction of the loss's gradient norms by text tokens that is at padding tokens."""
    denoiser, x0, cond, lengths = _open_run(job)
    text = cond.text.clone().requires_grad_()
    _loss(denoiser, x0, dataclasses.replace(cond, text=text)).sum().backward()
    norms = text.grad.norm(dim=2)  # (B, S)
    return {"values": {"padding_fraction": _padding_fraction(norms, lengths)}}


@torch.no_grad()
def measure_padding_attention(job: MeasurementJob) -> dict[str, Any]:
    """Return statistics of the attention of image tokens to text tokens, averaged over blocks and heads.

    padding_fraction: the fraction on padding tokens; entropy: relative to uniform attention; copy_similarity: mean cosine similarity of
    tokens and their copies.
    """
    denoiser, x0, cond, lengths = _open_run(job)
    S, T = cond.text.shape[1], math.prod(x0.shape[2:]) // denoiser.net.patch_size**2
    with _AttentionRecorder(S, T) as recorder:
        _loss(denoiser, x0, cond)
    weights = torch.stack(recorder.weights).mean(dim=0)  # (B, S), sums to 1
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(dim=1) / math.log(S)
    values = {
        "padding_fraction": _padding_fraction(weights, lengths),
        "entropy": float(entropy.mean()),
        "copy_similarity": _copy_similarity(cond.text, lengths),
    }
    return {"values": values}


def _open_run(job: MeasurementJob) -> tuple[Denoiser, Tensor, Cond, Tensor]:
    """Return the denoiser, images (B, C, H, W), their full conditions, and caption lengths (B,).

    Only captions that end before the last token are used.
    """
    assert job.training is not None
    weights, run, _, _ = snapshot.reconstruct_from_run(
        job.training.folder, [ema.sampling_profile(job.training.run.sample)]
    )
    denoiser = snapshot.denoiser_from_weights(weights[0], run, run_device(run))
    dataset = open_dataset(run.data, run.latent, run.train.seed)
    batches, counter = Batcher(dataset, run, denoiser.process.sigma_data, run_device(run)), torch.arange(NUM_SAMPLES)
    samples = batches.fetch(counter)
    x0, cond = batches.to_device(counter, samples)
    texts = batches.text_cache(samples) if batches.text_cache else samples.encoded_text
    has_padding = (texts.lengths < texts.tokens.shape[1]) & (texts.lengths > 0)
    cond = dataclasses.replace(cond, has_semantic=None, has_control=None)
    return denoiser, x0[has_padding], cond[has_padding], texts.lengths[has_padding].to(x0.device)


def _loss(denoiser: Denoiser, x0: Tensor, cond: Cond) -> Tensor:
    counter = torch.arange(len(x0), device=x0.device)
    s = denoiser.process.icdf(rng.uniform(0, counter, "level of a look inside")[:, 0]).to(x0)
    eps = rng.normal(0, counter, "noise of a look inside", x0.shape[1:]).to(x0)
    return loss(denoiser, denoiser.process, x0, s, eps, cond)


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
