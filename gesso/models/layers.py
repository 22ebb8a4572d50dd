"""Layers shared by the transformers, with DiT's initial values: Xavier for matrices, zero for biases.

Legend: B batch, T tokens, D width, h heads, d = D/h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def autocast_disabled(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of `like`.

    Embeddings are computed in full precision (EDM2 D.2): they cost little, and every block would share their errors.
    """
    # FLOPs are counted on the meta device, which has no autocast.
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)


def check_size_multiple(x: Tensor, multiple: int) -> None:
    """Raise ValueError if height or width of x (B, C, H, W) is not a multiple of `multiple`."""
    h, w = x.shape[2:]
    if h % multiple or w % multiple:
        raise ValueError(f"this network needs sizes that are multiples of {multiple}, but was given {h} x {w}")


class PatchEmbed(nn.Module):
    """Embed images (B, C, H, W) as tokens (B, T, D), one per square of `patch_size` pixels, row by row."""

    def __init__(self, channels: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, T, D)."""
        check_size_multiple(x, self.patch_size)
        # Contiguous, because the blocks would keep the convolution's layout, in which norms are slow and torch 2.13's
        # compiler computes wrong gradients on a CPU (tests/unit/test_compile.py).
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def unpatchify(tokens: Tensor, h: int, w: int, patch_size: int) -> Tensor:
    """Return images (B, C, h*p, w*p) from tokens (B, h*w, p*p*C), p = patch_size."""
    tokens = tokens.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (h, w))
    return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Mlp(nn.Sequential):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__(linear(width, hidden), nn.GELU(approximate="tanh"), linear(hidden, width))


def build_variance_head(width: int, patch: int, channels: int) -> nn.Linear:
    """Return the output layer of a learned variance, frozen because no loss trains it."""
    return linear(width, patch**2 * channels, zero_init=True).requires_grad_(False)


def linear(n_in: int, n_out: int, bias: bool = True, zero_init: bool = False) -> nn.Linear:
    """Return a linear layer with DiT's initial values; zero_init is for the last layer of a branch."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    if zero_init:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class AdaLN(nn.Module):
    """Adaptive layer norm: n modulation vectors (B, 1, D) from a condition (B, D), zero at initialization."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.n = n
        self.linear = linear(width, n * width, zero_init=True)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """Return n tensors (B, 1, D) for c (B, D)."""
        return self.linear(F.silu(c))[:, None].chunk(self.n, dim=2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return (1 + scale) LN(x) + shift for x (B, T, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class RMSNorm(nn.Module):
    """RMS norm x / rms(x) * weight over the last dimension, in the dtype of x."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x, of the same shape."""
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)


def split_heads(x: Tensor, n: int, heads: int) -> list[Tensor]:
    """Split (B, T, n*D) into n views (B, h, T, d); chunks, so that backward concatenates them in one pass."""
    return [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in x.chunk(n, dim=2)]


class QKV(nn.Module):
    """Queries, keys and values of a stream of tokens; q and k are RMS-normalized per head if `norm`.

    Without `queries`, the queries are not computed, but their rows remain in the weight, as in the published models.
    """

    def __init__(self, width: int, heads: int, bias: bool = True, queries: bool = True, norm: bool = True):
        super().__init__()
        self.heads, self.queries = heads, queries
        self.linear = linear(width, 3 * width, bias=bias)
        self.q_norm = (RMSNorm(width // heads) if norm else nn.Identity()) if queries else None
        self.k_norm = RMSNorm(width // heads) if norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return q (None without queries), k and v, each (B, h, T, d), for x (B, T, D)."""
        if self.q_norm is not None:
            q, k, v = split_heads(self.linear(x), 3, self.heads)
            return self.q_norm(q), self.k_norm(k), v
        weight, bias, D = self.linear.weight, self.linear.bias, x.shape[2]
        k, v = split_heads(F.linear(x, weight[D:], None if bias is None else bias[D:]), 2, self.heads)
        return None, self.k_norm(k), v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax attention (B, T, D) of q, k, v (B, h, T, d); mask (B, keys) bool selects keys."""
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
