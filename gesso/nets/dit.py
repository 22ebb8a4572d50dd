"""DiT (Peebles and Xie 2023), DiT with attention conditioning (Berrada et al. 2024) and PixArt-alpha (Chen et al. 2024).

One trunk, three blocks. They differ in where the semantic condition enters: DiT's adaLN, an attention
modulated as the others are, or a cross-attention without norm and gate.

Legend: B batch, C channels, H W height and width, D width, T image tokens, S semantic tokens, h heads.
"""

import torch
from torch import Tensor, nn

from gesso.cond import Cond
from gesso.config import DiT, DiTAtt, Inputs, PixArt
from gesso.nets.embed import ControlEmbed, SemanticTokens, TimeEmbed, grid_position, null_filled
from gesso.nets.layers import (
    QKV,
    AdaLN,
    Mlp,
    PatchEmbed,
    RMSNorm,
    attention,
    linear,
    modulate,
    split_heads,
    unpatchify,
    unrounded,
    variance_head,
)

Modulation = tuple[Tensor, ...]
"""Shift, scale and gate of one branch, each (B, 1, D)."""


class Trunk(nn.Module):
    """What surrounds the blocks in all three: patches, positions, time and control on the way in, patches on the way out."""

    def __init__(self, cfg: DiT | DiTAtt | PixArt, inputs: Inputs):
        super().__init__()
        self.patch = cfg.patch
        self.patch_embed = PatchEmbed(inputs.channels, cfg.width, cfg.patch)
        self.position = grid_position(inputs, cfg.width, cfg.patch, cfg.positions)
        self.time = TimeEmbed(cfg.width)
        self.control = ControlEmbed(inputs.control, cfg.width)
        self.final = linear(cfg.width, cfg.patch**2 * inputs.channels, zero=True)
        learned = not isinstance(cfg, DiTAtt) and cfg.learned_variance
        self.variance = variance_head(cfg.width, cfg.patch, inputs.channels) if learned else None

    def tokens(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, T, D)."""
        tokens = self.patch_embed(x)
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        return tokens + self.position(h, w).to(tokens.dtype)

    def condition(self, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Time and control, (B, D)."""
        return self.control.add(self.time(c_noise), cond, progress)

    def image(self, tokens: Tensor, shift: Tensor, scale: Tensor, like: Tensor, variance: bool = False) -> Tensor:
        """(B, T, D) -> (B, C, H, W), the shape of `like`; with the learned variance after it (B, 2 C, H, W)."""
        h, w = like.shape[2] // self.patch, like.shape[3] // self.patch
        tokens = modulate(tokens, shift, scale)
        layers = (self.final, self.variance) if variance else (self.final,)
        images = [unpatchify(layer(tokens), h, w, self.patch) for layer in layers]
        return torch.cat(images, dim=1) if variance else images[0]


class Branches(nn.Module):
    """The self-attention and the MLP of a block, each x + gate * f((1 + scale) LN(x) + shift)."""

    def __init__(self, cfg: DiT | DiTAtt | PixArt):
        super().__init__()
        self.qkv = QKV(cfg.width, cfg.heads, norm=cfg.qk_norm)
        self.out = linear(cfg.width, cfg.width)
        self.mlp = Mlp(cfg.width, int(cfg.width * cfg.mlp_ratio))

    def attend(self, x: Tensor, ada: Modulation) -> Tensor:
        shift, scale, gate = ada
        return torch.addcmul(x, gate, self.out(attention(*self.qkv(modulate(x, shift, scale)))))

    def attend_jointly(
        self, x: Tensor, ada: Modulation, text: Tensor, text_ada: Modulation, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One attention over semantic tokens (first) and image tokens, both through the same weights."""
        S = text.shape[1]
        both = torch.cat([modulate(text, *text_ada[:2]), modulate(x, *ada[:2])], dim=1)
        out = self.out(attention(*self.qkv(both), mask))
        return torch.addcmul(x, ada[2], out[:, S:]), torch.addcmul(text, text_ada[2], out[:, :S])

    def transform(self, x: Tensor, ada: Modulation) -> Tensor:
        shift, scale, gate = ada
        return torch.addcmul(x, gate, self.mlp(modulate(x, shift, scale)))


class CrossAttention(nn.Module):
    """Image tokens ask, semantic tokens answer. (B, T, D) and (B, S, D) -> (B, T, D)."""

    def __init__(self, cfg: DiTAtt | PixArt, zero: bool = False):
        super().__init__()
        self.heads = cfg.heads
        self.q = linear(cfg.width, cfg.width)
        self.kv = linear(cfg.width, 2 * cfg.width)
        self.q_norm = RMSNorm(cfg.width // cfg.heads) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.width // cfg.heads) if cfg.qk_norm else nn.Identity()
        self.out = linear(cfg.width, cfg.width, zero=zero)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # B h T d
        k, v = split_heads(self.kv(text), 2, self.heads)
        return self.out(attention(self.q_norm(q), self.k_norm(k), v, mask))


def seen(mask: Tensor | None) -> Tensor | None:
    """(B, S) mask in which a text without a single real token is seen whole: a softmax over nothing has no value."""
    return None if mask is None else mask | ~mask.any(dim=1, keepdim=True)


class AdaBlock(nn.Module):
    """DiT's block: attention and MLP, six modulation vectors from c."""

    def __init__(self, cfg: DiT | DiTAtt):
        super().__init__()
        self.ada = AdaLN(cfg.width, 6)
        self.branches = Branches(cfg)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D), c (B, D)."""
        ada = self.ada(c)
        return self.branches.transform(self.branches.attend(x, ada[:3]), ada[3:])


class TokenBlock(nn.Module):
    """DiT's block with the class as one more token of its attention; nine modulation vectors from c.

    The token goes through the block's own qkv and out, with a shift, scale and gate of its own, and has
    no MLP. In the last block its own way out is not used.
    """

    def __init__(self, cfg: DiTAtt):
        super().__init__()
        self.ada = AdaLN(cfg.width, 9)
        self.branches = Branches(cfg)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), text (B, 1, D), c (B, D)."""
        ada = self.ada(c)
        x, text = self.branches.attend_jointly(x, ada[:3], text, ada[3:6], mask)
        return self.branches.transform(x, ada[6:]), text


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to the text and MLP, nine modulation vectors from c."""

    def __init__(self, cfg: DiTAtt):
        super().__init__()
        self.ada = AdaLN(cfg.width, 9)
        self.branches = Branches(cfg)
        self.cross = CrossAttention(cfg)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, D), text (B, S, D), c (B, D), mask (B, S)."""
        ada = self.ada(c)
        x = self.branches.attend(x, ada[:3])
        shift, scale, gate = ada[3:6]
        x = torch.addcmul(x, gate, self.cross(modulate(x, shift, scale), text, mask))
        return self.branches.transform(x, ada[6:]), text


class SingleBlock(nn.Module):
    """PixArt's block: six modulation vectors that all blocks share, plus a table of its own (adaLN-single).

    The cross-attention between attention and MLP has no norm and no gate; it starts at zero.
    """

    def __init__(self, cfg: PixArt, semantic: bool):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, cfg.width) / cfg.width**0.5)
        self.branches = Branches(cfg)
        self.cross = CrossAttention(cfg, zero=True) if semantic else None

    def forward(self, x: Tensor, text: Tensor | None, ada: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """x (B, T, D), text (B, S, D), ada 6 tensors (B, 1, D), mask (B, S)."""
        ada = tuple(row + shared for row, shared in zip(self.table.unbind(), ada, strict=True))
        x = self.branches.attend(x, ada[:3])
        if self.cross is not None:
            x = x + self.cross(x, text, mask)
        return self.branches.transform(x, ada[3:])


class DiTNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W): "DiT w/ LN" of Berrada et al.

    c = time + class + control modulates every block. A withheld class is the last row of the table.
    """

    def __init__(self, cfg: DiT, inputs: Inputs):
        super().__init__()
        self.num_classes = inputs.num_classes
        self.trunk = Trunk(cfg, inputs)
        if self.num_classes:
            self.table = nn.Embedding(self.num_classes + 1, cfg.width)
            nn.init.normal_(self.table.weight, std=0.02)
        self.blocks = nn.ModuleList(AdaBlock(cfg) for _ in range(cfg.depth))
        self.final_ada = AdaLN(cfg.width, 2)
        self.learned_variance = cfg.learned_variance

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond, variance: bool = False) -> Tensor:
        """variance: as in Trunk.image."""
        tokens = self.trunk.tokens(x)
        c = self.trunk.condition(c_noise, progress, cond)
        if self.num_classes:
            c = c + self.table(null_filled(cond, self.num_classes, x))
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.trunk.image(tokens, *self.final_ada(c), like=x, variance=variance)


class DiTAttNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W): "DiT w/ Att" of Berrada et al.

    c = time + control. The paper gives no equations for the blocks; these reproduce Table A1, in which
    both cells have Linear(D, 9 D) in adaLN and count positions as parameters:

    class  792.440 M and 237.93 GFLOP at 256 pixels. 113 M above DiT is 3 (D^2 + D) of adaLN per block plus
           2 (D^2 + D) for an MLP on the class table, with the positions of 256 tokens: no weights for
           cross-attention. 0.59 GFLOP above DiT is one token through qkv, out and attention, not a second
           pass of the image tokens (38 GFLOP): the class is one more token of the self-attention.
    text   940.494 M. 4 (D^2 + D) of cross-attention and 3 (D^2 + D) of adaLN per block, an MLP 768 -> D -> D
           on the text, the positions of 1024 tokens, no weights in qk-norm (8,064 here). Its 407.88 GFLOP
           are 84.6 more than these weights cost: what one more cross-attention would.
    """

    def __init__(self, cfg: DiTAtt, inputs: Inputs):
        super().__init__()
        self.trunk = Trunk(cfg, inputs)
        self.semantic = SemanticTokens(inputs, cfg.width, "mlp", nn.SiLU()) if inputs.semantic else None
        block = (TokenBlock if inputs.num_classes else CrossBlock) if inputs.semantic else AdaBlock
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.depth))
        self.final_ada = AdaLN(cfg.width, 2)

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        tokens = self.trunk.tokens(x)
        c = self.trunk.condition(c_noise, progress, cond)
        if self.semantic is None:
            for block in self.blocks:
                tokens = block(tokens, c)
        else:
            text, mask = self.semantic(cond, x)
            mask = seen(mask)
            for block in self.blocks:
                tokens, text = block(tokens, text, c, mask)
        return self.trunk.image(tokens, *self.final_ada(c), like=x)


class PixArtNet(nn.Module):
    """net(x, c_noise, progress, cond) -> F, all images (B, C, H, W): PixArt-alpha.

    Time and control give one modulation for all blocks (adaLN-single) and, without SiLU or matrix, the
    last one. Class, as one token, and text enter by cross-attention.
    """

    def __init__(self, cfg: PixArt, inputs: Inputs):
        super().__init__()
        self.trunk = Trunk(cfg, inputs)
        activation = nn.GELU(approximate="tanh")
        self.semantic = SemanticTokens(inputs, cfg.width, "mlp", activation) if inputs.semantic else None
        # Not zero as in DiT: the tables would be nonzero all the same, and with them the gates.
        self.ada = AdaLN(cfg.width, 6)
        nn.init.normal_(self.ada.linear.weight, std=0.02)
        self.blocks = nn.ModuleList(SingleBlock(cfg, inputs.semantic) for _ in range(cfg.depth))
        self.final_table = nn.Parameter(torch.randn(2, cfg.width) / cfg.width**0.5)
        self.learned_variance = cfg.learned_variance

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond, variance: bool = False) -> Tensor:
        """variance: as in Trunk.image."""
        tokens = self.trunk.tokens(x)
        c = self.trunk.condition(c_noise, progress, cond)
        text, mask = self.semantic(cond, x) if self.semantic else (None, None)
        mask = seen(mask)
        with unrounded(c):
            ada = self.ada(c)
        for block in self.blocks:
            tokens = block(tokens, text, ada, mask)
        shift, scale = (self.final_table + c[:, None]).chunk(2, dim=1)
        return self.trunk.image(tokens, shift, scale, like=x, variance=variance)
