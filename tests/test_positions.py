"""Sine-cosine positions: three settings against formulas in numpy, on square and other grids."""

import itertools

import numpy as np
import pytest
import torch
from conftest import awake
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gesso import nets, recipes
from gesso.cond import Cond
from gesso.config import MDT, DiT, DiTAtt, Inputs, MMDiT, MMDiTpp, MPDiT, MPMMDiTpp, PixArt
from gesso.errors import UsageError
from gesso.nets.embed import GridPosition

D = 16
SIDES = st.integers(1, 12)
SHAPE = {"width": 32, "depth": 2, "heads": 2}
SETTINGS = ["resampled", "extrapolated", "interpolated", "proportional"]
CONFIGS = {
    "dit": DiT, "dit-att": DiTAtt, "pixart": PixArt, "mmdit": MMDiT, "mmdit++": MMDiTpp, "mp-dit": MPDiT,
    "mp-mmdit++": MPMMDiTpp,
}  # fmt: skip


def waves(row: float, column: float, width: int = D) -> list[float]:
    """One token, channel by channel."""
    n = width // 4
    omega = [1 / 10000 ** (i / n) for i in range(n)]
    return [f(place * o) for place in (column, row) for f in (np.sin, np.cos) for o in omega]


def table(rows, columns, width: int = D) -> np.ndarray:
    """(h w, D) of tokens at these places, row by row."""
    return np.array([waves(row, column, width) for row in rows for column in columns])


def made(positions: str, base: tuple[int, int], h: int, w: int) -> np.ndarray:
    found = GridPosition(D, base, positions)(h, w)
    assert found.shape == (1, h * w, D) and found.dtype == torch.float32
    return found[0].numpy()


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES)
def test_resampled(bh, bw, h, w):
    """Pseudocode 1: from 0 to the training grid's side on every grid, so n/(n-1) apart on the training grid."""
    rows, columns = (np.arange(n) * (base / max(n - 1, 1)) for n, base in ((h, bh), (w, bw)))
    np.testing.assert_allclose(made("resampled", (bh, bw), h, w), table(rows, columns), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES)
def test_extrapolated(bh, bw, h, w):
    """One step per token whatever the grid."""
    np.testing.assert_allclose(made("extrapolated", (bh, bw), h, w), table(range(h), range(w)), atol=1e-6)


def cubic(square: np.ndarray, n: int) -> np.ndarray:
    """Bicubic resizing of axis 0 (m, ...) to n: Keys' kernel with a = -3/4, half-pixel centres, edges repeated."""
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
    """The extrapolated table of the training grid, resized in both directions."""
    square = table(range(bh), range(bw)).reshape(bh, bw, D)
    wanted = cubic(cubic(square, h).swapaxes(0, 1), w).swapaxes(0, 1)
    np.testing.assert_allclose(made("interpolated", (bh, bw), h, w), wanted.reshape(h * w, D), atol=2e-5)


def test_interpolated_equals_extrapolated_on_the_training_grid_alone():
    for h, w, same in [(4, 6, True), (6, 4, False), (8, 12, False), (2, 3, False)]:
        near = np.abs(made("interpolated", (4, 6), h, w) - made("extrapolated", (4, 6), h, w)).max() == 0
        assert near == same


def test_the_three_differ_on_the_training_grid():
    """Pseudocode 1's off-by-one: its last token is at n, DiT's at n - 1."""
    resampled, extrapolated = (made(p, (4, 4), 4, 4)[-1] for p in ("resampled", "extrapolated"))
    np.testing.assert_allclose(resampled, waves(4, 4), atol=1e-6)
    np.testing.assert_allclose(extrapolated, waves(3, 3), atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(SIDES, SIDES, SIDES, SIDES)
def test_proportional(bh, bw, h, w):
    """Step base/n on every grid."""
    rows, columns = (np.arange(n) * base / n for n, base in ((h, bh), (w, bw)))
    np.testing.assert_allclose(made("proportional", (bh, bw), h, w), table(rows, columns), atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (6, 6), (3, 9), (16, 5)])
def test_proportional_is_diffusers_table_on_every_grid(grid):
    theirs = get_2d_sincos_pos_embed(D, grid, base_size=4, output_type="pt").float().numpy()
    np.testing.assert_allclose(made("proportional", (4, 4), *grid), theirs, atol=1e-6, rtol=0)


def test_extrapolated_from_a_resampled_source_keeps_its_tokens():
    """Pseudocode 1 has step g/(g-1) on the grid of the source; a larger grid with n/(n-1) moves its tokens by up to .51."""
    for base, g, n in [(8, 8, 16), (8, 16, 24), (16, 16, 8), (5, 7, 11)]:
        source = GridPosition(D, (base, base), "resampled", (g, g))
        moved = GridPosition(D, (base, base), "resampled", (n, n), (g, g))
        m = min(g, n)
        theirs, ours = (p(k, k)[0].unflatten(0, (k, k))[:m, :m] for p, k in ((source, g), (moved, n)))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        places = np.arange(n) * base / (g - 1)
        np.testing.assert_allclose(moved(n, n)[0].numpy(), table(places, places), atol=1e-6)
        other = np.arange(n + 3) * base / (g - 1)  # and so on every grid
        np.testing.assert_allclose(moved(n, n + 3)[0].numpy(), table(places, other), atol=1e-6)
    plain = GridPosition(D, (16, 16), "resampled")(16, 16)[0].unflatten(0, (16, 16))[:8, :8]
    source = GridPosition(D, (8, 8), "resampled")(8, 8)[0].unflatten(0, (8, 8))
    assert (plain - source).abs().max() > 0.5


def test_interpolated_from_a_resampled_source_is_its_table_resized():
    base, g, n = 8, 8, 16
    moved = GridPosition(D, (base, base), "interpolated", (n, n), (g, g))
    source = GridPosition(D, (base, base), "resampled", (g, g))(g, g)
    assert moved(g, g).equal(source)
    square = source[0].numpy().astype(np.float64).reshape(g, g, D)
    wanted = cubic(cubic(square, n).swapaxes(0, 1), n).swapaxes(0, 1)
    np.testing.assert_allclose(moved(n, n)[0].numpy(), wanted.reshape(n * n, D), atol=2e-5)


@pytest.mark.parametrize("side", [1, 4, 7])
def test_extrapolated_is_diffusers_table_at_its_native_grid(side):
    theirs = get_2d_sincos_pos_embed(D, side, base_size=side, output_type="pt").float().numpy()
    assert np.array_equal(made("extrapolated", (16, 16), side, side), theirs)


# --- In the networks ------------------------------------------------------------------------------------------------


def position_of(net) -> GridPosition:
    found = [module for module in net.modules() if isinstance(module, GridPosition)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("positions", SETTINGS)
def test_every_network_has_the_setting(name, positions):
    torch.manual_seed(0)
    net = awake(nets.build(CONFIGS[name](**SHAPE, positions=positions), Inputs(3, 8, num_classes=5)))
    module = position_of(net)
    assert (module.base, module.positions) == ((4, 4), positions)
    assert not any("position" in key for key in net.state_dict())
    cond, t = Cond(label=torch.tensor([1, 2])), torch.tensor([0.3, 0.7])
    for h, w in [(8, 8), (8, 12), (16, 4)]:
        out = net(torch.randn(2, 3, h, w), t, t, cond)
        assert out.shape == (2, 3, h, w) and out.isfinite().all() and out.std() > 1e-3


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_setting_reaches_the_output(name):
    """Same weights, four settings: four functions on another grid, two on the training grid."""
    outs = {}
    for positions in SETTINGS:
        torch.manual_seed(0)
        net = awake(nets.build(CONFIGS[name](**SHAPE, positions=positions), Inputs(3, 8, num_classes=5)))
        torch.manual_seed(1)
        cond, t = Cond(label=torch.tensor([1])), torch.tensor([0.3])
        outs[positions] = [net(torch.randn(1, 3, n, n), t, t, cond) for n in (8, 12)]
    first, second, third, fourth = outs.values()
    assert second[0].equal(third[0]) and second[0].equal(fourth[0])
    assert (first[0] - second[0]).abs().max() > 1e-3
    for a, b in itertools.combinations([first[1], second[1], third[1], fourth[1]], 2):
        assert (a - b).abs().max() > 1e-3


def test_default_is_resampled():
    assert {kind(**SHAPE).positions for kind in CONFIGS.values()} == {"resampled"}


@pytest.mark.parametrize("positions", SETTINGS[1:])
def test_networks_with_positions_of_their_own_refuse_it(positions):
    with pytest.raises(ValidationError, match=f"positions={positions} is not for mdt, which learns its positions"):
        MDT(width=32, depth=6, heads=2, decoder=2, positions=positions)
    with pytest.raises(ValidationError, match=f"max_grid=8 has positions of its own, not {positions}"):
        MMDiT(**SHAPE, max_grid=8, positions=positions)
    with pytest.raises(ValidationError, match="resampled"):
        DiT(**SHAPE, positions="stretched")


# --- Weights from another resolution: positions counted on that one's grid ------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("positions", SETTINGS)
def test_counted_on_another_grid(name, positions):
    """A network for 16 pixels with positions of 8 is the network for 8 at 16: on every grid, and its own is kept."""
    at = Inputs(3, 8, num_classes=5)
    nets_ = []
    for inputs in (at, at._replace(resolution=16, positions_at=8), at._replace(resolution=16)):
        torch.manual_seed(0)
        nets_.append(awake(nets.build(CONFIGS[name](**SHAPE, positions=positions), inputs)))
    small, moved, large = nets_
    module = position_of(moved)
    assert (module.base, module.grid, module.table.shape[1]) == ((4, 4), (8, 8), 64)
    cond, t = Cond(label=torch.tensor([1])), torch.tensor([0.3])
    for h, w in [(8, 8), (16, 16), (12, 20)]:
        x = torch.randn(1, 3, h, w)
        assert moved(x, t, t, cond).equal(small(x, t, t, cond))
    x = torch.randn(1, 3, 16, 16)
    apart = (moved(x, t, t, cond) - large(x, t, t, cond)).abs().max()
    assert apart == 0 if positions == "extrapolated" else apart > 1e-3


def test_resampled_from_another_grid_is_pseudocode_1():
    """base_size = grid_size // scale; linspace(0, base_size, grid_size)."""
    grid, scale = 8, 2
    places = np.linspace(0, grid // scale, grid)
    found = GridPosition(D, (grid // scale,) * 2, "resampled", (grid, grid))(grid, grid)[0].numpy()
    np.testing.assert_allclose(found, table(places, places), atol=1e-6)


def test_the_setting_in_a_run():
    def run(*arguments, name="digits"):
        return recipes.resolve(name, ["data.resolution=16", "eval.features=none", *arguments])[0]

    assert run().inputs.positions_at is None and run("net.positions_at=8").inputs.positions_at == 8
    latents = ["latent.vae=x", "data.channels=3", "data.resolution=64", "net.positions_at=32"]
    assert run(*latents).inputs.positions_at == 4
    for arguments, words in [
        (["net.positions_at=9"], "net.positions_at=9 is not a multiple of 2"),
        ([*latents, "net.positions_at=40"], "net.positions_at=40 is not a multiple of 16"),
        (["net.name=mdt", "net.positions_at=8"], "positions_at is not for mdt"),
        (["net.name=mmdit", "net.max_grid=16", "net.positions_at=8"], "leave positions_at out"),
        (["net.name=edm2", "net.positions_at=8"], "no such setting"),
        (["net.positions_span=9"], "net.positions_span=9 is not a multiple of 2"),
        (["net.positions_span=8", "net.positions=proportional"], "positions_span is not for positions=proportional"),
        (["net.name=mmdit", "net.max_grid=16", "net.positions_span=8"], "leave positions_span out"),
    ]:
        with pytest.raises(UsageError, match=words):
            run(*arguments)
