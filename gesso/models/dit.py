"""DiT (Peebles and Xie 2023), DiT-Att (Berrada et al. 2024) and PixArt-alpha (Chen et al. 2024).

The networks share a trunk and differ in how the semantic condition enters their blocks: by adaLN (DiT), by modulated
attention (DiT-Att), or by cross-attention without norm and gate (PixArt).

Legend: B batch, C channels, H W height and width, D width, T image tokens, S semantic tokens, h heads.
"""

import torch
from torch import Tensor, nn

from gesso.conditioning import Cond
from gesso.config import DiTAttConfig, DiTConfig, InputSpec, PixArtConfig
from gesso.models.embeddings import (
    ControlEmbedding,
    SemanticEmbedding,
    TimestepEmbedding,
    build_pos_embed,
    labels_or_null,
)
from gesso.models.layers import (
    QKV,
    AdaLN,
    Mlp,
    PatchEmbed,
    RMSNorm,
    attention,
    autocast_disabled,
    build_variance_head,
    linear,
    modulate,
    split_heads,
    unpatchify,
)

Modulation = tuple[Tensor, ...]
"""Shift, scale and gate of a branch, each (B, 1, D)."""


class Trunk(nn.Module):
    """Layers around the blocks: patch, position, time and control embeddings, and the output layer."""

    def __init__(self, cfg: DiTConfig | DiTAttConfig | PixArtConfig, inputs: InputSpec):
        super().__init__()
        self.patch_size = cfg.patch_size
        self.patch_embed = PatchEmbed(inputs.channels, cfg.hidden_size, cfg.patch_size)
        self.position = build_pos_embed(inputs, cfg.hidden_size, cfg.patch_size, cfg.pos_embed)
        self.time = TimestepEmbedding(cfg.hidden_size)
        self.control = ControlEmbedding(inputs.control, cfg.hidden_size)
        self.final = linear(cfg.hidden_size, cfg.patch_size**2 * inputs.channels, zero_init=True)
        learned = not isinstance(cfg, DiTAttConfig) and cfg.learned_variance
        self.variance = build_variance_head(cfg.hidden_size, cfg.patch_size, inputs.channels) if learned else None

    def embed_patches(self, x: Tensor) -> Tensor:
        """Return tokens (B, T, D) of images (B, C, H, W)."""
        tokens = self.patch_embed(x)
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        return tokens + self.position(h, w).to(tokens.dtype)

    def embed_condition(self, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return the embedding of time and control variables, (B, D)."""
        return self.control.add(self.time(c_noise), cond, progress)

    def to_image(
        self, tokens: Tensor, shift: Tensor, scale: Tensor, like: Tensor, return_variance: bool = False
    ) -> Tensor:
        """Return images of the shape of `like` from tokens (B, T, D); with the learned variance, (B, 2 C, H, W)."""
        h, w = like.shape[2] // self.patch_size, like.shape[3] // self.patch_size
        tokens = modulate(tokens, shift, scale)
        image = unpatchify(self.final(tokens), h, w, self.patch_size)
        if not return_variance:
            return image
        if self.variance is None:
            raise ValueError("this network learns no variance; set net.learned_variance=true")
        return torch.cat([image, unpatchify(self.variance(tokens), h, w, self.patch_size)], dim=1)


class Branches(nn.Module):
    """Self-attention and MLP of a block, each x + gate * f((1 + scale) LN(x) + shift)."""

    def __init__(self, cfg: DiTConfig | DiTAttConfig | PixArtConfig):
        super().__init__()
        self.qkv = QKV(cfg.hidden_size, cfg.num_heads, norm=cfg.qk_norm)
        self.out = linear(cfg.hidden_size, cfg.hidden_size)
        self.mlp = Mlp(cfg.hidden_size, int(cfg.hidden_size * cfg.mlp_ratio))

    def attend(self, x: Tensor, ada: Modulation) -> Tensor:
        """Return x (B, T, D) plus its gated self-attention."""
        shift, scale, gate = ada
        return torch.addcmul(x, gate, self.out(attention(*self.qkv(modulate(x, shift, scale)))))

    def attend_jointly(
        self, x: Tensor, ada: Modulation, text: Tensor, text_ada: Modulation, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return image and text tokens after joint attention, text first, with the same weights for both."""
        S = text.shape[1]
        both = torch.cat([modulate(text, *text_ada[:2]), modulate(x, *ada[:2])], dim=1)
        q, k, v = self.qkv(both)
        out = self.out(attention(q, k, v, mask))
        return torch.addcmul(x, ada[2], out[:, S:]), torch.addcmul(text, text_ada[2], out[:, :S])

    def apply_mlp(self, x: Tensor, ada: Modulation) -> Tensor:
        """Return x (B, T, D) plus its gated MLP."""
        shift, scale, gate = ada
        return torch.addcmul(x, gate, self.mlp(modulate(x, shift, scale)))


class CrossAttention(nn.Module):
    """Cross-attention of image tokens (B, T, D) to semantic tokens (B, S, D)."""

    def __init__(self, cfg: DiTAttConfig | PixArtConfig, zero_init: bool = False):
        super().__init__()
        self.heads = cfg.num_heads
        self.q = linear(cfg.hidden_size, cfg.hidden_size)
        self.kv = linear(cfg.hidden_size, 2 * cfg.hidden_size)
        self.q_norm = RMSNorm(cfg.hidden_size // cfg.num_heads) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.hidden_size // cfg.num_heads) if cfg.qk_norm else nn.Identity()
        self.out = linear(cfg.hidden_size, cfg.hidden_size, zero_init=zero_init)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Return attended values (B, T, D); mask (B, S) selects the semantic tokens, None all."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # B h T d
        k, v = split_heads(self.kv(text), 2, self.heads)
        return self.out(attention(self.q_norm(q), self.k_norm(k), v, mask))


def unmask_empty(mask: Tensor | None) -> Tensor | None:
    """Return the mask (B, S) with all tokens selected for an empty text: a softmax over no token is undefined."""
    return None if mask is None else mask | ~mask.any(dim=1, keepdim=True)


class DiTBlock(nn.Module):
    """Block of DiT: self-attention and MLP with six modulation vectors from c."""

    def __init__(self, cfg: DiTConfig | DiTAttConfig):
        super().__init__()
        self.ada = AdaLN(cfg.hidden_size, 6)
        self.branches = Branches(cfg)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return tokens (B, T, D) for x (B, T, D) and c (B, D)."""
        ada = self.ada(c)
        return self.branches.apply_mlp(self.branches.attend(x, ada[:3]), ada[3:])


class InContextBlock(nn.Module):
    """DiT's block with the class as an additional attention token; nine modulation vectors from c.

    The class token uses the block's qkv and output layers with its own shift, scale and gate, and has no MLP. The
    output of the last block's class token is unused.
    """

    def __init__(self, cfg: DiTAttConfig):
        super().__init__()
        self.ada = AdaLN(cfg.hidden_size, 9)
        self.branches = Branches(cfg)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return image tokens (B, T, D) and the class token (B, 1, D); c (B, D)."""
        ada = self.ada(c)
        x, text = self.branches.attend_jointly(x, ada[:3], text, ada[3:6], mask)
        return self.branches.apply_mlp(x, ada[6:]), text


class CrossAttnBlock(nn.Module):
    """Self-attention, cross-attention to the text and MLP with nine modulation vectors from c."""

    def __init__(self, cfg: DiTAttConfig):
        super().__init__()
        self.ada = AdaLN(cfg.hidden_size, 9)
        self.branches = Branches(cfg)
        self.cross = CrossAttention(cfg)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return image tokens (B, T, D) and the unchanged text (B, S, D); c (B, D), mask (B, S)."""
        ada = self.ada(c)
        x = self.branches.attend(x, ada[:3])
        shift, scale, gate = ada[3:6]
        x = torch.addcmul(x, gate, self.cross(modulate(x, shift, scale), text, mask))
        return self.branches.apply_mlp(x, ada[6:]), text


class PixArtBlock(nn.Module):
    """Block of PixArt: six modulation vectors shared by all blocks plus a table per block (adaLN-single).

    The cross-attention between self-attention and MLP has no norm and no gate; it is zero at initialization.
    """

    def __init__(self, cfg: PixArtConfig, has_semantic: bool):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, cfg.hidden_size) / cfg.hidden_size**0.5)
        self.branches = Branches(cfg)
        self.cross = CrossAttention(cfg, zero_init=True) if has_semantic else None

    def forward(self, x: Tensor, text: Tensor | None, ada: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """Return tokens (B, T, D); text (B, S, D), ada six tensors (B, 1, D), mask (B, S)."""
        ada = tuple(row + shared for row, shared in zip(self.table.unbind(), ada, strict=True))
        x = self.branches.attend(x, ada[:3])
        if self.cross is not None:
            x = x + self.cross(x, text, mask)
        return self.branches.apply_mlp(x, ada[3:])


class DiT(nn.Module):
    """DiT F = net(x, c_noise, progress, cond), x and F (B, C, H, W); "DiT w/ LN" of Berrada et al.

    c = time + class + control modulates every block. The last row of the class table is the null class.
    """

    def __init__(self, cfg: DiTConfig, inputs: InputSpec):
        super().__init__()
        self.num_classes = inputs.num_classes
        self.trunk = Trunk(cfg, inputs)
        if self.num_classes:
            self.table = nn.Embedding(self.num_classes + 1, cfg.hidden_size)
            nn.init.normal_(self.table.weight, std=0.02)
        self.blocks = nn.ModuleList(DiTBlock(cfg) for _ in range(cfg.depth))
        self.final_ada = AdaLN(cfg.hidden_size, 2)
        self.learned_variance = cfg.learned_variance

    def forward(
        self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond, return_variance: bool = False
    ) -> Tensor:
        """Return F, (B, C, H, W), or with the learned variance (B, 2 C, H, W); see `gesso.models` for the arguments."""
        tokens = self.trunk.embed_patches(x)
        c = self.trunk.embed_condition(c_noise, progress, cond)
        if self.num_classes:
            c = c + self.table(labels_or_null(cond, self.num_classes, x))
        for block in self.blocks:
            tokens = block(tokens, c)
        shift, scale = self.final_ada(c)
        return self.trunk.to_image(tokens, shift, scale, like=x, return_variance=return_variance)


class DiTAtt(nn.Module):
    """DiT-Att F = net(x, c_noise, progress, cond), x and F (B, C, H, W); "DiT w/ Att" of Berrada et al.

    c = time + control. The paper gives no equations for the blocks. These reproduce Table A1, in which both cells have
    Linear(D, 9 D) in adaLN and count positions as parameters:

    class  792.440 M and 237.93 GFLOP at 256 pixels. 113 M above DiT is 3 (D^2 + D) of adaLN per block plus
           2 (D^2 + D) for an MLP on the class table, with the positions of 256 tokens, without weights for
           cross-attention. 0.59 GFLOP above DiT is one token through qkv, out and attention, not a second
           pass of the image tokens (38 GFLOP): the class is a token of the self-attention.
    text   940.494 M. 4 (D^2 + D) of cross-attention and 3 (D^2 + D) of adaLN per block, an MLP 768 -> D -> D
           on the text, the positions of 1024 tokens, no weights in qk-norm (8,064 here). Its 407.88 GFLOP
           are 84.6 more than these weights cost, the cost of a second cross-attention.
    """

    def __init__(self, cfg: DiTAttConfig, inputs: InputSpec):
        super().__init__()
        self.trunk = Trunk(cfg, inputs)
        self.semantic = SemanticEmbedding(inputs, cfg.hidden_size, "mlp", nn.SiLU()) if inputs.has_semantic else None
        block = (InContextBlock if inputs.num_classes else CrossAttnBlock) if inputs.has_semantic else DiTBlock
        self.blocks = nn.ModuleList(block(cfg) for _ in range(cfg.depth))
        self.final_ada = AdaLN(cfg.hidden_size, 2)

    def forward(self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond) -> Tensor:
        """Return F, (B, C, H, W); see `gesso.models` for the arguments."""
        tokens = self.trunk.embed_patches(x)
        c = self.trunk.embed_condition(c_noise, progress, cond)
        if self.semantic is None:
            for block in self.blocks:
                tokens = block(tokens, c)
        else:
            text, mask = self.semantic(cond, x)
            mask = unmask_empty(mask)
            for block in self.blocks:
                tokens, text = block(tokens, text, c, mask)
        shift, scale = self.final_ada(c)
        return self.trunk.to_image(tokens, shift, scale, like=x)


class PixArt(nn.Module):
    """PixArt-alpha F = net(x, c_noise, progress, cond), x and F (B, C, H, W).

    Time and control give one modulation for all blocks (adaLN-single) and, without SiLU and matrix, that of the output
    layer. Class (one token) and text enter by cross-attention.
    """

    def __init__(self, cfg: PixArtConfig, inputs: InputSpec):
        super().__init__()
        self.trunk = Trunk(cfg, inputs)
        activation = nn.GELU(approximate="tanh")
        self.semantic = SemanticEmbedding(inputs, cfg.hidden_size, "mlp", activation) if inputs.has_semantic else None
        # Not zero as in DiT: the tables, and so the gates, are nonzero anyway.
        self.ada = AdaLN(cfg.hidden_size, 6)
        nn.init.normal_(self.ada.linear.weight, std=0.02)
        self.blocks = nn.ModuleList(PixArtBlock(cfg, inputs.has_semantic) for _ in range(cfg.depth))
        self.final_table = nn.Parameter(torch.randn(2, cfg.hidden_size) / cfg.hidden_size**0.5)
        self.learned_variance = cfg.learned_variance

    def forward(
        self, x: Tensor, c_noise: Tensor, progress: Tensor, cond: Cond, return_variance: bool = False
    ) -> Tensor:
        """Return F, (B, C, H, W), or with the learned variance (B, 2 C, H, W); see `gesso.models` for the arguments."""
        tokens = self.trunk.embed_patches(x)
        c = self.trunk.embed_condition(c_noise, progress, cond)
        text, mask = self.semantic(cond, x) if self.semantic else (None, None)
        mask = unmask_empty(mask)
        with autocast_disabled(c):
            ada = self.ada(c)
        for block in self.blocks:
            tokens = block(tokens, text, ada, mask)
        shift, scale = (self.final_table + c[:, None]).chunk(2, dim=1)
        return self.trunk.to_image(tokens, shift, scale, like=x, return_variance=return_variance)
