"""SDXL's U-Net: Table A1's counts, parity with diffusers' UNet2DConditionModel."""

import pytest
import torch
from conftest import awake
from networks import UNET
from torch import nn

from gesso.cond import Cond
from gesso.config import Control, Inputs, UNet
from gesso.interop.unet import from_diffusers
from gesso.nets.embed import control_features, sinusoids
from gesso.nets.unet import UNetNet

SIZES = Control(high=4, low=2, mlp="joint")
SD15 = UNet(
    channels=320, multipliers=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), middle_depth=1, heads=8, text_embed="none"
)  # fmt: skip
SDXL = UNet(
    channels=320, multipliers=(1, 2, 4), transformer_depth=(0, 2, 10), middle_depth=10, text_embed="none",
    pooled_mlp="shared",
)  # fmt: skip


def count(cfg: UNet, inputs: Inputs) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNetNet(cfg, inputs).parameters())


@pytest.mark.parametrize(
    "cfg, inputs, millions",
    [
        (UNet(), Inputs(4, 32, 1000, control=SIZES), 401.754),
        (SD15.model_copy(update={"text_embed": "mlp"}), Inputs(4, 64, text_width=768, control=SIZES), 864.309),
        (SD15, Inputs(4, 64, text_width=768), 859.521),
        (SDXL, Inputs(4, 128, text_width=2048, pooled_width=1280, control=SIZES), 2567.464),
    ],
    ids=["table A1 class", "table A1 text", "SD1.5", "SDXL"],
)
def test_parameters(cfg, inputs, millions):
    assert round(count(cfg, inputs) / 1e6, 3) == millions


# Parity with diffusers.

SMALL_SD15 = UNet(
    channels=16, multipliers=(1, 2, 2), blocks=2, transformer_depth=(1, 1, 0), heads=4, text_embed="none", groups=8
)  # fmt: skip
SMALL_SDXL = UNet(
    channels=16, multipliers=(1, 2, 3), blocks=1, transformer_depth=(0, 1, 2), middle_depth=2, head_width=8,
    text_embed="none", pooled_mlp="shared", groups=8,
)  # fmt: skip
SMALL_CLASS = UNet(
    channels=16, multipliers=(1, 2), blocks=1, transformer_depth=(0, 1), head_width=16, context=24, groups=8
)

CASES = {
    "sd1.5": (SMALL_SD15, Inputs(4, 16, text_width=24), {}),
    "sdxl": (
        SMALL_SDXL,
        Inputs(4, 16, text_width=24, pooled_width=20, control=SIZES),
        dict(
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=20 + 6 * 256,
        ),
    ),
    "class": (
        SMALL_CLASS,
        Inputs(4, 16, 5, control=SIZES),
        dict(class_embed_type="projection", projection_class_embeddings_input_dim=6 * 256),
    ),
}  # fmt: skip


class ExactTimesteps(nn.Module):
    """The peer's Timesteps, which computes in fp32 whatever the weights are, in fp64."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return sinusoids(timesteps.double(), self.n)


def peer_of(cfg: UNet, inputs: Inputs, options: dict) -> nn.Module:
    """UNet2DConditionModel of the same settings, with fresh weights."""
    from diffusers import UNet2DConditionModel

    widths = tuple(cfg.channels * m for m in cfg.multipliers)
    heads = tuple(cfg.heads or width // cfg.head_width for width in widths)
    # The middle takes the depth of the last level, whose own depth counts only where it has attention.
    depths = (*cfg.transformer_depth[:-1], cfg.middle_depth)
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.transformer_depth)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.transformer_depth))
    return UNet2DConditionModel(
        in_channels=inputs.channels, out_channels=inputs.channels, block_out_channels=widths,
        down_block_types=down, up_block_types=up, layers_per_block=cfg.blocks,
        transformer_layers_per_block=tuple(max(depth, 1) for depth in depths),
        attention_head_dim=heads,  # the number of heads, misnamed (diffusers issue 2011)
        cross_attention_dim=cfg.context or inputs.text_width, norm_num_groups=cfg.groups, **options,
    )  # fmt: skip


def pair(name: str, dtype: torch.dtype) -> tuple[UNetNet, nn.Module]:
    torch.manual_seed(0)
    cfg, inputs, options = CASES[name]
    peer = nn.Module.to(awake(peer_of(cfg, inputs, options)), dtype).eval()  # the peer's own `to` logs a warning
    net = awake(UNetNet(cfg, inputs)).to(dtype)
    missing, unexpected = net.load_state_dict(from_diffusers(peer.state_dict()), strict=False)
    assert not unexpected and all(key.startswith("semantic.") for key in missing)
    return net, peer


def batch(inputs: Inputs, dtype=torch.float32, size=(8, 12), n=3) -> tuple:
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    cond = {}
    if inputs.num_classes:
        cond["label"] = torch.arange(n) % inputs.num_classes
    if inputs.text_width:
        cond["text"] = randn(n, 7, inputs.text_width)
        cond["text_mask"] = torch.arange(7) < torch.tensor([[7], [3], [1]])[:n]
    if inputs.pooled_width:
        cond["pooled"] = randn(n, inputs.pooled_width)
    if inputs.control.high:
        cond["control_high"] = torch.randint(0, 64, (n, inputs.control.high), generator=g).to(dtype)
    if inputs.control.low:
        cond["control_low"] = torch.randint(0, 64, (n, inputs.control.low), generator=g).to(dtype)
    c_noise = torch.tensor([1.0, 437.0, 999.0], dtype=dtype)[:n]
    return randn(n, inputs.channels, *size), c_noise, c_noise / 1000, Cond(**cond)


def run_peer(net: UNetNet, peer: nn.Module, x, c_noise, cond: Cond) -> torch.Tensor:
    context, mask = net.semantic(cond, x)
    more = {}
    if cond.control_high is not None:
        sizes = torch.cat([cond.control_high, cond.control_low], dim=1)
        if cond.pooled is None:
            more["class_labels"] = control_features(sizes)
        else:
            more["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": sizes}
    return peer(x, c_noise, context, encoder_attention_mask=mask, **more).sample


def deviations(name: str, dtype: torch.dtype, size, exact: bool, masked: bool = True) -> list[float]:
    """Relative deviation from the peer: of the outputs, of the gradients to image and text."""
    net, peer = pair(name, dtype)
    if exact:
        peer.time_proj = ExactTimesteps(CASES[name][0].channels)
        if name == "sdxl":
            peer.add_time_proj = ExactTimesteps(256)
    x, c_noise, progress, cond = batch(CASES[name][1], dtype, size)
    if not masked:
        cond = Cond(**{k: v for k, v in cond._tensors().items() if k != "text_mask"})
    leaves = [t.requires_grad_() for t in (x, cond.text) if t is not None]
    ours, theirs = net(x, c_noise, progress, cond), run_peer(net, peer, x, c_noise, cond)
    assert ours.shape == x.shape and theirs.std() > 1e-2
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    grads = [torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, theirs)]
    pairs = [(ours, theirs), *zip(*grads, strict=True)]
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (8, 20)])
@pytest.mark.parametrize("name", list(CASES))
def test_equals_diffusers_in_fp64(name, size, masked):
    """The peer's fp32 part, the sinusoids, is replaced; the tests below have it as it is."""
    assert max(deviations(name, torch.float64, size, exact=True, masked=masked)) < 1e-10


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_equals_diffusers_as_it_is(name, dtype):
    """With the peer's own sinusoids, which are fp32 in both."""
    assert max(deviations(name, dtype, (8, 12), exact=False)) < 1e-5


def test_every_weight_of_the_peer_and_of_ours_has_a_place():
    """On the meta device, at the published sizes."""
    for cfg, inputs, options in [
        (SD15, Inputs(4, 64, text_width=768), {}),
        (
            SDXL,
            Inputs(4, 128, text_width=2048, pooled_width=1280, control=SIZES),
            dict(use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816),
        ),
    ]:  # fmt: skip
        with torch.device("meta"):
            ours, peer = UNetNet(cfg, inputs), peer_of(cfg, inputs, options)
        wanted = {name: value.shape for name, value in ours.state_dict().items()}
        assert {name: value.shape for name, value in from_diffusers(peer.state_dict()).items()} == wanted


def test_parity_notices_a_wrong_epsilon_and_a_missing_mask():
    net, peer = pair("sdxl", torch.float64)
    x, c_noise, progress, cond = batch(CASES["sdxl"][1], torch.float64)
    theirs = run_peer(net, peer, x, c_noise, cond)
    assert (net(x, c_noise, progress, Cond(**{**vars(cond), "text_mask": None})) - theirs).abs().max() > 1e-4
    net.down[1][0].transformer.norm.eps = 1e-5
    assert (net(x, c_noise, progress, cond) - theirs).abs().max() > 1e-7


def test_settings_that_contradict_the_inputs():
    split = Control(high=3, low=2)
    with pytest.raises(ValueError, match="context=24"):
        UNetNet(UNet(**UNET, context=24, text_embed="none"), Inputs(3, 8, text_width=12))
    with pytest.raises(ValueError, match="mlp=joint"):
        UNetNet(UNet(**UNET, pooled_mlp="shared"), Inputs(3, 8, text_width=12, pooled_width=10, control=split))
    with pytest.raises(ValueError, match="multiple of heads=3"):
        UNet(**UNET, heads=3)
