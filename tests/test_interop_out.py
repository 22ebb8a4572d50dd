"""Our networks as models of diffusers: the same function, and back again to the same tensors."""

import diffusers
import pytest
import torch
from conftest import awake
from safetensors.torch import save
from torch import Tensor, nn

from gesso import interop, nets
from gesso.cond import Cond
from gesso.config import EDM2, DiT, DiTAtt, Inputs, MMDiT, MMDiTpp, PixArt, UNet
from gesso.errors import UsageError
from gesso.interop.unet import SIZES
from gesso.nets.embed import sinusoids

SHAPE = {"width": 32, "depth": 3, "heads": 2}
OUTSIDE = {**SHAPE, "positions": "extrapolated"}
SD3 = {**SHAPE, "text_weights": "all", "max_grid": 7}
LEVELS = dict(channels=32, multipliers=(1, 2), blocks=1, transformer_depth=(0, 1), text_embed="none", head_width=16)
SDXL = {**LEVELS, "transformer_depth": (1, 2), "middle_depth": 2, "pooled_mlp": "shared"}
TEXT, POOLED = Inputs(4, 8, text_width=12), Inputs(4, 8, text_width=12, pooled_width=10)
WITH_SIZES = POOLED._replace(control=SIZES)

CASES = {
    "dit": (DiT(**OUTSIDE), Inputs(4, 8, 5)),
    "dit interpolated": (DiT(**{**OUTSIDE, "positions": "interpolated"}), Inputs(3, 12, 5)),
    "dit 4": (DiT(**OUTSIDE, patch=4), Inputs(4, 8, 5)),
    "pixart": (PixArt(**OUTSIDE), TEXT),
    "sd3": (MMDiT(**SD3, qk_norm=False), POOLED),
    "sd3.5": (MMDiT(**SD3), POOLED),
    "sd3.5 medium": (MMDiT(**SD3, dual_blocks=2), POOLED),
    "sd3 dual, no norm": (MMDiT(**SD3, dual_blocks=3, qk_norm=False), POOLED),
    "unet": (UNet(**LEVELS), TEXT),
    "unet heads": (UNet(**{**LEVELS, "heads": 4, "transformer_depth": (1, 0), "middle_depth": 2}), TEXT),
    "sdxl": (UNet(**SDXL), WITH_SIZES),
}
CLASSES = {
    "DiTTransformer2DModel": diffusers.DiTTransformer2DModel,
    "PixArtTransformer2DModel": diffusers.PixArtTransformer2DModel,
    "SD3Transformer2DModel": diffusers.SD3Transformer2DModel,
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
}


class Sinusoids(nn.Module):
    """Ours in place of theirs, which computes in float32."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, t: Tensor) -> Tensor:
        return sinusoids(t, self.n)


def in_fp64(peer: nn.Module) -> None:
    """Replace what it computes in float32 whatever the dtype: sinusoids and the variances of RMSNorm."""
    for module in list(peer.modules()):
        for name, theirs in list(module.named_children()):
            if isinstance(theirs, diffusers.models.embeddings.Timesteps):
                setattr(module, name, Sinusoids(theirs.num_channels))
            elif isinstance(theirs, diffusers.models.normalization.RMSNorm):
                norm = nn.RMSNorm(theirs.dim, eps=theirs.eps, dtype=torch.float64)
                norm.load_state_dict(theirs.state_dict())
                setattr(module, name, norm)


def pair(name: str, dtype: torch.dtype):
    """Ours, and the diffusers model that it becomes."""
    cfg, inputs = CASES[name]
    torch.manual_seed(0)
    net = awake(nets.build(cfg, inputs)).to(dtype).eval()
    kind, config, state = interop.to_diffusers(net, cfg, inputs)
    peer = CLASSES[kind](**config).to(dtype).eval()
    peer.load_state_dict(state, strict=True)
    for module in peer.modules():
        if isinstance(module, diffusers.models.embeddings.Timesteps) and kind.startswith("DiT"):
            module.downscale_freq_shift = 0  # the known difference
    if dtype == torch.float64:
        in_fp64(peer)
    return net, peer, inputs


def batch(inputs: Inputs, dtype: torch.dtype):
    """x, time and condition for ours, arguments for theirs."""
    g = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(shape, generator=g, dtype=dtype)  # noqa: E731
    x, t = randn(2, inputs.channels, inputs.resolution, inputs.resolution), torch.tensor([3.0, 431.0], dtype=dtype)
    if inputs.num_classes:
        label = torch.tensor([1, inputs.num_classes])
        return (x, t, t / 1000, Cond(label=label)), dict(hidden_states=x, timestep=t, class_labels=label)
    text = randn(2, 6, inputs.text_width)
    pooled = randn(2, inputs.pooled_width) if inputs.pooled_width else None
    sizes = 64 * randn(2, 6).abs() if inputs.control.high else None
    high, low = (None, None) if sizes is None else (sizes[:, :4], sizes[:, 4:])
    cond = Cond(text=text, pooled=pooled, control_high=high, control_low=low)
    return (x, t, t / 1000, cond), dict(hidden_states=x, timestep=t, encoder_hidden_states=text) | (
        {} if pooled is None else {"pooled_projections": pooled, "time_ids": sizes}
    )


def theirs_of(peer, given):
    if isinstance(peer, diffusers.UNet2DConditionModel):
        added = {"text_embeds": given.get("pooled_projections"), "time_ids": given.get("time_ids")}
        return peer(given["hidden_states"], given["timestep"], given["encoder_hidden_states"], added_cond_kwargs=added)
    return peer(**{name: value for name, value in given.items() if name != "time_ids"})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", list(CASES))
def test_the_same_function(name, dtype, tolerance):
    net, peer, inputs = pair(name, dtype)
    args, given = batch(inputs, dtype)
    with torch.no_grad():
        ours, theirs = net(*args), theirs_of(peer, given).sample
    assert ours.std() > 1e-2 and (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", list(CASES))
def test_there_and_back_again(name):
    """The same tensors, and where names and shapes tell them the same settings."""
    cfg, inputs = CASES[name]
    torch.manual_seed(0)
    net = awake(nets.build(cfg, inputs))
    _, _, state = interop.to_diffusers(net, cfg, inputs)
    heads = getattr(cfg, "heads", None) or 2
    back, _ = interop.load(state, heads=heads)
    assert all(tensor.equal(back.state_dict()[key]) for key, tensor in net.state_dict().items())
    assert save(state)  # which refuses tensors that share memory
    found, found_inputs = interop.recognise(state, heads)[:2]
    untold = (
        {"positions"} if cfg.name in ("dit", "pixart") else {"heads", "head_width"} if cfg.name == "unet" else set()
    )
    assert found.model_dump(exclude=untold) == cfg.model_dump(exclude=untold)
    assert found_inputs._replace(resolution=inputs.resolution) == inputs


XL = {"width": 1152, "depth": 28, "heads": 16, "positions": "extrapolated"}
STABLE = {"patch": 2, "text_weights": "all"}
PROMPT = Inputs(16, 128, text_width=4096, pooled_width=2048)
PUBLISHED = {
    # Parameters of the diffusers models, in millions; DiT with its copies of the embedders and 8 channels out.
    "DiT-XL/2": (DiT(**XL), Inputs(4, 32, 1000), 749.83 - 0.018),
    "PixArt-XL/2": (PixArt(**XL), Inputs(4, 64, text_width=4096), 610.86 - 0.018),
    "SD3 medium": (MMDiT(**STABLE, width=1536, depth=24, heads=24, max_grid=192, qk_norm=False), PROMPT, 2028.33),
    "SD3.5 medium": (MMDiT(**STABLE, width=1536, depth=24, heads=24, max_grid=384, dual_blocks=13), PROMPT, 2243.17),
    "SD3.5 large": (MMDiT(**STABLE, width=2432, depth=38, heads=38, max_grid=192), PROMPT, 8056.63),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_sizes(name):
    """Every tensor of the peer is there, in its shape, on the meta device."""
    cfg, inputs, millions = PUBLISHED[name]
    with torch.device("meta"):
        net = nets.build(cfg, inputs)
        kind, config, state = interop.to_diffusers(net, cfg, inputs)
        peer = CLASSES[kind](**config)
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in peer.state_dict().items()}
    assert sum(p.numel() for p in peer.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_gradients_are_not_in_what_is_written():
    cfg, inputs = CASES["dit"]
    net = nets.build(cfg, inputs)
    state = interop.to_diffusers(net, cfg, inputs)[2]
    next(iter(state.values())).zero_()
    assert not any(tensor.requires_grad for tensor in state.values())
    assert net.trunk.patch_embed.proj.weight.abs().max() > 0


def test_dits_time_frequencies_are_the_known_difference():
    cfg, inputs = CASES["dit"]
    net, _, _ = pair("dit", torch.float32)
    kind, config, state = interop.to_diffusers(net, cfg, inputs)
    untouched = CLASSES[kind](**config).eval()
    untouched.load_state_dict(state)
    args, given = batch(inputs, torch.float32)
    with torch.no_grad():
        off = (net(*args) - untouched(**given).sample).abs().max()
    assert off > 1e-3 and "downscale_freq_shift=1" in interop.dit.SPACING


REFUSED = {
    "net.positions=resampled": [(DiT(**SHAPE), Inputs(4, 8, 5)), (PixArt(**SHAPE), TEXT)],
    "net.qk_norm=true": [(DiT(**OUTSIDE, qk_norm=True), Inputs(4, 8, 5)), (PixArt(**OUTSIDE, qk_norm=True), TEXT)],
    "net.mlp_ratio=2.0": [
        (DiT(**OUTSIDE, mlp_ratio=2), Inputs(4, 8, 5)), (PixArt(**OUTSIDE, mlp_ratio=2), TEXT),
        (MMDiT(**SD3, mlp_ratio=2), POOLED),
    ],
    "a network without classes": [(DiT(**OUTSIDE), Inputs(4, 8))],
    "a network without text": [
        (PixArt(**OUTSIDE), Inputs(4, 8, 5)), (MMDiT(**SD3), Inputs(4, 8, 5)), (UNet(**LEVELS), Inputs(4, 8)),
    ],
    "a network without pooled text": [(MMDiT(**SD3), TEXT)],
    "control": [
        (DiT(**OUTSIDE), Inputs(4, 8, 5, control=SIZES)), (PixArt(**OUTSIDE), TEXT._replace(control=SIZES)),
        (MMDiT(**SD3), WITH_SIZES), (UNet(**LEVELS), TEXT._replace(control=SIZES)),
    ],
    "net.text_weights=qkv": [(MMDiT(**{**SD3, "text_weights": "qkv"}), POOLED)],
    "net.positions=extrapolated without net.max_grid": [(MMDiT(**OUTSIDE, text_weights="all"), POOLED)],
    "net.text_embed=mlp": [(UNet(**{**LEVELS, "text_embed": "mlp"}), TEXT)],
    "pooled text without control": [(UNet(**SDXL), POOLED)],
    "net.pooled_mlp=own": [(UNet(**{**SDXL, "pooled_mlp": "own"}), WITH_SIZES)],
    "net.middle_depth=1": [(UNet(**{**SDXL, "middle_depth": 1}), WITH_SIZES)],
    "net.middle_depth=0": [(UNet(**{**LEVELS, "middle_depth": 0}), TEXT)],
}  # fmt: skip


@pytest.mark.parametrize("reason, cfg, inputs", [(why, *case) for why, cases in REFUSED.items() for case in cases])
def test_what_diffusers_cannot_hold_is_refused_by_name(reason, cfg, inputs):
    with pytest.raises(UsageError, match=f"cannot hold (.*, )?{reason}"):
        interop.to_diffusers(nets.build(cfg, inputs), cfg, inputs)


@pytest.mark.parametrize("cfg", [DiTAtt(**SHAPE), MMDiTpp(**SHAPE), EDM2()])
def test_networks_without_a_class_in_diffusers(cfg):
    with pytest.raises(UsageError, match=rf"no class for net\.name={cfg.name}".replace("+", r"\+")):
        interop.to_diffusers(nn.Identity(), cfg, Inputs(4, 8, 5))
