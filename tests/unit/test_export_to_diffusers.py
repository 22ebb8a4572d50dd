"""Our networks as models of diffusers: the same function, and back again to the same tensors."""

import diffusers
import pytest
import torch
from helpers.network_cases import randomize_constants_
from safetensors.torch import save
from torch import Tensor, nn

from gesso import interop, models
from gesso.conditioning import Cond
from gesso.config import (
    DiTAttConfig,
    DiTConfig,
    EDM2Config,
    InputSpec,
    MMDiTConfig,
    MMDiTppConfig,
    PixArtConfig,
    UNetConfig,
)
from gesso.errors import UsageError
from gesso.interop.unet import SDXL_CONTROL
from gesso.models.embeddings import sinusoidal_embedding

SHAPE = {"hidden_size": 32, "depth": 3, "num_heads": 2}
SHAPE_EXTRAPOLATED = {**SHAPE, "pos_embed": "extrapolated"}
SD3 = {**SHAPE, "separate_text_weights": "all", "pos_embed_max_size": 7}
LEVELS = dict(
    channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    transformer_depth=(0, 1),
    text_projection="none",
    channels_per_head=16,
)
SDXL = {**LEVELS, "transformer_depth": (1, 2), "transformer_depth_middle": 2, "pooled_mlp": "shared"}
TEXT, POOLED = InputSpec(4, 8, text_dim=12), InputSpec(4, 8, text_dim=12, pooled_dim=10)
WITH_SIZES = POOLED._replace(control=SDXL_CONTROL)

CASES = {
    "dit": (DiTConfig(**SHAPE_EXTRAPOLATED), InputSpec(4, 8, 5)),
    "dit interpolated": (DiTConfig(**{**SHAPE_EXTRAPOLATED, "pos_embed": "interpolated"}), InputSpec(3, 12, 5)),
    "dit 4": (DiTConfig(**SHAPE_EXTRAPOLATED, patch_size=4), InputSpec(4, 8, 5)),
    "pixart": (PixArtConfig(**SHAPE_EXTRAPOLATED), TEXT),
    "sd3": (MMDiTConfig(**SD3, qk_norm=False), POOLED),
    "sd3.5": (MMDiTConfig(**SD3), POOLED),
    "sd3.5 medium": (MMDiTConfig(**SD3, dual_attention_layers=2), POOLED),
    "sd3 dual, no norm": (MMDiTConfig(**SD3, dual_attention_layers=3, qk_norm=False), POOLED),
    "unet": (UNetConfig(**LEVELS), TEXT),
    "unet heads": (
        UNetConfig(**{**LEVELS, "num_heads": 4, "transformer_depth": (1, 0), "transformer_depth_middle": 2}),
        TEXT,
    ),
    "sdxl": (UNetConfig(**SDXL), WITH_SIZES),
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
        return sinusoidal_embedding(t, self.n)


def to_float64_(peer: nn.Module) -> None:
    """Replace what it computes in float32 whatever the dtype: sinusoids and the variances of RMSNorm."""
    for module in list(peer.modules()):
        for name, reference in list(module.named_children()):
            if isinstance(reference, diffusers.models.embeddings.Timesteps):
                setattr(module, name, Sinusoids(reference.num_channels))
            elif isinstance(reference, diffusers.models.normalization.RMSNorm):
                norm = nn.RMSNorm(reference.dim, eps=reference.eps, dtype=torch.float64)
                norm.load_state_dict(reference.state_dict())
                setattr(module, name, norm)


def pair(name: str, dtype: torch.dtype):
    """Ours, and the diffusers model that it becomes."""
    cfg, inputs = CASES[name]
    torch.manual_seed(0)
    net = randomize_constants_(models.build_network(cfg, inputs)).to(dtype).eval()
    kind, config, state = interop.to_diffusers(net, cfg, inputs)
    peer = CLASSES[kind](**config).to(dtype).eval()
    peer.load_state_dict(state, strict=True)
    for module in peer.modules():
        if isinstance(module, diffusers.models.embeddings.Timesteps) and kind.startswith("DiT"):
            module.downscale_freq_shift = 0  # the known difference
    if dtype == torch.float64:
        to_float64_(peer)
    return net, peer, inputs


def batch(inputs: InputSpec, dtype: torch.dtype):
    """x, time and condition for ours, arguments for theirs."""
    g = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(shape, generator=g, dtype=dtype)  # noqa: E731
    x, t = randn(2, inputs.channels, inputs.resolution, inputs.resolution), torch.tensor([3.0, 431.0], dtype=dtype)
    if inputs.num_classes:
        label = torch.tensor([1, inputs.num_classes])
        return (x, t, t / 1000, Cond(label=label)), dict(hidden_states=x, timestep=t, class_labels=label)
    text = randn(2, 6, inputs.text_dim)
    pooled = randn(2, inputs.pooled_dim) if inputs.pooled_dim else None
    sizes = 64 * randn(2, 6).abs() if inputs.control.num_high else None
    high, low = (None, None) if sizes is None else (sizes[:, :4], sizes[:, 4:])
    cond = Cond(text=text, pooled=pooled, control_high=high, control_low=low)
    return (x, t, t / 1000, cond), dict(hidden_states=x, timestep=t, encoder_hidden_states=text) | (
        {} if pooled is None else {"pooled_projections": pooled, "time_ids": sizes}
    )


def call_diffusers(peer, inputs):
    if isinstance(peer, diffusers.UNet2DConditionModel):
        added = {"text_embeds": inputs.get("pooled_projections"), "time_ids": inputs.get("time_ids")}
        return peer(
            inputs["hidden_states"], inputs["timestep"], inputs["encoder_hidden_states"], added_cond_kwargs=added
        )
    return peer(**{name: value for name, value in inputs.items() if name != "time_ids"})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", list(CASES))
def test_exported_model_is_the_same_function(name, dtype, tolerance):
    net, peer, inputs = pair(name, dtype)
    args, peer_inputs = batch(inputs, dtype)
    with torch.no_grad():
        output, reference = net(*args), call_diffusers(peer, peer_inputs).sample
    assert output.std() > 1e-2 and (output - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("name", list(CASES))
def test_export_import_round_trip(name):
    """The same tensors, and where names and shapes tell them the same settings."""
    cfg, inputs = CASES[name]
    torch.manual_seed(0)
    net = randomize_constants_(models.build_network(cfg, inputs))
    _, _, state = interop.to_diffusers(net, cfg, inputs)
    heads = getattr(cfg, "num_heads", None) or 2
    back, _ = interop.load_network(state, num_heads=heads)
    assert all(tensor.equal(back.state_dict()[key]) for key, tensor in net.state_dict().items())
    assert save(state)  # which refuses tensors that share memory
    actual, actual_inputs = interop.detect_format(state, heads)[:2]
    untold = (
        {"pos_embed"}
        if cfg.name in ("dit", "pixart")
        else {"num_heads", "channels_per_head"}
        if cfg.name == "unet"
        else set()
    )
    assert actual.model_dump(exclude=untold) == cfg.model_dump(exclude=untold)
    assert actual_inputs._replace(resolution=inputs.resolution) == inputs


XL = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "pos_embed": "extrapolated"}
SD3_SETTINGS = {"patch_size": 2, "separate_text_weights": "all"}
PROMPT = InputSpec(16, 128, text_dim=4096, pooled_dim=2048)
PUBLISHED = {
    # Parameters of the diffusers models, in millions; DiT with its copies of the embedders and 8 channels out.
    "DiT-XL/2": (DiTConfig(**XL), InputSpec(4, 32, 1000), 749.83 - 0.018),
    "PixArt-XL/2": (PixArtConfig(**XL), InputSpec(4, 64, text_dim=4096), 610.86 - 0.018),
    "SD3 medium": (
        MMDiTConfig(**SD3_SETTINGS, hidden_size=1536, depth=24, num_heads=24, pos_embed_max_size=192, qk_norm=False),
        PROMPT,
        2028.33,
    ),
    "SD3.5 medium": (
        MMDiTConfig(
            **SD3_SETTINGS, hidden_size=1536, depth=24, num_heads=24, pos_embed_max_size=384, dual_attention_layers=13
        ),
        PROMPT,
        2243.17,
    ),
    "SD3.5 large": (
        MMDiTConfig(**SD3_SETTINGS, hidden_size=2432, depth=38, num_heads=38, pos_embed_max_size=192),
        PROMPT,
        8056.63,
    ),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_sizes(name):
    """Every tensor of the peer is there, in its shape, on the meta device."""
    cfg, inputs, millions = PUBLISHED[name]
    with torch.device("meta"):
        net = models.build_network(cfg, inputs)
        kind, config, state = interop.to_diffusers(net, cfg, inputs)
        peer = CLASSES[kind](**config)
    assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in peer.state_dict().items()}
    assert sum(p.numel() for p in peer.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_exported_tensors_have_no_gradients():
    cfg, inputs = CASES["dit"]
    net = models.build_network(cfg, inputs)
    state = interop.to_diffusers(net, cfg, inputs)[2]
    next(iter(state.values())).zero_()
    assert not any(tensor.requires_grad for tensor in state.values())
    assert net.trunk.patch_embed.proj.weight.abs().max() > 0


def test_dit_time_frequencies_differ_from_diffusers():
    cfg, inputs = CASES["dit"]
    net, _, _ = pair("dit", torch.float32)
    kind, config, state = interop.to_diffusers(net, cfg, inputs)
    untouched = CLASSES[kind](**config).eval()
    untouched.load_state_dict(state)
    args, peer_inputs = batch(inputs, torch.float32)
    with torch.no_grad():
        off = (net(*args) - untouched(**peer_inputs).sample).abs().max()
    assert off > 1e-3 and "downscale_freq_shift=1" in interop.dit.NOTE_TIME_FREQUENCIES


NOT_EXPORTABLE = {
    "net.pos_embed=resampled": [(DiTConfig(**SHAPE), InputSpec(4, 8, 5)), (PixArtConfig(**SHAPE), TEXT)],
    "net.qk_norm=true": [(DiTConfig(**SHAPE_EXTRAPOLATED, qk_norm=True), InputSpec(4, 8, 5)), (PixArtConfig(**SHAPE_EXTRAPOLATED, qk_norm=True), TEXT)],
    "net.mlp_ratio=2.0": [
        (DiTConfig(**SHAPE_EXTRAPOLATED, mlp_ratio=2), InputSpec(4, 8, 5)), (PixArtConfig(**SHAPE_EXTRAPOLATED, mlp_ratio=2), TEXT),
        (MMDiTConfig(**SD3, mlp_ratio=2), POOLED),
    ],
    "a network without classes": [(DiTConfig(**SHAPE_EXTRAPOLATED), InputSpec(4, 8))],
    "a network without text": [
        (PixArtConfig(**SHAPE_EXTRAPOLATED), InputSpec(4, 8, 5)), (MMDiTConfig(**SD3), InputSpec(4, 8, 5)), (UNetConfig(**LEVELS), InputSpec(4, 8)),
    ],
    "a network without pooled text": [(MMDiTConfig(**SD3), TEXT)],
    "control": [
        (DiTConfig(**SHAPE_EXTRAPOLATED), InputSpec(4, 8, 5, control=SDXL_CONTROL)), (PixArtConfig(**SHAPE_EXTRAPOLATED), TEXT._replace(control=SDXL_CONTROL)),
        (MMDiTConfig(**SD3), WITH_SIZES), (UNetConfig(**LEVELS), TEXT._replace(control=SDXL_CONTROL)),
    ],
    "net.separate_text_weights=qkv": [(MMDiTConfig(**{**SD3, "separate_text_weights": "qkv"}), POOLED)],
    "net.pos_embed=extrapolated without net.pos_embed_max_size": [(MMDiTConfig(**SHAPE_EXTRAPOLATED, separate_text_weights="all"), POOLED)],
    "net.text_projection=mlp": [(UNetConfig(**{**LEVELS, "text_projection": "mlp"}), TEXT)],
    "pooled text without control": [(UNetConfig(**SDXL), POOLED)],
    "net.pooled_mlp=separate": [(UNetConfig(**{**SDXL, "pooled_mlp": "separate"}), WITH_SIZES)],
    "net.transformer_depth_middle=1": [(UNetConfig(**{**SDXL, "transformer_depth_middle": 1}), WITH_SIZES)],
    "net.transformer_depth_middle=0": [(UNetConfig(**{**LEVELS, "transformer_depth_middle": 0}), TEXT)],
}  # fmt: skip


@pytest.mark.parametrize(
    "reason, cfg, inputs", [(why, *case) for why, cases in NOT_EXPORTABLE.items() for case in cases]
)
def test_unexportable_settings_are_named(reason, cfg, inputs):
    with pytest.raises(UsageError, match=f"does not support (.*, )?{reason}"):
        interop.to_diffusers(models.build_network(cfg, inputs), cfg, inputs)


@pytest.mark.parametrize("cfg", [DiTAttConfig(**SHAPE), MMDiTppConfig(**SHAPE), EDM2Config()])
def test_networks_without_a_class_in_diffusers(cfg):
    with pytest.raises(UsageError, match=rf"no class for net\.name={cfg.name}".replace("+", r"\+")):
        interop.to_diffusers(nn.Identity(), cfg, InputSpec(4, 8, 5))
