"""mmDiT (SD3, Esser et al. 2024) and mmDiT++ (Berrada et al. 2024): joint attention of text and image tokens.

Legend: B batch, C channels, H W height and width, h w rows and columns of the token grid, D width, T = h*w
image tokens, S semantic tokens.
"""

import torch
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import InputSpec, MMDiTConfig, MMDiTppConfig
from gesso.models.embeddings import (
    ControlEmbedding,
    SemanticEmbedding,
    TimestepEmbedding,
    build_pos_embed,
    pooled_or_zero,
    sincos_pos_embed_2d,
)
from gesso.models.layers import QKV, AdaLN, Mlp, PatchEmbed, attention, autocast_disabled, linear, modulate, unpatchify


class CroppedPosEmbed(nn.Module):
    """SD3's positions: the center of a table over max_grid x max_grid tokens.

    Neighboring tokens are base_grid/max_grid apart. The table is part of the state dict, as in the published models.

    Raises:
        ValueError: The training grid exceeds the table.
    """

    table: Tensor

    def __init__(self, width: int, max_grid: int, base_grid: int):
        super().__init__()
        if base_grid > max_grid:
            raise ValueError(
                f"net.pos_embed_max_size={max_grid} is less than the {base_grid} x {base_grid} tokens of a training "
                f"image; set net.pos_embed_max_size={base_grid} or more"
            )
        self.max_grid = max_grid
        last = base_grid * (max_grid - 1) / max_grid
        table = sincos_pos_embed_2d(width, max_grid, max_grid, (last, last))
        self.register_buffer("table", table.unflatten(1, (max_grid, max_grid)))

    def forward(self, h: int, w: int) -> Tensor:
        """Return the positions of a grid, (1, h*w, D); raises ValueError if it exceeds the table."""
        if max(h, w) > self.max_grid:
            raise ValueError(f"a grid of {h} x {w} tokens exceeds net.pos_embed_max_size={self.max_grid}")
        top, left = (self.max_grid - h) // 2, (self.max_grid - w) // 2
        return self.table[:, top : top + h, left : left + w].flatten(1, 2)


def build_qkv(cfg: MMDiTConfig | MMDiTppConfig, bias: bool, queries: bool = True) -> QKV:
    """Return the queries, keys and values of a stream, RMS-normalized except with qk_norm=False (SD3 medium)."""
    norm = isinstance(cfg, MMDiTppConfig) or cfg.qk_norm
    return QKV(cfg.hidden_size, cfg.num_heads, bias=bias, queries=queries, norm=norm)


class TokenStream(nn.Module):
    """Layers of the image or text tokens of a block, except qkv: adaLN, output of attention, MLP.

    `dual_attention` adds a self-attention of these tokens (the first blocks of SD3.5 medium).
    """

    def __init__(self, cfg: MMDiTConfig | MMDiTppConfig, dual_attention: bool = False):
        super().__init__()
        self.ada = AdaLN(cfg.hidden_size, 9 if dual_attention else 6)
        self.out = linear(cfg.hidden_size, cfg.hidden_size)
        self.mlp = Mlp(cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_ratio))
        self.second_qkv = build_qkv(cfg, bias=True) if dual_attention else None
        self.second_out = linear(cfg.hidden_size, cfg.hidden_size) if dual_attention else None

    def apply_residuals(self, x: Tensor, attended: Tensor, ada: tuple[Tensor, ...]) -> Tensor:
        """Add the gated attention and MLP branches to the tokens x."""
        _, _, gate_attention, shift, scale, gate_mlp, *second = ada
        out = torch.addcmul(x, gate_attention, self.out(attended))
        if self.second_qkv is not None and self.second_out is not None:
            self_attended = attention(*self.second_qkv(modulate(x, *second[:2])))
            out = torch.addcmul(out, second[2], self.second_out(self_attended))
        return torch.addcmul(out, gate_mlp, self.mlp(modulate(out, shift, scale)))


class JointBlock(nn.Module):
    """Block with joint attention over semantic and image tokens (semantic first).

    With net.separate_text_weights="qkv" the semantic tokens have their own bias-free qkv and share the other weights
    (the size of Table A1); with "all" they have their own weights throughout (SD3). In the last block they only
    provide keys and values.
    """

    def __init__(self, cfg: MMDiTConfig | MMDiTppConfig, has_semantic: bool, is_last: bool, dual_attention: bool):
        super().__init__()
        self.image = TokenStream(cfg, dual_attention)
        self.image_qkv = build_qkv(cfg, bias=True)
        self.is_last = is_last
        separate = has_semantic and cfg.separate_text_weights == "all"
        if has_semantic:
            self.text_qkv = build_qkv(cfg, bias=separate, queries=not is_last)
        self.text: AdaLN | TokenStream | None = None
        if separate:
            self.text = AdaLN(cfg.hidden_size, 2) if is_last else TokenStream(cfg)

    def text_modulation(self, c: Tensor, image: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the modulation vectors of the semantic tokens; `image` are those of the image tokens."""
        if self.text is None:
            return image
        return self.text(c) if isinstance(self.text, AdaLN) else self.text.ada(c)

    def forward(self, x: Tensor, text: Tensor | None, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return image (B, T, D) and text tokens (B, S, D); c (B, D), mask (B, S + T) selects keys, None all."""
        ada = self.image.ada(c)
        q, k, v = self.image_qkv(modulate(x, ada[0], ada[1]))
        if text is None:
            return self.image.apply_residuals(x, attention(q, k, v), ada), None
        text_ada = self.text_modulation(c, ada)
        text_q, text_k, text_v = self.text_qkv(modulate(text, text_ada[0], text_ada[1]))
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        if self.is_last:
            return self.image.apply_residuals(x, attention(q, k, v, mask), ada), None
        n = text.shape[1]
        attended = attention(torch.cat([text_q, q], dim=2), k, v, mask)
        stream = self.text if isinstance(self.text, TokenStream) else self.image
        image_out = self.image.apply_residuals(x, attended[:, n:], ada)
        return image_out, stream.apply_residuals(text, attended[:, :n], text_ada)


class JointTransformer(nn.Module):
    """Common part of mmDiT and mmDiT++, F = net(x, c_noise, progress, cond), x and F (B, C, H, W).

    The joint attention sees the class as one token, or the text tokens, and the image tokens. `modulation` returns c,
    which modulates every block, before control is added.
    """

    def __init__(self, cfg: MMDiTConfig | MMDiTppConfig, inputs: InputSpec, position: nn.Module, text_embed: str):
        super().__init__()
        self.patch_size = cfg.patch_size
        self.patch_embed = PatchEmbed(inputs.channels, cfg.hidden_size, cfg.patch_size)
        self.position = position
        self.time = TimestepEmbedding(cfg.hidden_size)
        self.control = ControlEmbedding(inputs.control, cfg.hidden_size)
        embed = "table" if inputs.num_classes else text_embed
        self.semantic = SemanticEmbedding(inputs, cfg.hidden_size, embed, nn.SiLU()) if inputs.has_semantic else None
        dual = cfg.dual_attention_layers if isinstance(cfg, MMDiTConfig) else 0
        self.blocks = nn.ModuleList(
            JointBlock(cfg, inputs.has_semantic, is_last=i == cfg.depth - 1, dual_attention=i < dual)
            for i in range(cfg.depth)
        )
        self.final_ada = AdaLN(cfg.hidden_size, 2)
        self.final = linear(cfg.hidden_size, cfg.patch_size**2 * inputs.channels, zero_init=True)

    def modulation(self, time: Tensor, text: Tensor | None, cond: Cond) -> Tensor:
        """Return c (B, D) before control from the time embedding (B, D) and the semantic tokens (B, S, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return F, (B, C, H, W); see `gesso.models` for the arguments."""
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        tokens = self.patch_embed(x)
        tokens = tokens + self.position(h, w).to(tokens.dtype)
        text, mask = self.semantic(cond, x) if self.semantic else (None, None)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(x.shape[0], h * w)], dim=1)
        c = self.control.add(self.modulation(self.time(c_noise), text, cond), cond, progress)
        for block in self.blocks:
            tokens, text = block(tokens, text, c, mask)
        shift, scale = self.final_ada(c)
        return unpatchify(self.final(modulate(tokens, shift, scale)), h, w, self.patch_size)


class MMDiT(JointTransformer):
    """mmDiT: the semantic condition is in the tokens and in c = time + semantic + control.

    Text: c includes Linear-SiLU-Linear of the pooled text if there is any; tokens as in Table A1 ("qkv", text MLP) or
    SD3 ("all", one linear layer). The size of Table A1 has one text MLP and no pooled text. Class: one embedding is
    both the token and the term that DiT adds to c (the papers do not specify it; SD3 has no classes).
    """

    def __init__(self, cfg: MMDiTConfig, inputs: InputSpec):
        position: nn.Module
        if cfg.pos_embed_max_size is None:
            position = build_pos_embed(inputs, cfg.hidden_size, cfg.patch_size, cfg.pos_embed)
        else:
            position = CroppedPosEmbed(cfg.hidden_size, cfg.pos_embed_max_size, inputs.resolution // cfg.patch_size)
        super().__init__(cfg, inputs, position, text_embed="mlp" if cfg.separate_text_weights == "qkv" else "linear")
        self.class_modulates = bool(inputs.num_classes)
        n, D = inputs.pooled_dim, cfg.hidden_size
        self.pooled = nn.Sequential(linear(n, D), nn.SiLU(), linear(D, D)) if n else None

    def modulation(self, time: Tensor, text: Tensor | None, cond: Cond) -> Tensor:
        """Return time + class or pooled text, (B, D)."""
        if self.class_modulates and text is not None:
            time = time + text[:, 0]
        if self.pooled is None:
            return time
        with autocast_disabled(time):
            return time + self.pooled(pooled_or_zero(cond, time))


class MMDiTpp(JointTransformer):
    """mmDiT++: the semantic condition is in the tokens only, c = time + control (Section 2.1)."""

    def __init__(self, cfg: MMDiTppConfig, inputs: InputSpec):
        position = build_pos_embed(inputs, cfg.hidden_size, cfg.patch_size, cfg.pos_embed)
        super().__init__(cfg, inputs, position, text_embed="mlp")

    def modulation(self, time: Tensor, text: Tensor | None, cond: Cond) -> Tensor:
        """Return the time embedding, (B, D)."""
        return time
