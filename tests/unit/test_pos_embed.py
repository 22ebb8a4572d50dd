"""Sine-cosine positions: three settings against formulas in numpy, on square and other grids."""

import itertools

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from helpers.network_cases import randomize_constants_
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gesso import models, recipes
from gesso.conditioning import Cond
from gesso.config import (
    DiTAttConfig,
    DiTConfig,
    InputSpec,
    MDTConfig,
    MMDiTConfig,
    MMDiTppConfig,
    MPDiTConfig,
    MPMMDiTppConfig,
    PixArtConfig,
)
from gesso.errors import UsageError
from gesso.models.embeddings import SinCosPosEmbed

D = 16
SIDES = st.integers(1, 12)
SHAPE = {"hidden_size": 32, "depth": 2, "num_heads": 2}
MODES = ["resampled", "extrapolated", "interpolated", "proportional"]
CONFIGS = {
    "dit": DiTConfig,
    "dit-att": DiTAttConfig,
    "pixart": PixArtConfig,
    "mmdit": MMDiTConfig,
    "mmdit++": MMDiTppConfig,
    "mp-dit": MPDiTConfig,
    "mp-mmdit++": MPMMDiTppConfig,
}


def reference_token(row: float, column: float, width: int = D) -> list[float]:
    """Return one token, channel by channel."""
    n = width // 4
    omega = [1 / 10000 ** (i / n) for i in range(n)]
    return [f(place * o) for place in (column, row) for f in (np.sin, np.cos) for o in omega]


def reference_table(rows, columns, width: int = D) -> np.ndarray:
    """Return the table (h w, D) of tokens at these positions, row by row."""
    return np.array([reference_token(row, column, width) for row in rows for column in columns])


def compute_table(mode: str, base: tuple[int, int], h: int, w: int) -> np.ndarray:
    matches = SinCosPosEmbed(D, base, mode)(h, w)
    assert matches.shape == (1, h * w, D) and matches.dtype == torch.float32
    return matches[0].numpy()


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES)
def test_resampled(bh, bw, h, w):
    """Pseudocode 1: from 0 to the training grid's side on every grid, so n/(n-1) apart on the training grid."""
    rows, columns = (np.arange(n) * (base / max(n - 1, 1)) for n, base in ((h, bh), (w, bw)))
    np.testing.assert_allclose(compute_table("resampled", (bh, bw), h, w), reference_table(rows, columns), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES)
def test_extrapolated(bh, bw, h, w):
    """One step per token whatever the grid."""
    np.testing.assert_allclose(
        compute_table("extrapolated", (bh, bw), h, w), reference_table(range(h), range(w)), atol=1e-6
    )


def cubic_resize(square: np.ndarray, n: int) -> np.ndarray:
    """Resize axis 0 (m, ...) to n bicubically: Keys' kernel with a = -3/4, half-pixel centres, edges repeated."""
    m, a = len(square), -0.75
    out = []
    for i in range(n):
        at = (i + 0.5) * m / n - 0.5
        first = int(np.floor(at)) - 1
        total = 0
        for j in range(first, first + 4):
            t = abs(at - j)
            near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
            total = total + (near if t <= 1 else far) * square[min(max(j, 0), m - 1)]
        out.append(total)
    return np.array(out)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES)
def test_interpolated(bh, bw, h, w):
    """Return the extrapolated table of the training grid, resized in both directions."""
    square = reference_table(range(bh), range(bw)).reshape(bh, bw, D)
    expected = cubic_resize(cubic_resize(square, h).swapaxes(0, 1), w).swapaxes(0, 1)
    np.testing.assert_allclose(compute_table("interpolated", (bh, bw), h, w), expected.reshape(h * w, D), atol=2e-5)


def test_interpolated_equals_extrapolated_only_on_the_training_grid():
    for h, w, same in [(4, 6, True), (6, 4, False), (8, 12, False), (2, 3, False)]:
        near = (
            np.abs(compute_table("interpolated", (4, 6), h, w) - compute_table("extrapolated", (4, 6), h, w)).max() == 0
        )
        assert near == same


def test_modes_differ_on_the_training_grid():
    """Pseudocode 1's off-by-one: its last token is at n, DiT's at n - 1."""
    resampled, extrapolated = (compute_table(p, (4, 4), 4, 4)[-1] for p in ("resampled", "extrapolated"))
    np.testing.assert_allclose(resampled, reference_token(4, 4), atol=1e-6)
    np.testing.assert_allclose(extrapolated, reference_token(3, 3), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES)
def test_proportional(bh, bw, h, w):
    """Step base/n on every grid."""
    rows, columns = (np.arange(n) * base / n for n, base in ((h, bh), (w, bw)))
    np.testing.assert_allclose(compute_table("proportional", (bh, bw), h, w), reference_table(rows, columns), atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (6, 6), (3, 9), (16, 5)])
def test_proportional_is_diffusers_table_on_every_grid(grid):
    expected = get_2d_sincos_pos_embed(D, grid, base_size=4, output_type="pt").float().numpy()
    np.testing.assert_allclose(compute_table("proportional", (4, 4), *grid), expected, atol=1e-6, rtol=0)


def test_extrapolated_from_a_resampled_source_keeps_its_tokens():
    """The source grid has step g/(g-1) (Pseudocode 1); a larger grid with n/(n-1) moves tokens by up to .51."""
    for base, g, n in [(8, 8, 16), (8, 16, 24), (16, 16, 8), (5, 7, 11)]:
        source = SinCosPosEmbed(D, (base, base), "resampled", (g, g))
        moved = SinCosPosEmbed(D, (base, base), "resampled", (n, n), (g, g))
        m = min(g, n)
        expected, actual = (p(k, k)[0].unflatten(0, (k, k))[:m, :m] for p, k in ((source, g), (moved, n)))
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
        places = np.arange(n) * base / (g - 1)
        np.testing.assert_allclose(moved(n, n)[0].numpy(), reference_table(places, places), atol=1e-6)
        coords = np.arange(n + 3) * base / (g - 1)  # and so on every grid
        np.testing.assert_allclose(moved(n, n + 3)[0].numpy(), reference_table(places, coords), atol=1e-6)
    plain = SinCosPosEmbed(D, (16, 16), "resampled")(16, 16)[0].unflatten(0, (16, 16))[:8, :8]
    source = SinCosPosEmbed(D, (8, 8), "resampled")(8, 8)[0].unflatten(0, (8, 8))
    assert (plain - source).abs().max() > 0.5


def test_interpolated_from_a_resampled_source_is_its_table_resized():
    base, g, n = 8, 8, 16
    moved = SinCosPosEmbed(D, (base, base), "interpolated", (n, n), (g, g))
    source = SinCosPosEmbed(D, (base, base), "resampled", (g, g))(g, g)
    assert moved(g, g).equal(source)
    square = source[0].numpy().astype(np.float64).reshape(g, g, D)
    expected = cubic_resize(cubic_resize(square, n).swapaxes(0, 1), n).swapaxes(0, 1)
    np.testing.assert_allclose(moved(n, n)[0].numpy(), expected.reshape(n * n, D), atol=2e-5)


@pytest.mark.parametrize("side", [1, 4, 7])
def test_extrapolated_is_diffusers_table_at_its_native_grid(side):
    expected = get_2d_sincos_pos_embed(D, side, base_size=side, output_type="pt").float().numpy()
    assert np.array_equal(compute_table("extrapolated", (16, 16), side, side), expected)


# --- In the networks ------------------------------------------------------------------------------------------------


def find_pos_embed(net) -> SinCosPosEmbed:
    matches = [module for module in net.modules() if isinstance(module, SinCosPosEmbed)]
    assert len(matches) == 1
    return matches[0]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("positions", MODES)
def test_every_network_has_pos_embed(name, positions):
    torch.manual_seed(0)
    net = randomize_constants_(
        models.build_network(CONFIGS[name](**SHAPE, pos_embed=positions), InputSpec(3, 8, num_classes=5))
    )
    module = find_pos_embed(net)
    assert (module.base_grid, module.mode) == ((4, 4), positions)
    assert not any("position" in key for key in net.state_dict())
    cond, t = Cond(label=torch.tensor([1, 2])), torch.tensor([0.3, 0.7])
    for h, w in [(8, 8), (8, 12), (16, 4)]:
        out = net(torch.randn(2, 3, h, w), t, t, cond)
        assert out.shape == (2, 3, h, w) and out.isfinite().all() and out.std() > 1e-3


@pytest.mark.parametrize("name", list(CONFIGS))
def test_pos_embed_mode_changes_the_output(name):
    """Same weights, four settings: four functions on another grid, two on the training grid."""
    outs = {}
    for positions in MODES:
        torch.manual_seed(0)
        net = randomize_constants_(
            models.build_network(CONFIGS[name](**SHAPE, pos_embed=positions), InputSpec(3, 8, num_classes=5))
        )
        torch.manual_seed(1)
        cond, t = Cond(label=torch.tensor([1])), torch.tensor([0.3])
        outs[positions] = [net(torch.randn(1, 3, n, n), t, t, cond) for n in (8, 12)]
    first, second, third, fourth = outs.values()
    assert second[0].equal(third[0]) and second[0].equal(fourth[0])
    assert (first[0] - second[0]).abs().max() > 1e-3
    for a, b in itertools.combinations([first[1], second[1], third[1], fourth[1]], 2):
        assert (a - b).abs().max() > 1e-3


def test_default_is_resampled():
    assert {kind(**SHAPE).pos_embed for kind in CONFIGS.values()} == {"resampled"}


@pytest.mark.parametrize("positions", MODES[1:])
def test_networks_with_other_positions_reject_the_setting(positions):
    with pytest.raises(ValidationError, match=f"={positions} is not for mdt, which learns its positions"):
        MDTConfig(hidden_size=32, depth=6, num_heads=2, decoder_layers=2, pos_embed=positions)
    with pytest.raises(ValidationError, match="=8 uses SD3's position table"):
        MMDiTConfig(**SHAPE, pos_embed_max_size=8, pos_embed=positions)
    with pytest.raises(ValidationError, match="resampled"):
        DiTConfig(**SHAPE, pos_embed="stretched")


# --- Weights from another resolution: positions counted on that one's grid ------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("positions", MODES)
def test_positions_of_another_base_grid(name, positions):
    """A network for 16 pixels with positions of 8 equals the network for 8 pixels on every grid."""
    at = InputSpec(3, 8, num_classes=5)
    nets_ = []
    for inputs in (at, at._replace(resolution=16, pos_embed_base=8), at._replace(resolution=16)):
        torch.manual_seed(0)
        nets_.append(randomize_constants_(models.build_network(CONFIGS[name](**SHAPE, pos_embed=positions), inputs)))
    small, moved, large = nets_
    module = find_pos_embed(moved)
    assert (module.base_grid, module.grid, module.table.shape[1]) == ((4, 4), (8, 8), 64)
    cond, t = Cond(label=torch.tensor([1])), torch.tensor([0.3])
    for h, w in [(8, 8), (16, 16), (12, 20)]:
        x = torch.randn(1, 3, h, w)
        assert moved(x, t, t, cond).equal(small(x, t, t, cond))
    x = torch.randn(1, 3, 16, 16)
    difference = (moved(x, t, t, cond) - large(x, t, t, cond)).abs().max()
    assert difference == 0 if positions == "extrapolated" else difference > 1e-3


def test_resampled_from_another_grid_is_pseudocode_1():
    """base_size = grid_size // scale; linspace(0, base_size, grid_size)."""
    grid, scale = 8, 2
    places = np.linspace(0, grid // scale, grid)
    matches = SinCosPosEmbed(D, (grid // scale,) * 2, "resampled", (grid, grid))(grid, grid)[0].numpy()
    np.testing.assert_allclose(matches, reference_table(places, places), atol=1e-6)


def test_pos_embed_base_in_a_run():
    def run(*arguments, name="digits"):
        return recipes.resolve(name, ["data.resolution=16", "eval.toy_metrics=none", *arguments])[0]

    assert run().input_spec.pos_embed_base is None and run("net.pos_embed_base=8").input_spec.pos_embed_base == 8
    latents = ["latent.vae=x", "data.channels=3", "data.resolution=64", "net.pos_embed_base=32"]
    assert run(*latents).input_spec.pos_embed_base == 4
    for arguments, message in [
        (["net.pos_embed_base=9"], "net.pos_embed_base=9 is not a multiple of 2"),
        ([*latents, "net.pos_embed_base=40"], "net.pos_embed_base=40 is not a multiple of 16"),
        (["net.name=mdt", "net.pos_embed_base=8"], "not for mdt"),
        (["net.name=mmdit", "net.pos_embed_max_size=16", "net.pos_embed_base=8"], "leave .* out"),
        (["net.name=edm2", "net.pos_embed_base=8"], "no such setting"),
        (["net.pos_embed_span=9"], "net.pos_embed_span=9 is not a multiple of 2"),
        (["net.pos_embed_span=8", "net.pos_embed=proportional"], "pos_embed_span is not for .*=proportional"),
        (["net.name=mmdit", "net.pos_embed_max_size=16", "net.pos_embed_span=8"], "leave pos_embed_span out"),
    ]:
        with pytest.raises(UsageError, match=message):
            run(*arguments)
