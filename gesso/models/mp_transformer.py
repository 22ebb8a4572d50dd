"""DiT and mmDiT++ with magnitude-preserving layers and all weights on the sphere.

These networks are not published; EDM2 (Karras et al. 2024, Section 5) proposes its method for DiT. DiT's parts become:

  bias           a constant input of 1 with patches and text, none elsewhere
  LayerNorm      pixel norm (Eq. 30) of the main path before each branch, as at the start of EDM2's encoder blocks:
                 MP-sums keep the magnitude near 1, the norm removes what gains and alignment add
  q k v          cosine attention: q, k and v pixel-normalized per head (Eq. 30-34)
  x + branch     MP-sum with balance t (Eq. 88). After 2L branches (1 + t^2/(1-t)^2)^(-2L) of the energy is the
                 input's, 1/e at t = 1/(1 + sqrt(2L)): .17 for 12 blocks, .12 for 28. EDM2's .3 counts on
                 a U-Net's skips: through 28 blocks it leaves all tokens of an image nearly equal
  GELU, SiLU     divided by their rms under N(0,1) (Eq. 81)
  adaLN          y * (1 + g linear(emb)), a learned g that starts at 0, at three places of a block:
                 its scale on the input of attention, whose magnitude the norms of q, k and v undo;
                 its gate on the attended values before the output layer;
                 its scale and gate combined on the hidden units of the MLP, before the nonlinearity as in EDM2.
                 Weights: D^2 + D^2 + 4 D^2, as adaLN's 6 D^2. Nothing replaces the shift, as in EDM2.
  zero layers    g = 0 and an output gain of 0 at initialization: F = 0. The branches are not zero.

Legend: B batch, C channels, H W height and width, p patch, D width, T image tokens, S semantic tokens, h heads,
d = D/h.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import InputSpec, MPDiTConfig, MPMMDiTppConfig
from gesso.models.embeddings import MPControlEmbedding, build_pos_embed, labels_or_null, text_or_zero
from gesso.models.layers import attention, autocast_disabled, check_size_multiple, unpatchify
from gesso.models.mp import MPFourier, MPLinear, mp_silu, mp_sum, pixel_norm

GELU_RMS = 0.652
POSITION_BALANCE = 0.5
LABEL_BALANCE = 0.5


def mp_gelu(x: Tensor) -> Tensor:
    """Return the tanh-GELU divided by its rms under N(0,1), as Eq. 81 for SiLU."""
    return F.gelu(x, approximate="tanh") / GELU_RMS


def append_ones(x: Tensor) -> Tensor:
    """Return x (B, T, D) with a constant input of 1, (B, T, D+1), whose weights replace a bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


class MPPatchEmbed(nn.Module):
    """Embed images (B, C, H, W) as tokens (B, T, D), row by row, with positions added by MP-sum."""

    def __init__(self, cfg: MPDiTConfig | MPMMDiTppConfig, inputs: InputSpec):
        super().__init__()
        self.patch_size = cfg.patch_size
        self.linear = MPLinear(cfg.patch_size**2 * inputs.channels + 1, cfg.hidden_size)
        self.position = build_pos_embed(inputs, cfg.hidden_size, cfg.patch_size, cfg.pos_embed)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, T, D)."""
        check_size_multiple(x, self.patch_size)
        patches = F.pixel_unshuffle(x, self.patch_size)  # B Cpp H/p W/p
        tokens = self.linear(append_ones(patches.flatten(2).transpose(1, 2)))
        # sin^2 + cos^2 = 1: the table has an rms of sqrt(1/2).
        position = math.sqrt(2) * self.position(*patches.shape[2:]).to(tokens.dtype)
        return mp_sum(tokens, position, POSITION_BALANCE)


class MPClassEmbedding(nn.Module):
    """Class embedding of magnitude 1, (B, D); the last row of the weights is the null class.

    EDM2's null class is a zero vector, which would reduce the magnitude of the sum with the noise level to sqrt(1/2)
    and leave a token of zeros.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.linear = MPLinear(num_classes + 1, width)

    def forward(self, cond: Cond, x: Tensor) -> Tensor:
        """Return the embedding (B, D); x is any tensor of the batch."""
        label = labels_or_null(cond, self.num_classes, x)
        one_hot = F.one_hot(label, self.num_classes + 1).to(self.linear.weight.dtype)
        with autocast_disabled(x):
            # One-hot vectors of unit variance (EDM2 Appendix B.3).
            return self.linear(one_hot * math.sqrt(self.num_classes + 1))


class MPTextEmbedding(nn.Module):
    """Text tokens (B, S, D) of magnitude 1: pixel norm, constant input, pixel norm, linear.

    Without biases a zero token would stay zero, where a pixel norm has slope 1/eps. The constant input makes withheld
    text a learned token, as the null class is.
    """

    def __init__(self, text_dim: int, width: int):
        super().__init__()
        self.linear = MPLinear(text_dim + 1, width)

    def forward(self, text: Tensor) -> Tensor:
        """Return tokens (B, S, D) for text (B, S, text_dim)."""
        return self.linear(pixel_norm(append_ones(pixel_norm(text, dim=2)), dim=2))


class MPModulation(nn.Module):
    """Modulation y * (1 + gain * linear(emb)) with a learned gain, initially 0."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))
        self.linear = MPLinear(width, n)

    def forward(self, y: Tensor, emb: Tensor) -> Tensor:
        """Return the modulated y, (B, T, n), for emb (B, D)."""
        with autocast_disabled(emb):
            scale = (self.linear(emb, gain=self.gain) + 1).to(y.dtype)
        return y * scale[:, None]


class CosineQKV(nn.Module):
    """Queries, keys and values (n = 2: keys and values), pixel-normalized per head (Eq. 30-34)."""

    def __init__(self, width: int, heads: int, n: int = 3):
        super().__init__()
        self.n, self.heads = n, heads
        self.linear = MPLinear(width, n * width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return n tensors (B, h, T, d) for x (B, T, D)."""
        heads = self.linear(x).unflatten(2, (self.n, self.heads, -1))
        return pixel_norm(heads, dim=4).permute(2, 0, 3, 1, 4).unbind(0)


class MPBlock(nn.Module):
    """Attention and MLP over a sequence of semantic tokens, then image tokens.

    The semantic tokens have their own qkv and share the other weights (separate_text_weights="qkv" of mmDiT++). In the
    last block they only provide keys and values, and the block returns the image tokens.
    """

    def __init__(self, cfg: MPDiTConfig | MPMMDiTppConfig, has_semantic: bool, is_last: bool):
        super().__init__()
        width, hidden = cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_ratio)
        self.is_last = is_last
        default_balance = 1 / (1 + (2 * cfg.depth) ** 0.5)
        self.residual_balance = default_balance if cfg.residual_balance is None else cfg.residual_balance
        self.scale = MPModulation(width, width)
        self.qkv = CosineQKV(width, cfg.num_heads)
        self.semantic_qkv = CosineQKV(width, cfg.num_heads, n=2 if is_last else 3) if has_semantic else None
        self.gate = MPModulation(width, width)
        self.proj = MPLinear(width, width)
        self.mlp_in = MPLinear(width, hidden)
        self.mlp_scale = MPModulation(width, hidden)
        self.mlp_out = MPLinear(hidden, width)

    def attend(self, x: Tensor, emb: Tensor, mask: Tensor | None, num_semantic: int) -> Tensor:
        """Return attended values for x (B, S+T, D): (B, S+T, D), in the last block (B, T, D)."""
        x = self.scale(x, emb)
        q, k, v = self.qkv(x[:, num_semantic:])
        if self.semantic_qkv is not None:
            *semantic_q, semantic_k, semantic_v = self.semantic_qkv(x[:, :num_semantic])
            q = torch.cat([*semantic_q, q], dim=2)
            k, v = torch.cat([semantic_k, k], dim=2), torch.cat([semantic_v, v], dim=2)
        return self.gate(attention(q, k, v, mask), emb)

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor | None, num_semantic: int) -> Tensor:
        """Return tokens (B, S+T, D), in the last block (B, T, D); emb (B, D), mask (B, S+T) selects keys, None all."""
        x = pixel_norm(x, dim=2)
        attended = self.attend(x, emb, mask, num_semantic)
        if self.is_last:
            x = x[:, num_semantic:]
        x = pixel_norm(mp_sum(x, self.proj(attended), self.residual_balance), dim=2)
        hidden = mp_gelu(self.mlp_scale(self.mlp_in(x), emb))
        return mp_sum(x, self.mlp_out(hidden), self.residual_balance)


class MPNoiseEmbedding(nn.Module):
    """Embedding (B, D) of the noise level: Fourier features and a linear layer (EDM2 Figure 22)."""

    def __init__(self, width: int):
        super().__init__()
        self.fourier = MPFourier(width)
        self.linear = MPLinear(width, width)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Return the embedding (B, D) of c_noise (B,)."""
        with autocast_disabled(c_noise):
            return self.linear(self.fourier(c_noise))


class MPDiT(nn.Module):
    """Magnitude-preserving DiT F = net(x, c_noise, progress, cond), x and F (B, C, H, W); zero at initialization.

    Noise level, class and control modulate every block.
    """

    def __init__(self, cfg: MPDiTConfig, inputs: InputSpec):
        super().__init__()
        self.patch_size = cfg.patch_size
        self.patch_embed = MPPatchEmbed(cfg, inputs)
        self.noise = MPNoiseEmbedding(cfg.hidden_size)
        self.label = MPClassEmbedding(inputs.num_classes, cfg.hidden_size) if inputs.num_classes else None
        self.control = MPControlEmbedding(inputs.control, cfg.hidden_size)
        self.blocks = nn.ModuleList(MPBlock(cfg, has_semantic=False, is_last=False) for _ in range(cfg.depth))
        self.out = MPLinear(cfg.hidden_size, cfg.patch_size**2 * inputs.channels)
        self.out_gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return F, (B, C, H, W); see `gesso.models` for the arguments."""
        emb = self.noise(c_noise)
        if self.label is not None:
            emb = mp_sum(emb, self.label(cond, emb), LABEL_BALANCE)
        emb = mp_silu(self.control.add(emb, cond, progress)).to(x.dtype)
        tokens = self.patch_embed(x)
        for block in self.blocks:
            tokens = block(tokens, emb, None, 0)
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        return unpatchify(self.out(tokens, gain=self.out_gain), h, w, self.patch_size)


class MPMMDiTpp(nn.Module):
    """Magnitude-preserving mmDiT++ F = net(x, c_noise, progress, cond), x and F (B, C, H, W); zero at initialization.

    The joint attention sees the class as one token, or the text tokens. Noise level and control modulate every block.
    """

    def __init__(self, cfg: MPMMDiTppConfig, inputs: InputSpec):
        super().__init__()
        self.patch_size = cfg.patch_size
        self.patch_embed = MPPatchEmbed(cfg, inputs)
        self.noise = MPNoiseEmbedding(cfg.hidden_size)
        self.label = MPClassEmbedding(inputs.num_classes, cfg.hidden_size) if inputs.num_classes else None
        self.text = MPTextEmbedding(inputs.text_dim, cfg.hidden_size) if inputs.text_dim else None
        self.control = MPControlEmbedding(inputs.control, cfg.hidden_size)
        self.blocks = nn.ModuleList(
            MPBlock(cfg, inputs.has_semantic, is_last=i == cfg.depth - 1) for i in range(cfg.depth)
        )
        self.out = MPLinear(cfg.hidden_size, cfg.patch_size**2 * inputs.channels)
        self.out_gain = nn.Parameter(torch.zeros(1))

    def prepend_semantic_tokens(self, tokens: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None, int]:
        """Return semantic and image tokens (B, S+T, D), the mask (B, S+T) or None, and S."""
        if self.label is not None:
            return torch.cat([self.label(cond, tokens)[:, None].to(tokens.dtype), tokens], dim=1), None, 1
        if self.text is None:
            return tokens, None, 0
        text, mask = text_or_zero(cond, tokens)
        text = self.text(text)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        return torch.cat([text, tokens], dim=1), mask, text.shape[1]

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return F, (B, C, H, W); see `gesso.models` for the arguments."""
        emb = mp_silu(self.control.add(self.noise(c_noise), cond, progress)).to(x.dtype)
        tokens, mask, n = self.prepend_semantic_tokens(self.patch_embed(x), cond)
        for block in self.blocks:
            tokens = block(tokens, emb, mask, n)
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        return unpatchify(self.out(tokens, gain=self.out_gain), h, w, self.patch_size)
