"""What the transformers share. Initial values are DiT's: xavier for matrices, zero for biases.

Legend: B batch, T tokens, D width, h heads, d = D/h.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unrounded(like: Tensor) -> torch.autocast:
    """Products in the dtype of their factors although others are rounded to 16 bits: of embeddings (EDM2 D.2), which cost
    little, and whose errors every block would share. like: any tensor of the device."""
    # Networks are counted on meta, which has no autocast.
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)


def check_size(x: Tensor, multiple: int) -> None:
    """Raise ValueError when height or width of x (B, C, H, W) is no multiple of what the network needs."""
    h, w = x.shape[2:]
    if h % multiple or w % multiple:
        raise ValueError(f"a network for sizes that are multiples of {multiple} was given {h} x {w}")


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, T, D), one token per patch x patch square, row by row."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_size(x, self.patch)
        # In order: the blocks would keep the layout of the convolution, in which norms are slow, and of which torch 2.13's
        # compiler makes wrong gradients on a CPU (tests/test_compile.py).
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def unpatchify(tokens: Tensor, h: int, w: int, patch: int) -> Tensor:
    """(B, h*w, patch*patch*C) -> (B, C, h*patch, w*patch)."""
    tokens = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (h, w))
    return tokens.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Mlp(nn.Sequential):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__(linear(width, hidden), nn.GELU(approximate="tanh"), linear(hidden, width))


def variance_head(width: int, patch: int, channels: int) -> nn.Linear:
    """The last layer of a learned variance, beside that of the image; frozen, as no loss trains it."""
    return linear(width, patch**2 * channels, zero=True).requires_grad_(False)


def linear(n_in: int, n_out: int, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear layer with DiT's initial values; zero for the last layer of a branch."""
    layer = nn.Linear(n_in, n_out, bias=bias)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class AdaLN(nn.Module):
    """n modulation vectors from the condition c, zero at the start. (B, D) -> n tensors (B, 1, D)."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.n = n
        self.linear = linear(width, n * width, zero=True)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c))[:, None].chunk(self.n, dim=2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine, then scale and shift. x (B, T, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in the dtype of x."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)


def split_heads(x: Tensor, n: int, heads: int) -> list[Tensor]:
    """(B, T, n*D) -> n views (B, h, T, d). Chunks, so that backward joins them in one pass."""
    return [part.unflatten(2, (heads, -1)).transpose(1, 2) for part in x.chunk(n, dim=2)]


class QKV(nn.Module):
    """Queries, keys and values of one stream of tokens, q and k RMS-normalized per head where `norm`.

    With `queries` False the queries are neither computed nor normalized (their rows stay in the weight,
    as in the published models).
    """

    def __init__(self, width: int, heads: int, bias: bool = True, queries: bool = True, norm: bool = True):
        super().__init__()
        self.heads, self.queries = heads, queries
        self.linear = linear(width, 3 * width, bias=bias)
        self.q_norm = (RMSNorm(width // heads) if norm else nn.Identity()) if queries else None
        self.k_norm = RMSNorm(width // heads) if norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(B, T, D) -> q, k, v of shape (B, h, T, d)."""
        if self.queries:
            q, k, v = split_heads(self.linear(x), 3, self.heads)
            return self.q_norm(q), self.k_norm(k), v
        weight, bias, D = self.linear.weight, self.linear.bias, x.shape[2]
        k, v = split_heads(F.linear(x, weight[D:], None if bias is None else bias[D:]), 2, self.heads)
        return None, self.k_norm(k), v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention over (B, h, T, d), heads joined again: (B, T, D). mask (B, T of keys) bool: what is seen."""
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
