"""SDXL's U-Net: Table A1's counts, parity with diffusers' UNet2DConditionModel, and what every network must do."""

import re

import pytest
import torch
from conftest import awake
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


# What every network must do.

SMALL = dict(channels=16, multipliers=(1, 2), blocks=1, transformer_depth=(0, 1), head_width=8, groups=8)
SPLIT = Control(high=3, low=2)
NETS = {
    "class": (UNet(**SMALL, context=24), Inputs(3, 8, 5)),
    "text": (UNet(**SMALL, context=24), Inputs(3, 8, text_width=12, control=SPLIT)),
    "text, pooled": (UNet(**SMALL), Inputs(3, 8, text_width=12, pooled_width=10, control=SPLIT)),
    "text, shared MLP": (
        UNet(**SMALL, text_embed="none", pooled_mlp="shared"),
        Inputs(3, 8, text_width=12, pooled_width=10, control=SIZES),
    ),
    "class, control": (UNet(**SMALL, context=24, heads=2), Inputs(3, 8, 5, control=SIZES)),
    "none": (UNet(**SMALL), Inputs(3, 8)),
}


@pytest.fixture(params=list(NETS))
def settings(request) -> tuple[UNet, Inputs]:
    return NETS[request.param]


def small_net(settings) -> UNetNet:
    torch.manual_seed(0)
    return awake(UNetNet(*settings))


def test_fresh_networks_return_zero(settings):
    torch.manual_seed(0)
    assert UNetNet(*settings)(*batch(settings[1])).abs().max() == 0


def test_every_parameter_gets_a_gradient(settings):
    """All but the queries and keys of one class token: a softmax over one key is 1."""
    net = small_net(settings).double()
    net(*batch(settings[1], torch.float64)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    silent = {n for n, p in net.named_parameters() if not p.grad.abs().max() > 1e-12}
    if not settings[1].num_classes:
        assert silent == set()
        return
    assert silent and all(re.search(r"norm_cross\.|cross_attention\.q\.", n) for n in silent)
    for name, p in net.named_parameters():
        if "cross_attention.kv" in name:
            keys, values = p.grad.chunk(2)
            assert keys.abs().max() < 1e-12 < values.abs().max()


def test_output_does_not_depend_on_neighbours(settings):
    net = small_net(settings).double()
    x, c_noise, progress, cond = batch(settings[1], torch.float64)
    whole = net(x, c_noise, progress, cond)
    for i in range(len(x)):
        s = slice(i, i + 1)
        alone = net(x[s], c_noise[s], progress[s], cond[s] if cond._tensors() else cond)
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-11, atol=1e-12)


def test_padding_is_not_seen():
    net = small_net(NETS["text"])
    x, c_noise, progress, cond = batch(NETS["text"][1])
    other = torch.where(cond.text_mask[:, :, None], cond.text, 9.0)
    changed = Cond(**{**vars(cond), "text": other})
    torch.testing.assert_close(net(x, c_noise, progress, changed), net(x, c_noise, progress, cond))


def test_withheld_class_is_the_null_class():
    net = small_net(NETS["class"])
    x, c_noise, progress, cond = batch(NETS["class"][1])
    null = net(x, c_noise, progress, Cond(label=torch.full((3,), 5)))
    torch.testing.assert_close(net(x, c_noise, progress, cond.without(semantic=True)), null)
    torch.testing.assert_close(net(x, c_noise, progress, Cond()), null)
    assert (net(x, c_noise, progress, cond) - null).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["text", "text, pooled", "text, shared MLP"])
def test_withheld_text_is_zero_text(name):
    net = small_net(NETS[name])
    x, c_noise, progress, cond = batch(NETS[name][1])
    zeros = {k: torch.zeros_like(v) for k, v in vars(cond).items() if k in ("text", "pooled") and v is not None}
    zero = net(x, c_noise, progress, Cond(**{**vars(cond), **zeros}))
    torch.testing.assert_close(net(x, c_noise, progress, cond.without(semantic=True)), zero)
    assert (net(x, c_noise, progress, cond) - zero).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["text", "text, pooled", "text, shared MLP", "class, control"])
def test_withheld_control_is_absent_control(name):
    net = small_net(NETS[name])
    x, c_noise, progress, cond = batch(NETS[name][1])
    withheld = net(x, c_noise, progress, cond.without(control=True))
    absent = net(x, c_noise, progress, Cond(**{**vars(cond), "control_high": None, "control_low": None}))
    torch.testing.assert_close(withheld, absent, rtol=0, atol=0)
    assert (net(x, c_noise, progress, cond) - absent).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["text, pooled", "text, shared MLP"])
def test_pooled_text_and_each_control_matter(name):
    net = small_net(NETS[name])
    x, c_noise, progress, cond = batch(NETS[name][1])
    progress = progress / 100  # near clean, where the low-level control has weight
    out = net(x, c_noise, progress, cond)
    for field in ("pooled", "control_high", "control_low"):
        changed = net(x, c_noise, progress, Cond(**{**vars(cond), field: vars(cond)[field] + 3}))
        assert (changed - out).abs().max() > 1e-4


def test_other_sizes_than_trained(settings):
    x, c_noise, progress, cond = batch(settings[1], size=(10, 6))
    assert small_net(settings)(x, c_noise, progress, cond).shape == x.shape


def test_torch_compile_traces_the_whole(settings):
    net = small_net(settings)
    args = batch(settings[1])
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(*args), net(*args))


def test_bf16_autocast_stays_finite(settings):
    with torch.autocast("cpu", torch.bfloat16):
        out = small_net(settings)(*batch(settings[1]))
    assert out.isfinite().all()


def test_settings_that_contradict_the_inputs():
    with pytest.raises(ValueError, match="context=24"):
        UNetNet(UNet(**SMALL, context=24, text_embed="none"), Inputs(3, 8, text_width=12))
    with pytest.raises(ValueError, match="mlp=joint"):
        UNetNet(UNet(**SMALL, pooled_mlp="shared"), Inputs(3, 8, text_width=12, pooled_width=10, control=SPLIT))
    with pytest.raises(ValueError, match="multiple of heads=3"):
        UNet(**SMALL, heads=3)
