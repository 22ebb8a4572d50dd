"""What a trained network does with its text tokens: Figures A3 and A4 of Berrada et al. 2024.

Legend: B samples, S text tokens, T image tokens, D channels of a token.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gesso import ema, keyed, snapshot
from gesso.cond import Cond
from gesso.data.batches import Batches
from gesso.data.dataset import open_dataset
from gesso.diffusion.denoiser import Denoiser, loss
from gesso.generate import device_of
from gesso.tables.plan import Job

COUNT = 256
"""training images with their captions, each at a noise level of training"""


def gradients(job: Job) -> dict[str, Any]:
    """{"padding_share"}: the share of the norms of the loss's gradients by text tokens that falls behind the captions' ends."""
    denoiser, x0, cond, lengths = _opened(job)
    text = cond.text.clone().requires_grad_()
    _loss(denoiser, x0, dataclasses.replace(cond, text=text)).sum().backward()
    norms = text.grad.norm(dim=2)  # (B, S)
    return {"found": {"padding_share": _share(norms, lengths)}}


@torch.no_grad()
def attention(job: Job) -> dict[str, Any]:
    """Of the attention of image tokens to text tokens, over all blocks and heads: {"padding_share": what falls behind the
    captions' ends; "entropy": over that of evenly spread attention}. {"alike": the mean cosine of tokens and their copies}."""
    denoiser, x0, cond, lengths = _opened(job)
    S, T = cond.text.shape[1], math.prod(x0.shape[2:]) // denoiser.net.patch**2
    with _Watched(S, T) as seen:
        _loss(denoiser, x0, cond)
    weights = torch.stack(seen.weights).mean(dim=0)  # (B, S), of sum 1
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(dim=1) / math.log(S)
    found = {
        "padding_share": _share(weights, lengths),
        "entropy": float(entropy.mean()),
        "alike": _alike(cond.text, lengths),
    }
    return {"found": found}


def _opened(job: Job) -> tuple[Denoiser, Tensor, Cond, Tensor]:
    """Denoiser, (B, C, H, W) images, their conditions with nothing withheld, and (B,) lengths of captions that end
    before the last token."""
    assert job.trained is not None
    weights, run, _, _ = snapshot.synthesize(job.trained.folder, [ema.chosen(job.trained.run.sample)])
    denoiser = snapshot.denoiser(weights[0], run, device_of(run))
    dataset = open_dataset(run.data, run.latent, run.train.seed)
    batches, counter = Batches(dataset, run, denoiser.process.sd, device_of(run)), torch.arange(COUNT)
    samples = batches.fetch(counter)
    x0, cond = batches.finish(counter, samples)
    texts = batches.texts(samples) if batches.texts else samples.texts
    some = (texts.lengths < texts.tokens.shape[1]) & (texts.lengths > 0)
    cond = dataclasses.replace(cond, has_semantic=None, has_control=None)
    return denoiser, x0[some], cond[some], texts.lengths[some].to(x0.device)


def _loss(denoiser: Denoiser, x0: Tensor, cond: Cond) -> Tensor:
    counter = torch.arange(len(x0), device=x0.device)
    s = denoiser.process.quantile(keyed.uniform(0, counter, "level of a look inside")[:, 0]).to(x0)
    eps = keyed.normal(0, counter, "noise of a look inside", x0.shape[1:]).to(x0)
    return loss(denoiser, denoiser.process, x0, s, eps, cond)


class _Watched(TorchFunctionMode):
    """Notes the attention of image tokens to text tokens in every joint attention over S text and T image tokens: (B, S), of
    sum 1."""

    def __init__(self, text: int, image: int):
        super().__init__()
        self.text, self.image, self.weights = text, image, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[1].shape[2] == self.text + self.image:
            self._note(args[0], args[1], kwargs["attn_mask"])
        return func(*args, **kwargs)

    def _note(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        scores = q[:, :, -self.image :] @ k.transpose(2, 3) / q.shape[3] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=3)[..., : self.text].mean(dim=(1, 2))
        self.weights.append(weights / weights.sum(dim=1, keepdim=True))


def _share(values: Tensor, lengths: Tensor) -> float:
    """Of (B, S) the share at places behind the first `lengths` (B,), the mean over B."""
    behind = torch.arange(values.shape[1], device=values.device) >= lengths[:, None]
    return float(((values * behind).sum(dim=1) / values.sum(dim=1)).mean())


def _alike(text: Tensor, lengths: Tensor) -> float:
    """Mean cosine of what stands behind the end of a caption and the token of it that it would be a copy of."""
    place = torch.arange(text.shape[1], device=text.device)
    behind = place >= lengths[:, None]
    source = text.gather(1, (place % lengths[:, None])[:, :, None].expand_as(text))
    return float(F.cosine_similarity(text, source, dim=2)[behind].mean())
