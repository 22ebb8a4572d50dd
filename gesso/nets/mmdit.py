"""mmDiT (SD3, Esser et al. 2024) and mmDiT++ (Berrada et al. 2024): text and image in one attention.

MMDiTNet and MMDiTppNet, at the end of this file, hold all that they differ in.

Legend: B batch, C channels, H W height and width, h w rows and columns of the token grid, D width, T = h*w
image tokens, S semantic tokens.
"""

import torch
from torch import Tensor, nn

from gesso.cond import Cond
from gesso.config import Inputs, MMDiT, MMDiTpp
from gesso.nets.embed import ControlEmbed, SemanticTokens, TimeEmbed, grid_position, pooled_filled, sincos_2d
from gesso.nets.layers import QKV, AdaLN, Mlp, PatchEmbed, attention, linear, modulate, unpatchify, unrounded


class CroppedPosition(nn.Module):
    """SD3's positions: a table over max_grid x max_grid tokens, of which any grid takes the centre.

    One token is base/max_grid apart from the next, base being the training grid. The table belongs to the
    state, as in the published models. Raises ValueError when the training grid exceeds the table.
    """

    def __init__(self, width: int, max_grid: int, base: int):
        super().__init__()
        if base > max_grid:
            raise ValueError(f"net.max_grid={max_grid} is less than the {base} x {base} tokens of a training image")
        self.max_grid = max_grid
        last = base * (max_grid - 1) / max_grid
        table = sincos_2d(width, max_grid, max_grid, (last, last))
        self.register_buffer("table", table.unflatten(1, (max_grid, max_grid)))

    def forward(self, h: int, w: int) -> Tensor:
        """(1, h*w, D). Raises ValueError when the grid exceeds the table."""
        if max(h, w) > self.max_grid:
            raise ValueError(f"a grid of {h} x {w} tokens exceeds net.max_grid={self.max_grid}")
        top, left = (self.max_grid - h) // 2, (self.max_grid - w) // 2
        return self.table[:, top : top + h, left : left + w].flatten(1, 2)


def qkv(cfg: MMDiT | MMDiTpp, bias: bool, queries: bool = True) -> QKV:
    """Queries, keys and values of a stream; RMS-normalized unless cfg says otherwise (SD3 medium)."""
    norm = isinstance(cfg, MMDiTpp) or cfg.qk_norm
    return QKV(cfg.width, cfg.heads, bias=bias, queries=queries, norm=norm)


class Stream(nn.Module):
    """What one kind of token has of its own besides qkv: adaLN, the way out of attention, the MLP.

    dual: a second attention, of these tokens alone, beside the joint one (SD3.5 medium's first blocks).
    """

    def __init__(self, cfg: MMDiT | MMDiTpp, dual: bool = False):
        super().__init__()
        self.ada = AdaLN(cfg.width, 9 if dual else 6)
        self.out = linear(cfg.width, cfg.width)
        self.mlp = Mlp(cfg.width, int(cfg.width * cfg.mlp_ratio))
        self.second_qkv = qkv(cfg, bias=True) if dual else None
        self.second_out = linear(cfg.width, cfg.width) if dual else None

    def close(self, x: Tensor, attended: Tensor, ada: tuple[Tensor, ...]) -> Tensor:
        """Add the gated attention and MLP branches to the tokens x."""
        _, _, gate_attention, shift, scale, gate_mlp, *second = ada
        alone = attention(*self.second_qkv(modulate(x, *second[:2]))) if second else None
        x = torch.addcmul(x, gate_attention, self.out(attended))
        if second:
            x = torch.addcmul(x, second[2], self.second_out(alone))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift, scale)))


class JointBlock(nn.Module):
    """One joint attention over semantic and image tokens (semantic first).

    text_weights "qkv": the semantic tokens have their own bias-free qkv and share the rest (Table A1's
    size); "all": they have a whole stream of weights (SD3). In the last block they only give keys and
    values.
    """

    def __init__(self, cfg: MMDiT | MMDiTpp, semantic: bool, last: bool, dual: bool):
        super().__init__()
        self.image = Stream(cfg, dual)
        self.image_qkv = qkv(cfg, bias=True)
        self.last = last
        self.own = semantic and cfg.text_weights == "all"
        if semantic:
            self.text_qkv = qkv(cfg, bias=self.own, queries=not last)
        if self.own and last:
            self.text = AdaLN(cfg.width, 2)
        elif self.own:
            self.text = Stream(cfg)

    def text_modulation(self, c: Tensor, image: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self.own:
            return image
        return self.text(c) if self.last else self.text.ada(c)

    def forward(self, x: Tensor, text: Tensor | None, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x (B, T, D), text (B, S, D), c (B, D), mask (B, S + T) of what may be attended to, or None."""
        ada = self.image.ada(c)
        q, k, v = self.image_qkv(modulate(x, ada[0], ada[1]))
        if text is None:
            return self.image.close(x, attention(q, k, v), ada), None
        text_ada = self.text_modulation(c, ada)
        text_q, text_k, text_v = self.text_qkv(modulate(text, text_ada[0], text_ada[1]))
        k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        if self.last:
            return self.image.close(x, attention(q, k, v, mask), ada), None
        n = text.shape[1]
        attended = attention(torch.cat([text_q, q], dim=2), k, v, mask)
        stream = self.text if self.own else self.image
        return self.image.close(x, attended[:, n:], ada), stream.close(text, attended[:, :n], text_ada)


class JointTransformer(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W): what mmDiT and mmDiT++ share.

    The class is one token of the joint attention, text its tokens; without either the image tokens attend
    to themselves. `modulation` says what c, which modulates every block, holds besides the control.
    """

    def __init__(self, cfg: MMDiT | MMDiTpp, inputs: Inputs, position: nn.Module, text_embed: str):
        super().__init__()
        self.patch = cfg.patch
        self.patch_embed = PatchEmbed(inputs.channels, cfg.width, cfg.patch)
        self.position = position
        self.time = TimeEmbed(cfg.width)
        self.control = ControlEmbed(inputs.control, cfg.width)
        embed = "table" if inputs.num_classes else text_embed
        self.semantic = SemanticTokens(inputs, cfg.width, embed, nn.SiLU()) if inputs.semantic else None
        dual = cfg.dual_blocks if isinstance(cfg, MMDiT) else 0
        self.blocks = nn.ModuleList(
            JointBlock(cfg, inputs.semantic, last=i == cfg.depth - 1, dual=i < dual) for i in range(cfg.depth)
        )
        self.final_ada = AdaLN(cfg.width, 2)
        self.final = linear(cfg.width, cfg.patch**2 * inputs.channels, zero=True)

    def modulation(self, time: Tensor, text: Tensor | None, cond: Cond) -> Tensor:
        """c (B, D) before control, of the time embedding (B, D) and the semantic tokens (B, S, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        tokens = self.patch_embed(x)
        tokens = tokens + self.position(h, w).to(tokens.dtype)
        text, mask = self.semantic(cond, x) if self.semantic else (None, None)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(x), h * w)], dim=1)
        c = self.control.add(self.modulation(self.time(c_noise), text, cond), cond, progress)
        for block in self.blocks:
            tokens, text = block(tokens, text, c, mask)
        shift, scale = self.final_ada(c)
        return unpatchify(self.final(modulate(tokens, shift, scale)), h, w, self.patch)


class MMDiTNet(JointTransformer):
    """mmDiT: c = time + semantic + control; the semantic condition is in the tokens and in c.

    Text: c has Linear-SiLU-Linear of the pooled text where there is any; tokens as in Table A1 ("qkv", text
    MLP) or SD3 ("all", one linear). Table A1's size holds a single text MLP, so no pooled text. Class: one
    embedding, which is both the only token and what DiT adds to c (the papers do not say; SD3 has no
    classes).
    """

    def __init__(self, cfg: MMDiT, inputs: Inputs):
        if cfg.max_grid is None:
            position = grid_position(inputs, cfg.width, cfg.patch, cfg.positions)
        else:
            position = CroppedPosition(cfg.width, cfg.max_grid, inputs.resolution // cfg.patch)
        super().__init__(cfg, inputs, position, text_embed="mlp" if cfg.text_weights == "qkv" else "linear")
        self.class_in_c = bool(inputs.num_classes)
        n = inputs.pooled_width
        self.pooled = nn.Sequential(linear(n, cfg.width), nn.SiLU(), linear(cfg.width, cfg.width)) if n else None

    def modulation(self, time: Tensor, text: Tensor | None, cond: Cond) -> Tensor:
        if self.class_in_c:
            time = time + text[:, 0]
        if self.pooled is None:
            return time
        with unrounded(time):
            return time + self.pooled(pooled_filled(cond, time))


class MMDiTppNet(JointTransformer):
    """mmDiT++: c = time + control; the semantic condition is in the tokens alone (Section 2.1)."""

    def __init__(self, cfg: MMDiTpp, inputs: Inputs):
        position = grid_position(inputs, cfg.width, cfg.patch, cfg.positions)
        super().__init__(cfg, inputs, position, text_embed="mlp")

    def modulation(self, time: Tensor, text: Tensor | None, cond: Cond) -> Tensor:
        return time
