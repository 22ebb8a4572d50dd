"""DiT and mmDiT++ with every layer magnitude-preserving and every weight on the sphere.

No paper has them: EDM2 (Karras et al. 2024, Section 5) asks whether its method would help DiT. DiT's parts become:

  bias           a constant input of 1 where data comes in (patches and text), none elsewhere
  LayerNorm      pixel norm (Eq. 30) of the stream itself before each branch, as at the start of EDM2's encoder blocks:
                 MP-sums keep the magnitude near 1, the norm takes back what gains and alignment add
  q k v          cosine attention: q, k and v pixel-normalized per head (Eq. 30-34)
  x + branch     MP-sum with balance t (Eq. 88). After 2L branches (1 + t^2/(1-t)^2)^(-2L) of the energy is the
                 input's, 1/e at t = 1/(1 + sqrt(2L)): .17 for 12 blocks, .12 for 28. EDM2's .3 counts on
                 a U-Net's skips: through 28 blocks it leaves all tokens of an image nearly equal
  GELU, SiLU     divided by their rms under N(0,1) (Eq. 81)
  adaLN          y * (1 + g linear(emb)), a learned g that starts at 0, at three places of a block:
                 its scale on the input of attention, whose magnitude the norms of q, k and v undo;
                 its gate on the attended values before the way out;
                 its scale and gate in one on the hidden units of the MLP, before the non-linearity as in EDM2.
                 Weights: D^2 + D^2 + 4 D^2, as adaLN's 6 D^2. Nothing replaces the shift, as in EDM2.
  zero layers    g = 0 at the start, and a gain of 0 on the output: F = 0. The branches are open from the start.

Legend: B batch, C channels, H W height and width, p patch, D width, T image tokens, S semantic tokens, h heads,
d = D/h.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.cond import Cond
from gesso.config import Inputs, MPDiT, MPMMDiTpp
from gesso.nets.embed import MPControl, grid_position, null_filled, text_filled
from gesso.nets.layers import attention, check_size, unpatchify, unrounded
from gesso.nets.mp import MPFourier, MPLinear, mp_silu, mp_sum, pixel_norm

GELU_RMS = 0.652
POSITION_BALANCE = 0.5
LABEL_BALANCE = 0.5


def mp_gelu(x: Tensor) -> Tensor:
    """tanh-GELU over its rms under N(0,1), as Eq. 81 does for SiLU."""
    return F.gelu(x, approximate="tanh") / GELU_RMS


def with_one(x: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D+1): a constant input of 1, whose weights stand for the bias."""
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


class MPPatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, T, D), one token per p x p square, row by row; positions added by MP-sum."""

    def __init__(self, cfg: MPDiT | MPMMDiTpp, inputs: Inputs):
        super().__init__()
        self.patch = cfg.patch
        self.linear = MPLinear(cfg.patch**2 * inputs.channels + 1, cfg.width)
        self.position = grid_position(inputs, cfg.width, cfg.patch, cfg.positions)

    def forward(self, x: Tensor) -> Tensor:
        check_size(x, self.patch)
        patches = F.pixel_unshuffle(x, self.patch)  # B Cpp H/p W/p
        tokens = self.linear(with_one(patches.flatten(2).transpose(1, 2)))
        # sin^2 + cos^2 = 1 gives the table an rms of sqrt(1/2).
        position = math.sqrt(2) * self.position(*patches.shape[2:]).to(tokens.dtype)
        return mp_sum(tokens, position, POSITION_BALANCE)


class MPClass(nn.Module):
    """The class as a vector of magnitude 1, (B, D). The null class is the table's last row.

    EDM2 has a zero vector for it, which would lower the magnitude of the sum with the noise level to
    sqrt(1/2) and leave a token without direction.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.linear = MPLinear(num_classes + 1, width)

    def forward(self, cond: Cond, x: Tensor) -> Tensor:
        """x is any tensor of the batch."""
        one_hot = F.one_hot(null_filled(cond, self.num_classes, x), self.num_classes + 1).to(self.linear.weight.dtype)
        with unrounded(x):
            # One-hot vectors scaled to unit variance (EDM2 Appendix B.3).
            return self.linear(one_hot * math.sqrt(self.num_classes + 1))


class MPText(nn.Module):
    """Text tokens, standardized, then linear. (B, S, text_width) -> (B, S, D) of magnitude 1.

    A zero token would stay zero in a chain without biases, and a pixel norm has slope 1/eps there. Beside
    the constant input a zero token is that input alone, which the second norm brings to magnitude 1: withheld
    text is a learned token, as the null class is.
    """

    def __init__(self, text_width: int, width: int):
        super().__init__()
        self.linear = MPLinear(text_width + 1, width)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear(pixel_norm(with_one(pixel_norm(text, dim=2)), dim=2))


class Modulation(nn.Module):
    """y * (1 + gain * linear(emb)): y (B, T, n), emb (B, D)."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1))
        self.linear = MPLinear(width, n)

    def forward(self, y: Tensor, emb: Tensor) -> Tensor:
        with unrounded(emb):
            scale = (self.linear(emb, gain=self.gain) + 1).to(y.dtype)
        return y * scale[:, None]


class CosineQKV(nn.Module):
    """n of queries, keys and values (n = 2: keys and values), pixel-normalized per head (Eq. 30-34)."""

    def __init__(self, width: int, heads: int, n: int = 3):
        super().__init__()
        self.n, self.heads = n, heads
        self.linear = MPLinear(width, n * width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, D) -> n tensors (B, h, T, d)."""
        heads = self.linear(x).unflatten(2, (self.n, self.heads, -1))
        return pixel_norm(heads, dim=4).permute(2, 0, 3, 1, 4).unbind(0)


class MPBlock(nn.Module):
    """Attention and MLP over one sequence of semantic, then image tokens.

    The semantic tokens have their own qkv and share the rest (mmDiT++'s text_weights "qkv"). In the last
    block they only give keys and values, and the image tokens alone come out.
    """

    def __init__(self, cfg: MPDiT | MPMMDiTpp, semantic: bool, last: bool):
        super().__init__()
        width, hidden = cfg.width, int(cfg.width * cfg.mlp_ratio)
        self.last = last
        given = cfg.residual_balance
        self.balance = 1 / (1 + (2 * cfg.depth) ** 0.5) if given is None else given
        self.scale = Modulation(width, width)
        self.qkv = CosineQKV(width, cfg.heads)
        self.semantic_qkv = CosineQKV(width, cfg.heads, n=2 if last else 3) if semantic else None
        self.gate = Modulation(width, width)
        self.proj = MPLinear(width, width)
        self.mlp_in = MPLinear(width, hidden)
        self.mlp_scale = Modulation(width, hidden)
        self.mlp_out = MPLinear(hidden, width)

    def attend(self, x: Tensor, emb: Tensor, mask: Tensor | None, n: int) -> Tensor:
        """(B, S+T, D) -> attended values of the tokens that go on: all, in the last block T."""
        x = self.scale(x, emb)
        q, k, v = self.qkv(x[:, n:])
        if self.semantic_qkv is not None:
            *semantic_q, semantic_k, semantic_v = self.semantic_qkv(x[:, :n])
            q = torch.cat([*semantic_q, q], dim=2)
            k, v = torch.cat([semantic_k, k], dim=2), torch.cat([semantic_v, v], dim=2)
        return self.gate(attention(q, k, v, mask), emb)

    def forward(self, x: Tensor, emb: Tensor, mask: Tensor | None, n: int) -> Tensor:
        """x (B, S+T, D), emb (B, D), mask (B, S+T) of what may be attended to or None, n = S."""
        x = pixel_norm(x, dim=2)
        attended = self.attend(x, emb, mask, n)
        if self.last:
            x = x[:, n:]
        x = pixel_norm(mp_sum(x, self.proj(attended), self.balance), dim=2)
        hidden = mp_gelu(self.mlp_scale(self.mlp_in(x), emb))
        return mp_sum(x, self.mlp_out(hidden), self.balance)


class NoiseEmbed(nn.Module):
    """Noise level, (B,) -> (B, D): Fourier features and a linear layer (EDM2 Figure 22)."""

    def __init__(self, width: int):
        super().__init__()
        self.fourier = MPFourier(width)
        self.linear = MPLinear(width, width)

    def forward(self, c_noise: Tensor) -> Tensor:
        with unrounded(c_noise):
            return self.linear(self.fourier(c_noise))


class MPDiTNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W); zero at initialization.

    Noise level, class and control modulate every block.
    """

    def __init__(self, cfg: MPDiT, inputs: Inputs):
        super().__init__()
        self.patch = cfg.patch
        self.patch_embed = MPPatchEmbed(cfg, inputs)
        self.noise = NoiseEmbed(cfg.width)
        self.label = MPClass(inputs.num_classes, cfg.width) if inputs.num_classes else None
        self.control = MPControl(inputs.control, cfg.width)
        self.blocks = nn.ModuleList(MPBlock(cfg, semantic=False, last=False) for _ in range(cfg.depth))
        self.out = MPLinear(cfg.width, cfg.patch**2 * inputs.channels)
        self.out_gain = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        emb = self.noise(c_noise)
        if self.label is not None:
            emb = mp_sum(emb, self.label(cond, emb), LABEL_BALANCE)
        emb = mp_silu(self.control.add(emb, cond, progress)).to(x.dtype)
        tokens = self.patch_embed(x)
        for block in self.blocks:
            tokens = block(tokens, emb, None, 0)
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        return unpatchify(self.out(tokens, gain=self.out_gain), h, w, self.patch)


class MPMMDiTppNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W); zero at initialization.

    The class is one token of the joint attention, text its tokens. Noise level and control alone modulate.
    """

    def __init__(self, cfg: MPMMDiTpp, inputs: Inputs):
        super().__init__()
        self.patch = cfg.patch
        self.patch_embed = MPPatchEmbed(cfg, inputs)
        self.noise = NoiseEmbed(cfg.width)
        self.label = MPClass(inputs.num_classes, cfg.width) if inputs.num_classes else None
        self.text = MPText(inputs.text_width, cfg.width) if inputs.text_width else None
        self.control = MPControl(inputs.control, cfg.width)
        self.blocks = nn.ModuleList(MPBlock(cfg, inputs.semantic, last=i == cfg.depth - 1) for i in range(cfg.depth))
        self.out = MPLinear(cfg.width, cfg.patch**2 * inputs.channels)
        self.out_gain = nn.Parameter(torch.zeros(1))

    def join(self, tokens: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None, int]:
        """Image tokens (B, T, D) -> semantic and image tokens (B, S+T, D), mask (B, S+T) or None, S."""
        if self.label is not None:
            return torch.cat([self.label(cond, tokens)[:, None].to(tokens.dtype), tokens], dim=1), None, 1
        if self.text is None:
            return tokens, None, 0
        text, mask = text_filled(cond, tokens)
        text = self.text(text)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        return torch.cat([text, tokens], dim=1), mask, text.shape[1]

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        emb = mp_silu(self.control.add(self.noise(c_noise), cond, progress)).to(x.dtype)
        tokens, mask, n = self.join(self.patch_embed(x), cond)
        for block in self.blocks:
            tokens = block(tokens, emb, mask, n)
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        return unpatchify(self.out(tokens, gain=self.out_gain), h, w, self.patch)
