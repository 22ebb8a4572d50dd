"""Other people's weights: names, layouts and the function that they stand for."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from helpers import reference_edm2
from helpers.network_cases import randomize_constants_
from helpers.published_edm2 import published_edm2_weights, published_shapes
from pydantic import ValidationError

from gesso import interop, models
from gesso.conditioning import Cond
from gesso.config import InputSpec, MMDiTConfig
from gesso.errors import RunError, UsageError
from gesso.interop import mapping
from gesso.models.embeddings import SinCosPosEmbed


def formula(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers in (-1.7, 1.7) that depend on a name and a place alone, as scrambled 32-bit integers; float64."""
    i = torch.arange(torch.Size(shape).numel())
    key = sum((k + 1) * ord(letter) for k, letter in enumerate(name)) % 65521
    h = (i * i * 2654435761 + i * 40503 + key * 2246822519) % 2**32
    h = (h ^ (h >> 15)) * 2246822519 % 2**32
    h = h ^ (h >> 13)
    return ((h.double() / 2**32 * 2 - 1) * 1.7).reshape(shape)


def test_a_published_network_of_three_levels_loads():
    """Its embedding is as wide as its widest level, 3 c. Every 128th number that the published code, in float64, returns for
    weights by `formula`."""
    published = torch.tensor(
        [0.1417662691, 0.3050769567, -0.0962073776, 0.0321755406, -0.0000232132, -0.0195055597, 0.1599899118, 0.0788564872,
         -0.0176579172, 0.1525166124, 0.0500174311, -0.1059784104], dtype=torch.float64,
    )  # fmt: skip
    shapes = published_shapes(classes=5, multipliers=(1, 2, 3), attention=(8, 4))
    net, _ = interop.load_network({name: formula(name, shape) for name, shape in shapes.items()})
    assert len(shapes) == 92 and net.emb_noise.weight.shape == (192, 64)
    net = net.double()
    # Frequencies pass through float32 at loading, as all weights do; here they are multiplied by up to .28.
    c_noise = torch.tensor([0.4, 3.0]).double().log() / 4
    output = net(formula("x", (2, 3, 16, 16)), c_noise, c_noise, Cond(label=torch.tensor([1, 3]))).detach()
    torch.testing.assert_close(output.flatten()[::128], published, rtol=1e-5, atol=1e-6)
    assert float(output.square().sum()) == pytest.approx(40.895036802059465, rel=1e-6)


def test_an_embedding_of_another_width_is_refused():
    """channel_mult_emb of the published code, which no published model has."""
    state = published_edm2_weights() | {"unet.emb_noise.weight": torch.randn(256, 64)}
    with pytest.raises(UsageError, match=r"embedding of this EDM2 network has 256 channels .* its widest level 128"):
        interop.load_network(state)


ORDER = {
    "encoder": ["enc.16x16_block0", "enc.8x8_down", "enc.8x8_block0"],
    "decoder": ["dec.8x8_in0", "dec.8x8_in1", "dec.8x8_block0", "dec.8x8_block1", "dec.16x16_up", "dec.16x16_block0", "dec.16x16_block1"],
}  # fmt: skip


def test_published_edm2_weights(monkeypatch):
    """The paper's equations on the published layout: normalization with eps 1e-4, q, k, v interleaved per head."""
    state = published_edm2_weights()
    net, notes = interop.load_network(state)

    def rows(w):
        norm = w.reshape(len(w), -1).norm(dim=1)
        n = w[0].numel()
        return w / (1e-4 + norm / n**0.5).reshape(-1, *[1] * (w.ndim - 1)) / n**0.5

    def attention(p, x, head):
        b, c, h, w = x.shape
        qkv = reference_edm2.conv(x, p["qkv.weight"]).reshape(b, c // head, head, 3, h * w)
        q, k, v = (reference_edm2.pixel_norm(t, 2) for t in qkv.unbind(3))
        weights = torch.einsum("bnci,bncj->bnij", q, k / head**0.5).softmax(-1)
        y = torch.einsum("bnij,bncj->bnci", weights, v).reshape(b, c, h, w)
        return reference_edm2.mp_sum(x, reference_edm2.conv(y, p["proj.weight"]), 0.3)

    monkeypatch.setattr(reference_edm2, "unit_rows", rows)
    monkeypatch.setattr(reference_edm2, "attention", attention)
    top = {
        "out_gain": "unet.out_gain", "emb_fourier.freqs": "unet.emb_fourier.freqs", "emb_fourier.phases": "unet.emb_fourier.phases",
        "emb_noise.weight": "unet.emb_noise.weight", "emb_label.weight": "unet.emb_label.weight",
        "conv_in.weight": "unet.enc.16x16_conv.weight", "conv_out.weight": "unet.out_conv.weight",
    }  # fmt: skip
    reference = {ours: state[name].double() for ours, name in top.items()}
    for side, blocks in ORDER.items():
        for i, block in enumerate(blocks):
            for name, tensor in state.items():
                if name.startswith(f"unet.{block}."):
                    inner = name.removeprefix(f"unet.{block}.").replace("attn_", "attention.")
                    reference[f"{side}.{i}.{inner}"] = tensor.double()
    g = torch.Generator().manual_seed(1)
    x, c_noise = torch.randn(2, 3, 16, 16, generator=g, dtype=torch.float64), torch.randn(2, generator=g).double()
    one_hot = torch.eye(7, dtype=torch.float64)[[2, 5]]
    expected = reference_edm2.forward(reference, x, c_noise, one_hot, levels=2, blocks=1, head_width=64)
    ours = net.double()(x, c_noise, c_noise, Cond(label=torch.tensor([2, 5])))
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)  # the weights passed through float32
    assert notes["process"].startswith("EDM") and notes["c_noise"] == "ln(sigma)/4"


def test_missing_and_unknown_tensors_are_listed():
    state = published_edm2_weights()
    del state["unet.dec.8x8_in1.conv_res1.weight"]
    state["unet.surprise.weight"] = torch.zeros(3, 3)
    with pytest.raises(RunError, match=r"1 missing \(decoder.1.conv_res1.weight\); 1 unknown \(unet.surprise.weight\)"):
        interop.load_network(state)


def test_unknown_weights():
    with pytest.raises(UsageError, match="no project that gesso knows"):
        interop.load_network({"model.layer.weight": torch.zeros(1)})


# --- diffusers' transformers and U-Net, and the names of their originals --------------------------------------------


def diffusers_dit(heads=2, out=4):
    peer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=32 // heads, num_layers=2, sample_size=8, in_channels=4,
        out_channels=out, num_embeds_ada_norm=5, norm_eps=1e-6,
    )  # fmt: skip
    randomize_constants_(peer)
    first = peer.transformer_blocks[0].norm1.emb
    for block in peer.transformer_blocks:  # one embedder, as in DiT, at DiT's frequencies
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return peer.eval()


def diffusers_pixart(sample_size=8):
    return randomize_constants_(
        PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=sample_size, in_channels=4, out_channels=8,
            cross_attention_dim=32, caption_channels=12, norm_eps=1e-6,
        )
    ).eval()  # fmt: skip


def diffusers_sd3(qk_norm=None, dual=()):
    return randomize_constants_(
        SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12,
            pos_embed_max_size=6, qk_norm=qk_norm, dual_attention_layers=dual,
        )
    ).eval()  # fmt: skip


def diffusers_unet(sdxl: bool):
    options = dict(
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=20 + 6 * 256,
    )  # fmt: skip
    return randomize_constants_(
        UNet2DConditionModel(
            in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), attention_head_dim=4 if sdxl else 8, **(options if sdxl else {}),
        )
    ).eval()  # fmt: skip


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def assert_close(actual, expected):
    assert actual.std() > 1e-2
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


T = torch.tensor([3.0, 431.0])


@pytest.mark.parametrize("out", [4, 8])
def test_import_diffusers_dit(out):
    peer = diffusers_dit(out=out)
    net, notes = interop.load_network(peer.state_dict(), num_heads=2)
    assert net.trunk.position.base_grid == (16, 16) and net.num_classes == 5  # assumed: no name or shape tells the grid
    label, x = torch.tensor([1, 5]), randn(2, 4, 8, 8)
    expected = peer(x, timestep=T, class_labels=label).sample
    assert_close(net(x, T, T / 1000, Cond(label=label)), expected[:, :4])
    if out == 8:  # the learned variance, with which it goes back too
        assert_close(net(x, T, T / 1000, Cond(label=label), return_variance=True), expected)
        cfg, inputs, *_ = interop.detect_format(peer.state_dict(), 2)
        _, config, back = interop.to_diffusers(net, cfg, inputs)
        assert config["out_channels"] == 8 and all(back[k].equal(v) for k, v in peer.state_dict().items())
    assert "downscale_freq_shift=1" in notes["time"] and notes["process"].startswith("VP")
    assert "assumed" in notes["resolution"]
    assert ("variance" in notes) == (out == 8)


def to_original_dit_names(state):
    """A diffusers DiT under facebookresearch/DiT's names."""
    emb = "transformer_blocks.0.norm1.emb"
    local = {"y_embedder.embedding_table.weight": state[f"{emb}.class_embedder.embedding_table.weight"]}
    pairs = {
        "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear", f"{emb}.timestep_embedder.linear_1": "t_embedder.mlp.0",
        f"{emb}.timestep_embedder.linear_2": "t_embedder.mlp.2",
    }  # fmt: skip
    for i in range(2):
        reference = f"transformer_blocks.{i}"
        pairs |= {
            f"{reference}.attn1.to_out.0": f"blocks.{i}.attn.proj", f"{reference}.ff.net.0.proj": f"blocks.{i}.mlp.fc1",
            f"{reference}.ff.net.2": f"blocks.{i}.mlp.fc2", f"{reference}.norm1.linear": f"blocks.{i}.adaLN_modulation.1",
        }  # fmt: skip
        for part in ("weight", "bias"):
            qkv = [state[f"{reference}.attn1.to_{x}.{part}"] for x in "qkv"]
            local[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(qkv)
    local |= {f"{b}.{part}": state[f"{a}.{part}"] for a, b in pairs.items() for part in ("weight", "bias")}
    return local


def test_import_original_dit():
    peer = diffusers_dit(out=8)
    state = to_original_dit_names(peer.state_dict()) | {"pos_embed": peer.pos_embed.pos_embed}
    net, notes = interop.load_network(state, num_heads=2)
    assert net.trunk.position.base_grid == (4, 4) and "variance" in notes and "facebookresearch" in notes["source"]
    assert "resolution" not in notes
    label, x = torch.tensor([1, 5]), randn(2, 4, 8, 8)
    assert_close(net(x, T, T / 1000, Cond(label=label)), peer(x, timestep=T, class_labels=label).sample[:, :4])
    with pytest.raises(RunError, match="pos_embed has shape"):
        interop.load_network(state | {"pos_embed": torch.zeros(1, 15, 32)}, num_heads=2)


def test_position_table_with_another_step_raises():
    """Half precision passes, halves of steps (PixArt-alpha at 1024 pixels) do not."""
    peer = diffusers_dit()
    state = to_original_dit_names(peer.state_dict())
    interop.load_network(state | {"pos_embed": peer.pos_embed.pos_embed.bfloat16()}, num_heads=2)
    stretched = get_2d_sincos_pos_embed(32, 4, base_size=4, interpolation_scale=2).float()[None]
    with pytest.raises(RunError, match="not the sines and cosines of one step per token"):
        interop.load_network(state | {"pos_embed": stretched}, num_heads=2)


@pytest.mark.parametrize("sample_size", [8, 32])
def test_import_diffusers_pixart(sample_size):
    """At the native resolution the positions are the peer's, whether the weights tell that resolution or not."""
    peer = diffusers_pixart(sample_size)
    net, notes = interop.load_network(peer.state_dict(), num_heads=2)
    x, text = randn(2, 4, sample_size, sample_size), randn(2, 6, 12)
    expected = peer(x, text, timestep=T).sample
    assert_close(net(x, T, T / 1000, Cond(text=text)), expected[:, :4])
    assert_close(net(x, T, T / 1000, Cond(text=text), return_variance=True), expected)
    cfg, inputs, *_ = interop.detect_format(peer.state_dict(), 2)
    back = interop.to_diffusers(net, cfg, inputs)[2]
    assert all(back[k].equal(v) for k, v in peer.state_dict().items() if k in back)
    assert "sample.variance=learned" in notes["variance"] and "assumed" in notes["resolution"]
    stored = peer.state_dict() | {"pos_embed.pos_embed": peer.pos_embed.pos_embed}
    assert interop.pixart.infer_config(stored, 2)[1] == InputSpec(4, sample_size, text_dim=12)


@pytest.mark.parametrize("names", ["diffusers", "original", "told"])
@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (12, 12), (8, 24)])
def test_pixart_on_other_grids(names, grid):
    """Weights of 8x8 latents there and here, on the same other grid: positions are i base / n."""
    peer = diffusers_pixart(8)
    stored = peer.state_dict() | {"pos_embed.pos_embed": peer.pos_embed.pos_embed}
    state = {"diffusers": stored, "original": to_original_pixart_names(peer), "told": peer.state_dict()}[names]
    net, notes = interop.load_network(state, num_heads=2, resolution=8 if names == "told" else None)
    x, text = randn(2, 4, *grid), randn(2, 6, 12)
    assert_close(net(x, T, T / 1000, Cond(text=text)), peer(x, text, timestep=T).sample[:, :4])
    assert notes["positions"] == "step base/n on a grid of n tokens, as in the source" and "resolution" not in notes
    tokens = [side // 2 for side in grid]
    difference = (net.trunk.position(*tokens) - SinCosPosEmbed(32, (4, 4), "extrapolated")(*tokens)).abs().max()
    assert difference < 1e-6 if grid == (8, 8) else difference > 0.1


def to_original_pixart_names(peer):
    """A diffusers PixArt under the names of PixArt-alpha/PixArt-alpha."""
    state = peer.state_dict()
    local = {
        "pos_embed": peer.pos_embed.pos_embed, "final_layer.scale_shift_table": state["scale_shift_table"],
        "y_embedder.y_embedding": randn(120, 12),
    }  # fmt: skip
    pairs = {
        "pos_embed.proj": "x_embedder.proj", "adaln_single.linear": "t_block.1", "proj_out": "final_layer.linear",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1", "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    }  # fmt: skip
    for i in range(2):
        reference = f"transformer_blocks.{i}"
        local[f"blocks.{i}.scale_shift_table"] = state[f"{reference}.scale_shift_table"]
        pairs |= {
            f"{reference}.attn1.to_out.0": f"blocks.{i}.attn.proj", f"{reference}.ff.net.0.proj": f"blocks.{i}.mlp.fc1",
            f"{reference}.ff.net.2": f"blocks.{i}.mlp.fc2", f"{reference}.attn2.to_q": f"blocks.{i}.cross_attn.q_linear",
            f"{reference}.attn2.to_out.0": f"blocks.{i}.cross_attn.proj",
        }  # fmt: skip
        for attention, letters, stacked in (("attn1", "qkv", "attn.qkv"), ("attn2", "kv", "cross_attn.kv_linear")):
            for part in ("weight", "bias"):
                parts = [state[f"{reference}.{attention}.to_{x}.{part}"] for x in letters]
                local[f"blocks.{i}.{stacked}.{part}"] = torch.cat(parts)
    return local | {f"{b}.{part}": state[f"{a}.{part}"] for a, b in pairs.items() for part in ("weight", "bias")}


def test_import_original_pixart():
    peer = diffusers_pixart(8)
    state = to_original_pixart_names(peer)
    net, notes = interop.load_network(state, num_heads=2)
    assert net.trunk.position.base_grid == (4, 4) and "resolution" not in notes
    assert notes["source"] == "PixArt-alpha (PixArt-alpha/PixArt-alpha)" and "null caption" in notes["null"]
    x, text = randn(2, 4, 8, 8), randn(2, 6, 12)
    assert_close(net(x, T, T / 1000, Cond(text=text)), peer(x, text, timestep=T).sample[:, :4])
    with pytest.raises(UsageError, match="1024 pixels embeds sizes"):
        interop.load_network(state | {"csize_embedder.mlp.0.weight": torch.zeros(10, 256)}, num_heads=2)
    del state["blocks.1.cross_attn.kv_linear.bias"]
    with pytest.raises(RunError, match=r"1 missing \(blocks\.1\.cross\.kv\.bias\)"):
        interop.load_network(state, num_heads=2)


def test_pixart_1024_raises():
    peer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=18, num_layers=1, sample_size=128, cross_attention_dim=36,
        caption_channels=12,
    )  # fmt: skip
    with pytest.raises(UsageError, match="positions in half steps"):
        interop.load_network(peer.state_dict(), num_heads=2)


def sd3_forward(peer):
    x, text, pooled = randn(2, 4, 8, 8), randn(2, 5, 20), randn(2, 12)
    return (x, T, T / 1000, Cond(text=text, pooled=pooled)), peer(x, text, pooled, T, return_dict=False)[0]


SD3 = pytest.mark.parametrize("qk_norm, dual", [(None, ()), ("rms_norm", ()), ("rms_norm", (0, 1)), (None, (0, 1, 2))])


@SD3
def test_import_diffusers_sd3(qk_norm, dual):
    peer = diffusers_sd3(qk_norm, dual)
    net, notes = interop.load_network(peer.state_dict(), num_heads=None if qk_norm else 4)
    args, reference = sd3_forward(peer)
    assert_close(net(*args), reference)
    assert notes["process"].startswith("RF") and notes["c_noise"] == "1000*s"
    cfg, inputs = interop.sd3.infer_config(peer.state_dict(), 4)
    assert inputs == InputSpec(4, 8, text_dim=20, pooled_dim=12)
    assert (cfg.dual_attention_layers, cfg.pos_embed_max_size, cfg.separate_text_weights) == (len(dual), 6, "all")


def test_dual_attention_layers_must_come_first():
    with pytest.raises(RunError, match=r"blocks\.0\.image\.second_out\.bias"):
        interop.load_network(diffusers_sd3("rms_norm", (1,)).state_dict())


@pytest.mark.parametrize("base, side", [(4, 12), (64, 192), (5, 5), (64, 384), (1, 3)])
def test_training_grid_of_a_position_table(base, side):
    """From the step, wherever the table starts counting and in half precision."""
    for offset in (0, 2.7):
        column = (torch.arange(side, dtype=torch.float64) * base / side - offset)[None, :, None]
        omega = 1e4 ** (-torch.arange(4) / 4)
        half = torch.cat([torch.sin(column * omega), torch.cos(column * omega)], dim=2)
        table = torch.cat([half, half], dim=2).repeat(1, side, 1)
        assert interop.sd3.infer_training_grid(table) == base
    assert interop.sd3.infer_training_grid(table.half()) == base


@pytest.mark.parametrize("inputs", [InputSpec(3, 8), InputSpec(3, 8, num_classes=5), InputSpec(3, 8, text_dim=12)])
def test_dual_attention_without_pooled_text(inputs):
    """They start as no-ops; awake, every parameter of them has a gradient."""
    torch.manual_seed(0)
    net = models.build_network(
        MMDiTConfig(hidden_size=32, depth=3, num_heads=2, separate_text_weights="all", dual_attention_layers=3), inputs
    )
    cond = Cond(label=torch.tensor([1, 2])) if inputs.num_classes else Cond()
    cond = Cond(text=randn(2, 4, 12)) if inputs.text_dim else cond
    assert net(randn(2, 3, 8, 8), T, T / 1000, cond).abs().max() == 0
    randomize_constants_(net)(randn(2, 3, 8, 8), T, T / 1000, cond).square().sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if "second" in name}
    assert len(grads) == 3 * 6 and all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_invalid_dual_attention_layers():
    with pytest.raises(
        ValidationError, match=r"dual_attention_layers=1 is for SD3\.5's block: set net.separate_text_weights=all"
    ):
        MMDiTConfig(hidden_size=32, depth=3, num_heads=2, dual_attention_layers=1)
    with pytest.raises(ValidationError, match=r"dual_attention_layers=4 is more than net\.depth=3"):
        MMDiTConfig(hidden_size=32, depth=3, num_heads=2, separate_text_weights="all", dual_attention_layers=4)


def to_original_sd3_names(net):
    """Our SD3 under Stability's names."""
    renames = {
        "position.table": "pos_embed", "patch_embed.proj": "x_embedder.proj", "semantic.mlp": "context_embedder",
        "final_ada.linear": "final_layer.adaLN_modulation.1", "final.": "final_layer.linear.", "time.mlp": "t_embedder.mlp",
        "pooled.": "y_embedder.mlp.",
    }  # fmt: skip
    inner = {
        ".second_qkv.linear": "_block.attn2.qkv", ".second_qkv.q_norm": "_block.attn2.ln_q",
        ".second_qkv.k_norm": "_block.attn2.ln_k", ".second_out": "_block.attn2.proj",
        "_qkv.linear": "_block.attn.qkv", "_qkv.q_norm": "_block.attn.ln_q", "_qkv.k_norm": "_block.attn.ln_k",
        ".out": "_block.attn.proj", ".mlp.0": "_block.mlp.fc1", ".mlp.2": "_block.mlp.fc2",
        ".ada.linear": "_block.adaLN_modulation.1", ".linear": "_block.adaLN_modulation.1",
    }  # fmt: skip
    state = {}
    for name, tensor in net.state_dict().items():
        if name.startswith("blocks."):
            _, i, suffix = name.split(".", 2)
            kind = "x" if suffix.startswith("image") else "context"
            suffix = suffix.removeprefix("image").removeprefix("text")
            ours = next(a for a in inner if suffix.startswith(a))
            state[f"joint_blocks.{i}.{kind}{suffix.replace(ours, inner[ours], 1)}"] = tensor
        else:
            ours = next(a for a in renames if name.startswith(a))
            state[name.replace(ours, renames[ours], 1)] = tensor
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    return state


@SD3
def test_import_original_sd3(qk_norm, dual):
    """Taken by us and, through its own converter, by diffusers: the same function."""
    source = interop.load_network(diffusers_sd3(qk_norm, dual).state_dict(), num_heads=4)[0]
    state = to_original_sd3_names(source)
    if qk_norm:  # the published last block has a norm for text queries that reach nothing
        state["joint_blocks.2.context_block.attn.ln_q.weight"] = torch.ones(8)
    one_file = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    net, notes = interop.load_network(one_file | {"first_stage_model.x": torch.zeros(1)}, num_heads=4)
    assert "Stability" in notes["source"] and notes["ignored"].startswith("1 tensors outside")
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(state))
    peer = diffusers_sd3(qk_norm, dual)
    peer.load_state_dict(converted)
    args, reference = sd3_forward(peer)
    assert_close(net(*args), reference)


@pytest.mark.parametrize("sdxl", [False, True])
def test_import_diffusers_unet(sdxl):
    peer = diffusers_unet(sdxl)
    net, notes = interop.load_network(peer.state_dict(), num_heads=4 if sdxl else None)  # SD1.5: 8 heads
    x, text = randn(2, 4, 8, 8), randn(2, 7, 24)
    cond, extra_inputs = Cond(text=text), {}
    if sdxl:
        pooled, sizes = randn(2, 20), 64 * randn(2, 6).abs()
        cond = Cond(text=text, pooled=pooled, control_high=sizes[:, :4], control_low=sizes[:, 4:])
        extra_inputs = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    assert_close(net(x, T, T / 1000, cond), peer(x, T, text, **extra_inputs).sample)
    assert notes["source"].startswith("SDXL" if sdxl else "SD1.5") and notes["process"].startswith("VP")
    cfg = interop.unet.infer_config(peer.state_dict())[0]
    assert (cfg.num_heads, cfg.channels_per_head) == ((None, 64) if sdxl else (8, 64))


def to_compvis_names(state, levels=2, blocks=1):
    """A diffusers U-Net as CompVis' code and single files of SD1.5 and SDXL name it."""
    upsampled = {f"up_blocks.{i}.upsamplers.0.conv" for i in range(levels)}
    places = {b: a for a, b in interop.unet.compvis_block_names(levels, blocks).items() if b not in upsampled}
    for level in range(levels):
        attended = any(name.startswith(f"up_blocks.{level}.attentions") for name in state)
        last = level * (blocks + 1) + blocks
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{last}.{1 + attended}.conv"
    inner = {b: a for a, b in interop.unet.COMPVIS_RESIDUAL_NAMES.items()}
    actual = {}
    for name, tensor in state.items():
        place = max((p for p in places if name.startswith(f"{p}.")), key=len)
        suffix = name.removeprefix(place)
        if ".resnets." in place:
            _, part, kind = suffix.split(".")
            suffix = f".{inner[part]}.{kind}"
        actual[f"model.diffusion_model.{places[place]}{suffix}"] = tensor
    return actual


@pytest.mark.parametrize("sdxl", [False, True])
def test_import_single_file_unet(sdxl):
    """The names stand on diffusers' own converter, which takes them back to the peer's."""
    peer = diffusers_unet(sdxl)
    state = to_compvis_names(peer.state_dict())
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(state), dict(peer.config))
    assert back.keys() == peer.state_dict().keys()
    assert all(tensor.equal(back[name]) for name, tensor in peer.state_dict().items())
    net, notes = interop.load_network(state | {"first_stage_model.x": torch.zeros(1)}, num_heads=4)
    expected = interop.load_network(peer.state_dict(), num_heads=4)[0].state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in net.state_dict().items())
    assert notes["source"].endswith("U-Net (CompVis)")


@pytest.mark.parametrize(
    "width, depth, heads", [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16), (1536, 24, 24)]
)
def test_heads_of_known_sizes(width, depth, heads):
    assert mapping.infer_num_heads(width, depth, None) == heads


@pytest.mark.parametrize("make", [diffusers_dit, diffusers_pixart, diffusers_sd3])
def test_ambiguous_heads_require_an_argument(make):
    with pytest.raises(UsageError, match="pass num_heads="):
        interop.load_network(make().state_dict())
    with pytest.raises(UsageError, match="num_heads=5 does not fit"):
        interop.load_network(make().state_dict(), num_heads=5)


@pytest.mark.parametrize(
    "make, removed, missing",
    [
        (diffusers_dit, "proj_out_1.bias", "final_ada.linear.bias"),
        (diffusers_pixart, "transformer_blocks.1.attn2.to_out.0.bias", "blocks.1.cross.out.bias"),
        (diffusers_sd3, "transformer_blocks.0.attn.to_add_out.weight", "blocks.0.text.out.weight"),
        (lambda: diffusers_unet(False), "down_blocks.1.resnets.0.conv2.weight", "down.1.0.residual.conv1.weight"),
    ],
)
def test_missing_and_unknown_tensors_of_diffusers(make, removed, missing):
    state = make().state_dict()
    del state[removed]
    state["transformer_blocks.0.attn7.to_q.weight"] = torch.zeros(1)
    with pytest.raises(
        RunError, match=rf"1 missing \({missing}\); 1 unknown \(transformer_blocks.0.attn7.to_q.weight\)"
    ):
        interop.load_network(state, num_heads=4)


def test_missing_tensor_that_determines_the_size():
    state = diffusers_dit().state_dict()
    del state["pos_embed.proj.weight"]
    with pytest.raises(RunError, match=r"pos_embed\.proj\.weight is missing"):
        interop.load_network(state, num_heads=2)
