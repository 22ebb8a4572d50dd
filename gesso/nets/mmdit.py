"""mmDiT++ (Berrada et al. 2024): SD3's joint attention, with the semantic condition in the tokens alone.

Legend: B batch, C channels, H W height and width, D width, T image tokens, S semantic tokens.
"""

import torch
from torch import Tensor, nn

from gesso.cond import Cond
from gesso.config import Inputs, MMDiTpp
from gesso.nets.embed import ControlEmbed, GridPosition, SemanticTokens, TimeEmbed
from gesso.nets.layers import QKV, AdaLN, Mlp, PatchEmbed, attention, linear, modulate, unpatchify


class Stream(nn.Module):
    """What one kind of token has of its own besides qkv: adaLN, the way out of attention, the MLP."""

    def __init__(self, cfg: MMDiTpp):
        super().__init__()
        self.ada = AdaLN(cfg.width, 6)
        self.out = linear(cfg.width, cfg.width)
        self.mlp = Mlp(cfg.width, int(cfg.width * cfg.mlp_ratio))

    def close(self, x: Tensor, attended: Tensor, ada: tuple[Tensor, ...]) -> Tensor:
        """Add the gated attention and MLP branches to the tokens x."""
        _, _, gate_attention, shift, scale, gate_mlp = ada
        x = torch.addcmul(x, gate_attention, self.out(attended))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift, scale)))


class JointBlock(nn.Module):
    """One joint attention over semantic and image tokens (semantic first).

    text_weights "qkv": the semantic tokens have their own bias-free qkv and share the rest (Table A1's
    size); "all": they have a whole stream of weights (SD3). In the last block they only give keys and
    values.
    """

    def __init__(self, cfg: MMDiTpp, semantic: bool, last: bool):
        super().__init__()
        self.image = Stream(cfg)
        self.image_qkv = QKV(cfg.width, cfg.heads)
        self.last = last
        self.own = semantic and cfg.text_weights == "all"
        if semantic:
            self.text_qkv = QKV(cfg.width, cfg.heads, bias=self.own, queries=not last)
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


class MMDiTppNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W).

    The class is one token of the joint attention, text its tokens. c, which modulates every block, holds
    time and control alone. Without either the image tokens attend to themselves.
    """

    def __init__(self, cfg: MMDiTpp, inputs: Inputs):
        super().__init__()
        self.patch = cfg.patch
        grid = inputs.resolution // cfg.patch
        self.patch_embed = PatchEmbed(inputs.channels, cfg.width, cfg.patch)
        self.position = GridPosition(cfg.width, (grid, grid))
        self.time = TimeEmbed(cfg.width)
        self.control = ControlEmbed(inputs.control, cfg.width)
        embed = "table" if inputs.num_classes else "mlp"
        self.semantic = SemanticTokens(inputs, cfg.width, embed, nn.SiLU()) if inputs.semantic else None
        self.blocks = nn.ModuleList(JointBlock(cfg, inputs.semantic, last=i == cfg.depth - 1) for i in range(cfg.depth))
        self.final_ada = AdaLN(cfg.width, 2)
        self.final = linear(cfg.width, cfg.patch**2 * inputs.channels, zero=True)

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        tokens = self.patch_embed(x)
        tokens = tokens + self.position(h, w).to(tokens.dtype)
        text, mask = self.semantic(cond, x) if self.semantic else (None, None)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(x), h * w)], dim=1)
        c = self.control.add(self.time(c_noise), cond, progress)
        for block in self.blocks:
            tokens, text = block(tokens, text, c, mask)
        shift, scale = self.final_ada(c)
        return unpatchify(self.final(modulate(tokens, shift, scale)), h, w, self.patch)
