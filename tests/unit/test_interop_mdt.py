"""MDTv2 under its own names: the function of its public code, written here from its description, on its tensors."""

import pytest
import torch
import torch.nn.functional as F

from gesso import interop, models
from gesso.conditioning import Cond
from gesso.config import InputSpec, MDTConfig
from gesso.errors import RunError, UsageError

D, HEADS, SIDE, HALVES, DECODER, CLASSES, CHANNELS = 32, 2, 4, 2, 1, 5, 4


def published_weights(sigma: bool = True) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of sail-sg/MDT."""
    g = torch.Generator().manual_seed(0)
    state = {}

    def layer(name, n_out, *n_in):
        state[f"{name}.weight"] = torch.randn(n_out, *n_in, generator=g) * 0.15
        state[f"{name}.bias"] = torch.randn(n_out, generator=g) * 0.15

    layer("x_embedder.proj", D, CHANNELS, 2, 2)
    layer("t_embedder.mlp.0", D, 256)
    layer("t_embedder.mlp.2", D, D)
    layer("final_layer.linear", 4 * CHANNELS * (1 + sigma), D)
    layer("final_layer.adaLN_modulation.1", 2 * D, D)
    state["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, D, generator=g)
    for name in ("pos_embed", "decoder_pos_embed"):
        state[name] = torch.randn(1, SIDE**2, D, generator=g)
    state["mask_token"] = torch.randn(1, 1, D, generator=g)
    for side, n in (("en_inblocks", HALVES), ("en_outblocks", HALVES), ("de_blocks", DECODER), ("sideblocks", 1)):
        for i in range(n):
            block = f"{side}.{i}"
            shapes = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
            shapes |= {"adaLN_modulation.1": (6 * D, D)}
            shapes |= {"skip_linear": (D, 2 * D)} if side in ("en_outblocks", "de_blocks") else {}
            for name, (n_out, n_in) in shapes.items():
                layer(f"{block}.{name}", n_out, n_in)
            bias = f"{block}.attn.rel_pos_bias"
            rows = (2 * SIDE - 1) ** 2 + 3
            state[f"{bias}.relative_position_bias_table"] = torch.randn(rows, HEADS, generator=g)
            state[f"{bias}.relative_position_index"] = torch.zeros(SIDE**2, SIDE**2, dtype=torch.int64)
    return state


def reference_forward(w, x, t, label):
    """Its sampling pass, in the order of its description."""
    dense = lambda name, y: F.linear(y, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    modulated = lambda y, shift, scale: F.layer_norm(y, (D,), eps=1e-6) * (1 + scale) + shift  # noqa: E731

    def block(name, y, c, skip=None):
        if skip is not None:
            y = dense(f"{name}.skip_linear", torch.cat([y, skip], dim=2))
        ada = dense(f"{name}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, dim=2)
        q, k, v = dense(f"{name}.attn.qkv", modulated(y, *ada[:2])).chunk(3, dim=2)
        table, attended = w[f"{name}.attn.rel_pos_bias.relative_position_bias_table"], []
        for h in range(HEADS):
            part = slice(h * D // HEADS, (h + 1) * D // HEADS)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / (D // HEADS) ** 0.5
            for a in range(SIDE**2):
                for b in range(SIDE**2):
                    rows, columns = a // SIDE - b // SIDE + SIDE - 1, a % SIDE - b % SIDE + SIDE - 1
                    logits[:, a, b] += table[rows * (2 * SIDE - 1) + columns, h]
            attended.append(logits.softmax(2) @ v[..., part])
        y = y + ada[2] * dense(f"{name}.attn.proj", torch.cat(attended, dim=2))
        hidden = F.gelu(dense(f"{name}.mlp.fc1", modulated(y, ada[3], ada[4])), approximate="tanh")
        return y + ada[5] * dense(f"{name}.mlp.fc2", hidden)

    angle = t[:, None] * 1e4 ** (-torch.arange(128, dtype=t.dtype) / 128)
    time = dense("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))
    c = dense("t_embedder.mlp.2", F.silu(time)) + w["y_embedder.embedding_table.weight"][label]
    patches = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    first = y = patches.flatten(2).transpose(1, 2) + w["pos_embed"]
    skips = []
    for i in range(HALVES):
        y = block(f"en_inblocks.{i}", y, c)
        skips.append(y)
    for i in range(HALVES):
        y = block(f"en_outblocks.{i}", y, c, skips.pop())
    y = y + w["decoder_pos_embed"]
    for i in range(DECODER):
        y = block(f"de_blocks.{i}", y, c, first)
    shift, scale = dense("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=2)
    out = dense("final_layer.linear", modulated(y, shift, scale)).unflatten(1, (SIDE, SIDE)).unflatten(3, (2, 2, -1))
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, 2 * SIDE, 2 * SIDE)[:, :CHANNELS]


@pytest.mark.parametrize("sigma", [True, False])
def test_import_original_mdt(sigma):
    state = published_weights(sigma)
    net, notes = interop.load_network(state)
    assert notes["source"] == "MDTv2 (sail-sg/MDT)" and ("variance" in notes) == sigma
    x, t = torch.randn(2, CHANNELS, 8, 8, dtype=torch.float64), torch.tensor([3.0, 700.0]).double()
    label = torch.tensor([1, CLASSES])
    expected = reference_forward({k: v.double() for k, v in state.items()}, x, t, label)
    output = net.double()(x, t, t / 1000, Cond(label=label))
    assert output.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_settings_of_mdt():
    """Heads come from the relative biases: none are asked for, others are refused."""
    cfg, inputs = interop.mdt.infer_config(published_weights())
    assert cfg == MDTConfig(
        hidden_size=D, depth=5, num_heads=HEADS, decoder_layers=DECODER, class_embed="table", learned_variance=True
    )
    assert inputs == InputSpec(CHANNELS, 8, CLASSES)
    with pytest.raises(UsageError, match="num_heads=4 does not fit the network: by its relative biases it has 2"):
        interop.load_network(published_weights(), num_heads=4)


def test_missing_and_unknown_tensors_of_mdt():
    state = published_weights() | {"register": torch.zeros(1)}
    del state["sideblocks.0.mlp.fc2.bias"]
    with pytest.raises(RunError, match=r"1 missing \(side\.block\.mlp\.2\.bias\); 1 unknown \(register\)"):
        interop.load_network(state)
    with pytest.raises(RunError, match=r"pos_embed has shape \(1, 15, 32\), not \(1, side"):
        interop.load_network(published_weights() | {"pos_embed": torch.zeros(1, 15, D)})


def test_published_size_of_mdt():
    """742.26 M of the public code, learned sigma and all (4 x 4 rows of the last layer)."""
    with torch.device("meta"):
        net = models.build_network(
            MDTConfig(hidden_size=1152, depth=28, num_heads=16, class_embed="table"), InputSpec(4, 32, 1000)
        )
    assert (sum(p.numel() for p in net.parameters()) + 16 * 1153) / 1e6 == pytest.approx(742.26, abs=0.005)
