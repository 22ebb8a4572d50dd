"""FLOPs against hand counts, and computed sizes against published ones."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gesso.config import ControlSpec, InputSpec, MMDiTppConfig
from gesso.errors import UsageError
from gesso.models.flops import count_flops, count_operations, render_table, size_table
from gesso.models.published import PUBLISHED_MODELS

NOT_IMPLEMENTED: set[str] = set()
"""Networks that the table may skip."""

KNOWN_MISMATCHES = {
    ("a1-pixart-text", 256, "table_a1_flops"),
    ("a1-pixart-text", 512, "table_a1_flops"),  # nobody has reproduced these
    ("a1-dit-att-text", 256, "table_a1_flops"),
    ("a1-dit-att-text", 512, "table_a1_flops"),  # the paper counts cross-attention twice
    ("a1-mmdit-text", 256, "table_a1_flops"),
    ("a1-mmdit-text", 512, "table_a1_flops"),  # the paper's text seems to have no MLP
    ("a1-mmdit-class", 512, "parameters"),  # printed equal to DiT's
}


def count_with(function, *shapes) -> tuple[int, int, int]:
    """Return macs, conv_macs and elementwise FLOPs."""
    return count_operations(function, *(torch.zeros(shape, device="meta") for shape in shapes))


@pytest.mark.parametrize(
    "module, shape, macs, convolutions",
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 5, 7), 2 * 5 * 7 * 8 * 3 * 9, True),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (1, 4, 8, 8), 4 * 4 * 8 * 2 * 9, True),
        (nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), (1, 6, 5, 5), 5 * 5 * 6 * 2 * 4, True),
        (nn.Linear(6, 10), (3, 4, 6), 3 * 4 * 6 * 10, False),
        (nn.Linear(6, 10, bias=False), (5, 6), 5 * 6 * 10, False),
    ],
)
def test_macs_by_hand(module, shape, macs, convolutions):
    assert count_with(module.to("meta"), shape)[:2] == (macs, macs if convolutions else 0)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_two_matrix_products(masked):
    B, h, T, S, d = 2, 3, 5, 7, 8
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool, device="meta") if masked else None
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # noqa: E731
    assert count_with(attend, (B, h, T, d), (B, h, S, d), (B, h, S, d)) == (B * h * T * S * (d + d), 0, 0)


@pytest.mark.parametrize(
    "module, per_element",
    [
        (nn.GELU(), 1), (nn.GELU(approximate="tanh"), 1), (nn.SiLU(), 1), (nn.ReLU(), 0),
        (nn.LayerNorm(8, elementwise_affine=False), 4), (nn.LayerNorm(8), 5),
        (nn.GroupNorm(2, 4), 5), (nn.GroupNorm(2, 4, affine=False), 4),
    ],
)  # fmt: skip
def test_elementwise_of_table_a1(module, per_element):
    assert count_with(module.to("meta"), (3, 4, 8)) == (0, 0, per_element * 3 * 4 * 8)


def test_bias_of_a_convolution_counts_one_per_output():
    assert count_with(nn.Conv2d(3, 8, 3, device="meta"), (1, 3, 6, 6))[2] == 8 * 4 * 4
    assert count_with(nn.Conv2d(3, 8, 3, bias=False, device="meta"), (1, 3, 6, 6))[2] == 0


def test_full_transformer_macs():
    """mmDiT++ without conditions is DiT without its class, counted product by product."""
    d, depth, T, patch = 32, 2, 16, 2
    total = count_flops(MMDiTppConfig(hidden_size=d, depth=depth, num_heads=2, patch_size=patch), InputSpec(3, 8))
    time = 256 * d + d * d
    block = T * 12 * d * d + 6 * d * d + 2 * T * T * d
    assert total.conv_macs == T * d * 3 * patch**2
    assert total.macs == total.conv_macs + time + depth * block + 2 * d * d + T * d * 3 * patch**2
    # SiLU: time MLP, before each adaLN; GELU; LayerNorm twice a block and once at the end; bias of the patches.
    assert total.elementwise == d + (depth + 1) * d + depth * T * 4 * d + (2 * depth + 1) * 4 * T * d + T * d
    assert total.table_a1_flops == 2 * total.macs + total.elementwise


def test_count_includes_every_condition():
    """Text tokens, pooled text and control each add; the tokens linearly and in attention."""
    cfg = MMDiTppConfig(hidden_size=32, depth=2, num_heads=2)
    bare = count_flops(cfg, InputSpec(3, 8)).macs
    text = [count_flops(cfg, InputSpec(3, 8, text_dim=6), tokens).macs for tokens in (4, 8)]
    control = count_flops(cfg, InputSpec(3, 8, control=ControlSpec(num_high=2, num_low=1))).macs
    assert bare < text[0] < text[1]
    assert control - bare == (2 * 256 + 32) * 32 + (256 + 32) * 32


@pytest.fixture(scope="module")
def rows():
    return size_table()


def test_all_published_networks_are_implemented(rows):
    assert {row.net for row in rows if row.computed is None} <= NOT_IMPLEMENTED
    assert all(row.note == "not built" and not row.within_tolerance for row in rows if row.computed is None)


def test_published_sizes_match(rows):
    """All but the listed cells match; those must differ, so that the list stays valid."""
    built = [row for row in rows if row.computed is not None]
    missed = {(row.model, row.pixels, row.quantity) for row in built if not row.within_tolerance}
    assert missed == {key for key in KNOWN_MISMATCHES if key[0] in {row.model for row in built}}


def test_edm2_sizes_are_exact(rows):
    """The macs are below the published Gflops by weight normalization and less than 1 % of other operations."""
    edm2_rows = [row for row in rows if row.net == "edm2"]
    exact = [row for row in edm2_rows if row.quantity == "parameters"]
    assert len(exact) == 7 and all(row.computed == row.published for row in exact)
    parameters = {row.model: row.computed for row in exact}
    for row in edm2_rows:
        if row.quantity == "macs":
            # A norm, a division and a product per weight (EDM2 D.5), the rest elementwise on activations.
            with_normalization = row.computed + 3 * parameters[row.model]
            assert 0.99 * (row.published - 0.5e9) < with_normalization < row.published + 0.5e9
    convolutions = next(row for row in edm2_rows if row.quantity == "conv_macs")
    assert convolutions.computed == pytest.approx(545.50e9, rel=1e-4)


def test_rows_are_consistent(rows):
    assert [row.model for row in rows] == [p.name for p in PUBLISHED_MODELS for _ in p.numbers]
    for row in rows:
        assert 0.98 <= row.low <= row.high <= 1.01
        if row.computed is not None:
            assert row.ratio == row.computed / row.published
    assert len({p.name for p in PUBLISHED_MODELS}) == len(PUBLISHED_MODELS)
    json.dumps([row._asdict() for row in rows], allow_nan=False)


def test_model_names_match_by_prefix():
    assert {row.model for row in size_table(["edm2-xl"])} == {"edm2-xl"}
    assert {row.model for row in size_table(["edm2-xs", "edm2-xx"])} == {"edm2-xs", "edm2-xxs", "edm2-xxl"}
    with pytest.raises(UsageError, match="did you mean edm2-xxl"):
        size_table(["edm2-xxxl"])


def test_rendered_table_lists_mismatches(rows):
    text = render_table(rows)
    assert text.isascii() and all(line == line.rstrip() for line in text.splitlines())
    row = next(row for row in rows if row.model == "edm2-s" and row.quantity == "parameters")
    assert "not met" not in render_table([row])
    missed = row._replace(computed=2 * row.computed, ratio=2.0, within_tolerance=False)
    text = render_table([missed])
    assert "NO" in text and "not met: edm2-s 512 parameters: ratio 2.0000, 1 to 1 allowed" in text
