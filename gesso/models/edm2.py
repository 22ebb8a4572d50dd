"""U-Net of EDM2's CONFIG G (Karras et al. 2024, Figure 22, Appendix B.6-B.7), all weights on the sphere.

Legend: B batch, C channels, H W height and width, E embedding width (that of the widest level).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import EDM2Config, InputSpec
from gesso.models.embeddings import MPControlEmbedding, labels_or_null
from gesso.models.layers import autocast_disabled, check_size_multiple
from gesso.models.mp import SILU_GAIN, MPConv, MPFourier, MPLinear, mp_cat, mp_silu, mp_sum, mp_sum_weights, pixel_norm


class Attention(nn.Module):
    """Cosine self-attention with q, k and v pixel-normalized per head (Eq. 30-34)."""

    def __init__(self, cfg: EDM2Config, channels: int):
        super().__init__()
        self.heads = channels // cfg.channels_per_head
        self.main_weight, branch = mp_sum_weights(cfg.attention_balance)
        self.qkv = MPConv(channels, 3 * channels, 1)
        self.proj = MPConv(channels, channels, 1, branch_weight=branch)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MP-sum of x and its attention, (B, C, H, W)."""
        qkv = self.qkv(x).permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (3, self.heads, -1))  # B HW 3 heads channels
        q, k, v = pixel_norm(qkv, dim=4).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v)  # B heads HW channels
        y = self.proj(y.transpose(1, 2).flatten(2).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))
        return torch.add(y, x, alpha=self.main_weight)  # MP-sum (Eq. 88); `proj` includes the branch weight


class Block(nn.Module):
    """Block of the encoder or decoder: resampling, residual branch, attention.

    In the encoder a 1x1 convolution and a pixel norm precede the residual branch; in the decoder the branch starts from
    the concatenated input and the 1x1 convolution is on the main path only.
    """

    def __init__(
        self, cfg: EDM2Config, flavour: str, c_in: int, c_out: int, *, resample: str = "keep", attention: bool = False
    ):
        super().__init__()
        self.is_encoder = flavour == "encoder"
        self.resample, self.dropout = resample, cfg.dropout
        self.main_weight, branch = mp_sum_weights(cfg.residual_balance)
        self.emb_gain = nn.Parameter(torch.zeros(1))
        self.emb_linear = MPLinear(cfg.embedding_width, c_out)
        # Both follow a SiLU; the second includes the branch weight of the MP-sum.
        self.conv_res0 = MPConv(c_out if self.is_encoder else c_in, c_out, 3, input_gain=SILU_GAIN)
        self.conv_res1 = MPConv(c_out, c_out, 3, input_gain=SILU_GAIN, branch_weight=branch)
        self.conv_skip = MPConv(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(cfg, c_out) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Return features (B, C_out, H', W') for x (B, C_in, H, W) and the embedding (B, E)."""
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.is_encoder:
            x = pixel_norm(self.conv_skip(x))
        y = self.conv_res0(F.silu(x))
        with autocast_disabled(emb):
            scale = (self.emb_linear(emb, gain=self.emb_gain) + 1).to(y.dtype)
        y = F.silu(y * scale[:, :, None, None])
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if not self.is_encoder:
            x = self.conv_skip(x)
        x = self.attention(torch.add(y, x, alpha=self.main_weight))  # MP-sum (Eq. 88)
        return x.clip(-256, 256)


class EDM2(nn.Module):
    """EDM2 network F = net(x, c_noise, progress, cond), x and F (B, C, H, W); zero at initialization (Eq. 104).

    A withheld label is a zero vector before the MP-sum with the noise level.
    """

    def __init__(self, cfg: EDM2Config, inputs: InputSpec):
        super().__init__()
        self.num_classes, self.size_multiple = inputs.num_classes, cfg.size_multiple
        self.label_balance, self.concat_balance = cfg.label_balance, cfg.concat_balance
        widths, E = cfg.widths, cfg.embedding_width
        lowest = len(widths) - 1
        self.out_gain = nn.Parameter(torch.zeros(1))
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPLinear(widths[0], E)
        if self.num_classes:
            self.emb_label = MPLinear(self.num_classes, E)
        self.emb_control = MPControlEmbedding(inputs.control, E)

        self.conv_in = MPConv(inputs.channels + 1, widths[0], 3)  # a channel of ones replaces biases
        self.encoder = nn.ModuleList()
        skips, c = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            if level > 0:
                self.encoder.append(Block(cfg, "encoder", c, c, resample="down"))
                skips.append(c)
            for _ in range(cfg.num_blocks):
                self.encoder.append(Block(cfg, "encoder", c, width, attention=level in cfg.attention_levels))
                c = width
                skips.append(c)

        self.decoder = nn.ModuleList()
        self.takes_skip: list[bool] = []
        for level, width in reversed(list(enumerate(widths))):
            if level == lowest:
                first_blocks = [Block(cfg, "decoder", c, c, attention=True), Block(cfg, "decoder", c, c)]
            else:
                first_blocks = [Block(cfg, "decoder", c, c, resample="up")]
            self.decoder.extend(first_blocks)
            for _ in range(cfg.num_blocks + 1):
                attention = level in cfg.attention_levels
                self.decoder.append(Block(cfg, "decoder", c + skips.pop(), width, attention=attention))
                c = width
            self.takes_skip += [False] * len(first_blocks) + [True] * (cfg.num_blocks + 1)
        self.conv_out = MPConv(c, inputs.channels, 3)

    def embed(self, c_noise: Tensor, progress: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """Return the embedding (B, E) of noise level, class and control variables."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.num_classes:
            label = labels_or_null(cond, self.num_classes, emb)
            one_hot = F.one_hot(label, self.num_classes + 1)[:, :-1].to(emb.dtype)
            # One-hot vectors of unit variance (Appendix B.3).
            emb = mp_sum(emb, self.emb_label(one_hot * self.num_classes**0.5), self.label_balance)
        return mp_silu(self.emb_control.add(emb, cond, progress)).to(dtype)

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return F, (B, C, H, W); see `gesso.models` for the arguments."""
        check_size_multiple(x, self.size_multiple)
        with autocast_disabled(x):
            emb = self.embed(c_noise, progress, cond, x.dtype)
        x = self.conv_in(torch.cat([x, torch.ones_like(x[:, :1])], dim=1).contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.encoder:
            x = block(x, emb)
            skips.append(x)
        for block, takes_skip in zip(self.decoder, self.takes_skip, strict=True):
            x = block(mp_cat(x, skips.pop(), self.concat_balance) if takes_skip else x, emb)
        return self.conv_out(x, gain=self.out_gain)
