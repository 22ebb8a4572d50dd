"""SDXL's U-Net: Table A1's counts, parity with diffusers' UNet2DConditionModel."""

import pytest
import torch
from helpers.network_cases import UNET_SHAPE, randomize_constants_
from torch import nn

from gesso.conditioning import Cond
from gesso.config import ControlSpec, InputSpec, UNetConfig
from gesso.interop.unet import from_diffusers
from gesso.models.embeddings import control_features, sinusoidal_embedding
from gesso.models.unet import UNet

SDXL_CONTROL = ControlSpec(num_high=4, num_low=2, mlp="joint")
SD15 = UNetConfig(
    channels=320,
    channel_mult=(1, 2, 4, 4),
    transformer_depth=(1, 1, 1, 0),
    transformer_depth_middle=1,
    num_heads=8,
    text_projection="none",
)
SDXL = UNetConfig(
    channels=320,
    channel_mult=(1, 2, 4),
    transformer_depth=(0, 2, 10),
    transformer_depth_middle=10,
    text_projection="none",
    pooled_mlp="shared",
)


def count(cfg: UNetConfig, inputs: InputSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(cfg, inputs).parameters())


@pytest.mark.parametrize(
    "cfg, inputs, millions",
    [
        (UNetConfig(), InputSpec(4, 32, 1000, control=SDXL_CONTROL), 401.754),
        (
            SD15.model_copy(update={"text_projection": "mlp"}),
            InputSpec(4, 64, text_dim=768, control=SDXL_CONTROL),
            864.309,
        ),
        (SD15, InputSpec(4, 64, text_dim=768), 859.521),
        (SDXL, InputSpec(4, 128, text_dim=2048, pooled_dim=1280, control=SDXL_CONTROL), 2567.464),
    ],
    ids=["table A1 class", "table A1 text", "SD1.5", "SDXL"],
)
def test_parameters(cfg, inputs, millions):
    assert round(count(cfg, inputs) / 1e6, 3) == millions


# Parity with diffusers.

SMALL_SD15 = UNetConfig(
    channels=16,
    channel_mult=(1, 2, 2),
    num_blocks=2,
    transformer_depth=(1, 1, 0),
    num_heads=4,
    text_projection="none",
    norm_num_groups=8,
)
SMALL_SDXL = UNetConfig(
    channels=16,
    channel_mult=(1, 2, 3),
    num_blocks=1,
    transformer_depth=(0, 1, 2),
    transformer_depth_middle=2,
    channels_per_head=8,
    text_projection="none",
    pooled_mlp="shared",
    norm_num_groups=8,
)
SMALL_CLASS = UNetConfig(
    channels=16,
    channel_mult=(1, 2),
    num_blocks=1,
    transformer_depth=(0, 1),
    channels_per_head=16,
    context_dim=24,
    norm_num_groups=8,
)

CASES = {
    "sd1.5": (SMALL_SD15, InputSpec(4, 16, text_dim=24), {}),
    "sdxl": (
        SMALL_SDXL,
        InputSpec(4, 16, text_dim=24, pooled_dim=20, control=SDXL_CONTROL),
        dict(
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=20 + 6 * 256,
        ),
    ),
    "class": (
        SMALL_CLASS,
        InputSpec(4, 16, 5, control=SDXL_CONTROL),
        dict(class_embed_type="projection", projection_class_embeddings_input_dim=6 * 256),
    ),
}  # fmt: skip


class ExactTimesteps(nn.Module):
    """Diffusers' Timesteps, which computes in fp32, in fp64."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        return sinusoidal_embedding(timesteps.double(), self.n)


def diffusers_unet(cfg: UNetConfig, inputs: InputSpec, options: dict) -> nn.Module:
    """Return a UNet2DConditionModel of the same settings with fresh weights."""
    from diffusers import UNet2DConditionModel

    widths = tuple(cfg.channels * m for m in cfg.channel_mult)
    heads = tuple(cfg.num_heads or width // cfg.channels_per_head for width in widths)
    # Diffusers' middle block has the depth of the last level, which is used there only with attention.
    depths = (*cfg.transformer_depth[:-1], cfg.transformer_depth_middle)
    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.transformer_depth)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.transformer_depth))
    return UNet2DConditionModel(
        in_channels=inputs.channels, out_channels=inputs.channels, block_out_channels=widths,
        down_block_types=down, up_block_types=up, layers_per_block=cfg.num_blocks,
        transformer_layers_per_block=tuple(max(depth, 1) for depth in depths),
        attention_head_dim=heads,  # the number of heads, misnamed (diffusers issue 2011)
        cross_attention_dim=cfg.context_dim or inputs.text_dim, norm_num_groups=cfg.norm_num_groups, **options,
    )  # fmt: skip


def pair(name: str, dtype: torch.dtype) -> tuple[UNet, nn.Module]:
    torch.manual_seed(0)
    cfg, inputs, options = CASES[name]
    peer = nn.Module.to(
        randomize_constants_(diffusers_unet(cfg, inputs, options)), dtype
    ).eval()  # the model's `to` logs a warning
    net = randomize_constants_(UNet(cfg, inputs)).to(dtype)
    missing, unexpected = net.load_state_dict(from_diffusers(peer.state_dict()), strict=False)
    assert not unexpected and all(key.startswith("semantic.") for key in missing)
    return net, peer


def example_batch(inputs: InputSpec, dtype=torch.float32, size=(8, 12), n=3) -> tuple:
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    cond = {}
    if inputs.num_classes:
        cond["label"] = torch.arange(n) % inputs.num_classes
    if inputs.text_dim:
        cond["text"] = randn(n, 7, inputs.text_dim)
        cond["text_mask"] = torch.arange(7) < torch.tensor([[7], [3], [1]])[:n]
    if inputs.pooled_dim:
        cond["pooled"] = randn(n, inputs.pooled_dim)
    if inputs.control.num_high:
        cond["control_high"] = torch.randint(0, 64, (n, inputs.control.num_high), generator=g).to(dtype)
    if inputs.control.num_low:
        cond["control_low"] = torch.randint(0, 64, (n, inputs.control.num_low), generator=g).to(dtype)
    c_noise = torch.tensor([1.0, 437.0, 999.0], dtype=dtype)[:n]
    return randn(n, inputs.channels, *size), c_noise, c_noise / 1000, Cond(**cond)


def run_diffusers(net: UNet, peer: nn.Module, x, c_noise, cond: Cond) -> torch.Tensor:
    context, mask = net.semantic(cond, x)
    extra_inputs = {}
    if cond.control_high is not None:
        sizes = torch.cat([cond.control_high, cond.control_low], dim=1)
        if cond.pooled is None:
            extra_inputs["class_labels"] = control_features(sizes)
        else:
            extra_inputs["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": sizes}
    return peer(x, c_noise, context, encoder_attention_mask=mask, **extra_inputs).sample


def deviations(name: str, dtype: torch.dtype, size, exact: bool, masked: bool = True) -> list[float]:
    """Return the relative deviation from diffusers of outputs and of gradients of image and text."""
    net, peer = pair(name, dtype)
    if exact:
        peer.time_proj = ExactTimesteps(CASES[name][0].channels)
        if name == "sdxl":
            peer.add_time_proj = ExactTimesteps(256)
    x, c_noise, progress, cond = example_batch(CASES[name][1], dtype, size)
    if not masked:
        cond = Cond(**{k: v for k, v in cond._present_fields().items() if k != "text_mask"})
    leaves = [t.requires_grad_() for t in (x, cond.text) if t is not None]
    actual, expected = net(x, c_noise, progress, cond), run_diffusers(net, peer, x, c_noise, cond)
    assert actual.shape == x.shape and expected.std() > 1e-2
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    grads = [torch.autograd.grad((out * weights).sum(), leaves) for out in (actual, expected)]
    pairs = [(actual, expected), *zip(*grads, strict=True)]
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (8, 20)])
@pytest.mark.parametrize("name", list(CASES))
def test_equals_diffusers_in_fp64(name, size, masked):
    """Diffusers' fp32 sinusoids are replaced; the tests below do not replace them."""
    assert max(deviations(name, torch.float64, size, exact=True, masked=masked)) < 1e-10


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_equals_unmodified_diffusers(name, dtype):
    """Diffusers' sinusoids are fp32 in both networks."""
    assert max(deviations(name, dtype, (8, 12), exact=False)) < 1e-5


def test_every_weight_is_mapped():
    """The published sizes are built on the meta device."""
    for cfg, inputs, options in [
        (SD15, InputSpec(4, 64, text_dim=768), {}),
        (
            SDXL,
            InputSpec(4, 128, text_dim=2048, pooled_dim=1280, control=SDXL_CONTROL),
            dict(use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
                 projection_class_embeddings_input_dim=2816),
        ),
    ]:  # fmt: skip
        with torch.device("meta"):
            actual, peer = UNet(cfg, inputs), diffusers_unet(cfg, inputs, options)
        expected = {name: value.shape for name, value in actual.state_dict().items()}
        assert {name: value.shape for name, value in from_diffusers(peer.state_dict()).items()} == expected


def test_parity_detects_a_wrong_epsilon_and_a_missing_mask():
    net, peer = pair("sdxl", torch.float64)
    x, c_noise, progress, cond = example_batch(CASES["sdxl"][1], torch.float64)
    expected = run_diffusers(net, peer, x, c_noise, cond)
    assert (net(x, c_noise, progress, Cond(**{**vars(cond), "text_mask": None})) - expected).abs().max() > 1e-4
    net.down[1][0].transformer.norm.eps = 1e-5
    assert (net(x, c_noise, progress, cond) - expected).abs().max() > 1e-7


def test_settings_that_contradict_the_inputs():
    split = ControlSpec(num_high=3, num_low=2)
    with pytest.raises(ValueError, match="context_dim=24"):
        UNet(UNetConfig(**UNET_SHAPE, context_dim=24, text_projection="none"), InputSpec(3, 8, text_dim=12))
    with pytest.raises(ValueError, match="mlp=joint"):
        UNet(UNetConfig(**UNET_SHAPE, pooled_mlp="shared"), InputSpec(3, 8, text_dim=12, pooled_dim=10, control=split))
    with pytest.raises(ValueError, match=r"multiple of .*heads=3"):
        UNetConfig(**UNET_SHAPE, num_heads=3)
