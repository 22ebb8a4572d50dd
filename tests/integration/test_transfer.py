"""Transfer of weights to other data sets, conditions and resolutions: every network against the expected functions."""

import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.distributed import FLOAT64_TRAINING, MMDIT_SETTINGS, launch, snapshot_weights
from helpers.network_cases import NetworkCase, example_batch, randomize_constants_
from helpers.transfer_cases import (
    NETS,
    ON_SPHERE,
    SEMANTIC_KINDS,
    U_NETS,
    accepts,
    load_source,
    make_run,
    random_weights,
    transfer_to,
    write_snapshot,
)
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from gesso import config, interop, models, recipes, snapshot
from gesso.cli import app
from gesso.conditioning import Cond
from gesso.config import (
    ControlConfig,
    DiTConfig,
    EDMConfig,
    InputSpec,
    MMDiTConfig,
    PixArtConfig,
    RFConfig,
    SampleConfig,
    UNetConfig,
    VPConfig,
)
from gesso.diffusion import process as processes
from gesso.errors import GessoError, RunError, StoppedError, UsageError
from gesso.sampling import guidance_scale
from gesso.training import init_source, loop, transfer, transfer_config
from gesso.training.run_folder import open_dataset_for_run, start_training
from gesso.training.trainer import Trainer

QUIET = Console(quiet=True)
TRANSFORMERS = [name for name in NETS if name not in U_NETS]
CASES = [(name, kind) for name in NETS for kind in SEMANTIC_KINDS if accepts(name, kind)]
# Of EDM2's ladder those whose layers are of different kinds: free, with a channel of ones, on the sphere.
FEW = [name for name in NETS if name not in ("ladder B", "ladder D", "ladder E", "ladder F")]


def inputs_of(run, size=None):
    """x, c_noise, progress and conditions of three samples."""
    size = size or (run.input_spec.resolution,) * 2
    return example_batch(NetworkCase(run.net, run.input_spec, False), size)


@torch.no_grad()
def F_of(denoiser, run, x=None, cond=None, size=None) -> Tensor:
    given, c_noise, progress, recorded = inputs_of(run, size)
    return denoiser.net(given if x is None else x, c_noise, progress, recorded if cond is None else cond)


def kinds(notes: list[str]) -> dict[str, str]:
    """What an account says, by its first word."""
    return {line.split()[0]: line.partition(line.split()[0])[2].strip() for line in notes[1:]}


# --- The same data and resolution -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", CASES)
def test_the_same_function_at_equal_resolution_and_data(tmp_path, name, kind):
    """Denoiser and weights, with control where the network takes it, from another seed's initial weights."""
    variables = ("flip", "size") if "control" in NETS[name].accepts else ()
    run = make_run(name, kind, variables=variables)
    path = write_snapshot(tmp_path, run)
    new, denoiser, output = transfer_to(make_run(name, kind, variables=variables, seed=1, source=str(path)))
    source = load_source(path)
    x, _, _, cond = inputs_of(run)
    s = denoiser.process.icdf(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    with torch.no_grad():
        assert (denoiser(x, s, cond) - source(x, s, cond)).abs().max() < 1e-12
    # A table of the training grid that is no parameter apart, all tensors are those of the source.
    state, wanted = denoiser.net.state_dict(), source.net.state_dict()
    assert state.keys() == wanted.keys() and all((state[k] - wanted[k]).abs().max() < 1e-12 for k in state)
    actual = kinds(output)
    assert actual["copied"].startswith(f"{len(state)} tensors, {sum(v.numel() for v in state.values()):,} parameters")
    assert (
        (actual["adapted"], actual["initialized"]) == ("none", "none")
        and "unused" not in actual
        and "changed" not in actual
    )
    assert (new.process.resolution_scale, new.pos_embed_base, new.init.nimg, new.init.sigma_rel) == (
        1.0,
        None,
        640,
        0.1,
    )


# --- Another resolution: positions ------------------------------------------------------------------------------------


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def tokens_up(x: Tensor) -> Tensor:
    """Every 2 x 2 patch four times."""
    patches = F.pixel_unshuffle(x, 2)
    return F.pixel_shuffle(up(patches), 2)


def flat_patches(run) -> Tensor:
    """(3, C, R, R), one value in each patch of 2 x 2: its double has the same patches, each four times."""
    R = run.input_spec.resolution // 2
    g = torch.Generator().manual_seed(3)
    return up(torch.randn(3, run.input_spec.channels, R, R, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("name, kind", [case for case in CASES if case[0] in FEW and case[1] != "text"])
def test_at_twice_the_resolution_it_is_the_source_on_the_larger_grid(tmp_path, name, kind):
    """Resampled: positions and tables are those that the source's own network has there, for every network."""
    path = write_snapshot(tmp_path, make_run(name, kind))
    run, denoiser, output = transfer_to(make_run(name, kind, 32, seed=1, source=str(path)))
    if name == "mmdit SD3":  # whose own network there goes on with its step
        run, denoiser, output = transfer_to(
            make_run(name, kind, 32, seed=1, source=str(path), pos_embed="extrapolated")
        )
    source = load_source(path)
    assert (F_of(denoiser, run) - F_of(source, run)).abs().max() < 1e-10
    assert kinds(output)["resolution"] == "16 -> 32 pixels (k = 2)"
    by_setting = name in TRANSFORMERS and name not in ("mdt", "mmdit SD3")
    assert run.pos_embed_base == (16 if by_setting else None)
    assert kinds(output)["initialized"] == "none"


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n not in ("mdt", "mmdit SD3")])
def test_tokens_are_at_most_half_a_step_from_where_the_source_had_them(tmp_path, name):
    """i g/(g-1) there; 2i g/(2g-1) and (2i+1) g/(2g-1) here: at most g/(2g-1) apart."""
    path = write_snapshot(tmp_path, make_run(name))
    _, denoiser, _ = transfer_to(make_run(name, "none", 32, source=str(path)))
    module = next(m for m in denoiser.net.modules() if type(m).__name__ == "SinCosPosEmbed")
    g = 8
    assert (module.base_grid, module.grid) == ((g, g), (2 * g, 2 * g))
    target_coords = torch.linspace(0, module.base_grid[0], 2 * g, dtype=torch.float64)
    source_coords = torch.linspace(0, g, g, dtype=torch.float64).repeat_interleave(2)
    assert (target_coords - source_coords).abs().max() == pytest.approx(g / (2 * g - 1), rel=1e-12)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_with_the_same_positions_the_double_is_the_same_function(tmp_path, name):
    """Attention does not change if every key is repeated four times, and no other layer depends on their number.

    So all that a change of resolution does to an image of flat patches, it does by positions.
    """
    path = write_snapshot(tmp_path, make_run(name))
    run, denoiser, _ = transfer_to(make_run(name, "none", 32, source=str(path)))
    source = load_source(path)
    four_times(denoiser.net, source.net)
    x = flat_patches(make_run(name))
    small, large = F_of(source, make_run(name), x), F_of(denoiser, run, up(x))
    assert small.std() > 1e-2 and (large - tokens_up(small)).abs().max() < 1e-10


def four_times(net, source) -> None:
    """Give every token of the doubled grid the position of the source's."""
    for module, source_module in zip(net.modules(), source.modules(), strict=True):
        match type(module).__name__:
            case "SinCosPosEmbed" | "LearnedPosEmbed":
                square = source_module.table.detach().unflatten(1, (8, 8)).permute(0, 3, 1, 2)
                module.table.data = up(square).flatten(2).transpose(1, 2)
            case "CroppedPosEmbed":
                local = source_module(8, 8).unflatten(1, (8, 8)).permute(0, 3, 1, 2)
                module.table[:, 2:18, 2:18] = up(local).permute(0, 2, 3, 1)
            case "RelativePositionBias":  # offsets of 16 tokens have no place in offsets of 8: with none they are equal
                module.table.data.zero_()
                source_module.table.data.zero_()


def test_text_tokens_too_must_stand_there_four_times(tmp_path):
    """In joint attention k^2 times the image tokens leave the text 1/k^2 of its share, unless text is repeated too."""
    for name in ("mmdit++", "mmdit++ all", "mp-mmdit++", "mmdit all"):
        path = write_snapshot(tmp_path, make_run(name, "text"))
        run, denoiser, _ = transfer_to(make_run(name, "text", 32, source=str(path)))
        source = load_source(path)
        four_times(denoiser.net, source.net)
        small_run = make_run(name, "text")
        x, cond = flat_patches(small_run), inputs_of(small_run)[3]
        small = tokens_up(F_of(source, small_run, x, cond))
        once = F_of(denoiser, run, up(x), cond)
        copies = Cond(text=cond.text.repeat(1, 4, 1), text_mask=cond.text_mask.repeat(1, 4), pooled=cond.pooled)
        assert (F_of(denoiser, run, up(x), copies) - small).abs().max() < 1e-10
        assert (once - small).abs().max() > 1e-4


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_resampled_stays_close_and_extrapolated_does_not(tmp_path, name):
    """Resampled positions are close on an image of flat patches and its double, extrapolated ones are not.

    With random weights: within 15 % resampled (each token less than .54 steps from its place), at least 2.5 times as
    far extrapolated (up to 8 steps).
    """
    path = write_snapshot(tmp_path, make_run(name))
    x, far = flat_patches(make_run(name)), {}
    small = tokens_up(F_of(load_source(path), make_run(name), x))
    for pos_embed in ("resampled", "extrapolated"):
        run, denoiser, _ = transfer_to(make_run(name, "none", 32, source=str(path), pos_embed=pos_embed))
        far[pos_embed] = float((F_of(denoiser, run, up(x)) - small).norm() / small.norm())
    assert 1e-3 < far["resampled"] < 0.15 and far["extrapolated"] > 2.5 * far["resampled"], far


@pytest.mark.parametrize("name", ["edm2", "ladder A"])
def test_a_u_net_differs_by_the_edges_alone(tmp_path, name):
    """A U-Net on one flat colour differs from the source along the edges only.

    No weight of it depends on the resolution, and its convolutions see other frequencies. The share of the edges in the
    norm falls by the root of 2 with every doubling.
    """
    path = write_snapshot(tmp_path, make_run(name))
    source, far = load_source(path), {}
    for R in (16, 32):
        g = torch.Generator().manual_seed(3)
        x = torch.randn(3, 3, 1, 1, generator=g, dtype=torch.float64).expand(3, 3, R, R)
        small, large = F_of(source, make_run(name), x), F_of(source, make_run(name), up(x))
        far[R] = float((large - up(small)).norm() / large.norm())
    # How far depends on the random weights (.60 for ladder A); that it falls does not.
    assert far[32] < 0.65 and far[32] / far[16] == pytest.approx(0.5**0.5, rel=0.02), far


def test_tables_of_positions():
    """Learned tables at other grids agree with slow loops; extrapolated ones keep the source's and add new ones."""
    g, n, D = 3, 5, 4
    torch.manual_seed(0)
    old, fresh = torch.randn(1, g * g, D), torch.randn(1, n * n, D)
    created = transfer.resize_pos_embed(old, fresh, g, n, "resampled").view(n, n, D)
    square = old.view(g, g, D)
    for i in range(n):
        for j in range(n):
            y, x = i * (g - 1) / (n - 1), j * (g - 1) / (n - 1)
            y0, x0 = min(int(y), g - 2), min(int(x), g - 2)
            a, b = y - y0, x - x0
            wanted = (1 - a) * (1 - b) * square[y0, x0] + (1 - a) * b * square[y0, x0 + 1]
            wanted = wanted + a * (1 - b) * square[y0 + 1, x0] + a * b * square[y0 + 1, x0 + 1]
            assert torch.allclose(created[i, j], wanted, atol=1e-6)
    beyond = transfer.resize_pos_embed(old, fresh, g, n, "extrapolated").view(n, n, D)
    assert beyond[:g, :g].equal(square) and beyond[g:].equal(fresh.view(n, n, D)[g:])
    smaller = transfer.resize_pos_embed(fresh, old, n, g, "extrapolated").view(g, g, D)
    assert smaller.equal(fresh.view(n, n, D)[:g, :g])


def test_tables_of_relative_biases():
    g, n, h = 3, 5, 2
    torch.manual_seed(0)
    old, fresh = torch.randn((2 * g - 1) ** 2 + 3, h), torch.randn((2 * n - 1) ** 2 + 3, h)
    side, old_side = 2 * n - 1, 2 * g - 1
    created = transfer.resize_relative_bias(old, fresh, g, n, "resampled")
    at = lambda t, s, dy, dx, half: t[: s * s].view(s, s, h)[dy + half, dx + half]  # noqa: E731
    for dy, dx in [(0, 0), (4, 4), (-4, 2), (2, -2)]:  # offsets that fall on the source's
        assert torch.allclose(at(created, side, dy, dx, n - 1), at(old, old_side, dy // 2, dx // 2, g - 1), atol=1e-6)
    assert created[-3:].equal(old[-3:]) and len(created) == side**2 + 3
    beyond = transfer.resize_relative_bias(old, fresh, g, n, "extrapolated")
    for dy, dx in [(0, 0), (2, -2), (-1, 1)]:
        assert at(beyond, side, dy, dx, n - 1).equal(at(old, old_side, dy, dx, g - 1))
    assert at(beyond, side, 3, 0, n - 1).equal(at(fresh, side, 3, 0, n - 1))


@pytest.mark.parametrize("side", [20, 30])
def test_sd3s_table_puts_the_corners_of_the_new_grid_on_the_sources(side):
    """The buffer has sines and cosines of the position that each token has in the source's table."""
    g, n, m, D = 8, 16, 20, 16
    table = lambda coords: torch.cat([coords[:, None].sin(), coords[:, None].cos()], 1)  # noqa: E731
    old = torch.arange(m, dtype=torch.float64)[None, :, None, None].expand(1, m, m, D).clone()  # its row
    created = transfer.resize_cropped_pos_embed(old, side, g, n, "resampled")
    top = (side - n) // 2
    assert created.shape == (1, side, side, D) and table(created[0, :, 0, 0]).isfinite().all()
    rows = created[0, top : top + n, 0, 0]
    assert torch.allclose(rows, torch.linspace(6, 13, n, dtype=torch.float64))
    stored = transfer.resize_cropped_pos_embed(old, side, g, n, "extrapolated")[0, :, 0, 0]
    first = (m - side) // 2
    assert stored.equal((torch.arange(side, dtype=torch.float64) + first).clamp(0, m - 1))


# --- Another resolution: noise and guidance ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "process", [EDMConfig(), VPConfig(), VPConfig(prediction="v"), RFConfig()], ids=["edm", "vp", "vp v", "rf"]
)
def test_noise_by_proposition_1(tmp_path, process):
    """MATH.md's row "at k times the resolution": k^2 looks at a patch under k times the noise tell what one did."""
    path = write_snapshot(tmp_path, make_run("mmdit++", process=process))
    k = 2
    run, _, output = transfer_to(make_run("mmdit++", "none", 32, process=process, source=str(path)))
    assert (
        run.process == process.model_copy(update={"resolution_scale": 2.0})
        and "process.resolution_scale=2" in kinds(output)["noise"]
    )
    small, large = processes.build_process(process), processes.build_process(run.process)
    u = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    s, S = small.icdf(u), large.icdf(u)
    sigma, Sigma = s / small.alpha(s), S / large.alpha(S)
    assert torch.allclose(Sigma, k * sigma, rtol=1e-9)
    assert torch.allclose(large.progress(S), small.progress(s), atol=1e-9)
    if isinstance(process, RFConfig):  # as SD3: it sees the shifted level
        assert torch.allclose(large.c_noise(S, "sinusoidal"), 1000 * (k * s / (1 + (k - 1) * s)))
    else:
        for embedding in ("sinusoidal", "fourier"):
            recorded = small.c_noise(s, embedding)
            assert torch.allclose(large.c_noise(S, embedding), recorded, atol=1e-8 * float(recorded.abs().max()))
    # abar' = s^2 abar / (s'^2 + abar (s^2 - s'^2)), Eq. 3, in sigma^2 = (1 - abar) / abar
    abar = 1 / (1 + sigma**2)
    assert torch.allclose(1 / (1 + Sigma**2), abar / (k**2 + abar * (1 - k**2)), rtol=1e-9)


def test_three_switches_and_what_they_settle(tmp_path):
    """Figure 8: each alone, recorded in the run and said."""
    path = write_snapshot(tmp_path, make_run("mmdit++", "label", sample=SampleConfig(guidance=1.5)))
    guided = {"source": str(path), "sample": SampleConfig(guidance=1.5)}
    run, _, output = transfer_to(make_run("mmdit++", "label", 32, **guided))
    assert (run.pos_embed_base, run.process.resolution_scale, run.sample.guidance_base_resolution) == (16, 2.0, 16)
    assert guidance_scale(run) == pytest.approx(2.0)  # Prop. 2: 1 + 2 (1.5 - 1)
    assert kinds(output)["positions"].startswith("resampled") and kinds(output)["noise"].startswith("scale")
    run, _, output = transfer_to(make_run("mmdit++", "label", 32, pos_embed="extrapolated", **guided))
    assert (run.pos_embed_base, run.net.pos_embed_span, run.process.resolution_scale) == (16, 16, 2.0)
    assert "extrapolated" in kinds(output)["positions"]
    run, _, output = transfer_to(make_run("mmdit++", "label", 32, noise_levels="keep", **guided))
    assert (run.pos_embed_base, run.process.resolution_scale) == (16, 1.0) and "keep" in kinds(output)["noise"]
    other_guidance = {"source": str(path), "sample": SampleConfig(guidance=3.0)}
    run, _, output = transfer_to(make_run("mmdit++", "label", 32, **other_guidance))  # a number of its own
    assert run.sample.guidance_base_resolution is None and "as configured" in kinds(output)["guidance"]
    local = {"source": str(path), "sample": SampleConfig(guidance=1.5, guidance_base_resolution=32)}
    assert transfer_to(make_run("mmdit++", "label", 32, **local))[0].sample.guidance_base_resolution == 32


def test_twice_is_four_times_and_back(tmp_path):
    """From 16 to 32 to 64 and to 16 again: positions stay on the first grid, noise goes with the resolution."""
    path = write_snapshot(tmp_path, make_run("mmdit++"))
    for i, (resolution, scale) in enumerate([(32, 2), (64, 4), (64, 4), (16, 1)]):
        run, denoiser, _ = transfer_to(make_run("mmdit++", "none", resolution, source=str(path)))
        assert (run.pos_embed_base, run.process.resolution_scale) == (None if resolution == 16 else 16, scale)
        path = tmp_path / f"{i}.safetensors"
        snapshot.write(path, denoiser.net.state_dict(), 10, snapshot.PowerProfile(0.1), run)
    assert (F_of(denoiser, run) - F_of(load_source(tmp_path / "source.safetensors"), run)).abs().max() < 1e-12


def grid_of(denoiser) -> torch.Tensor:
    """(h, w, D) positions of the training grid."""
    module = next(m for m in denoiser.net.modules() if type(m).__name__ == "SinCosPosEmbed")
    return module(*module.grid)[0].unflatten(0, module.grid)


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n not in ("mdt", "mmdit SD3")])
def test_extrapolated_leaves_the_sources_tokens_where_they_are(tmp_path, name):
    """At 2 and 4 times the resolution, from 16 directly and by way of 32: the first 8 x 8 tokens are the source's."""
    path = write_snapshot(tmp_path, make_run(name))
    source_grid, actual = grid_of(load_source(path)), {}
    for resolutions in ((32,), (64,), (32, 64), (32, 16)):
        source = path
        for resolution in resolutions:
            run, denoiser, _ = transfer_to(
                make_run(name, "none", resolution, source=str(source), pos_embed="extrapolated")
            )
            source = tmp_path / f"{resolution}.safetensors"
            snapshot.write(source, denoiser.net.state_dict(), 10, snapshot.PowerProfile(0.1), run)
        actual[resolutions] = grid_of(denoiser)
        assert (actual[resolutions][:8, :8] - source_grid).abs().max() < 1e-6
    assert (actual[32, 64] - actual[64,]).abs().max() < 1e-6


def positions_of(name: str, positions: str, **options):
    return NETS[name].model_copy(update={"pos_embed": positions} | options)


def test_bicubic_positions_are_the_sources_table_resized(tmp_path):
    """Figure 4: net.pos_embed=interpolated on weights of resampled positions; a run that goes on finds the same."""
    path = write_snapshot(tmp_path, make_run("mmdit++"))
    new = make_run("mmdit++", "none", 32, source=str(path), net=positions_of("mmdit++", "interpolated"))
    run, denoiser, output = transfer_to(new)
    assert (run.pos_embed_base, run.net.pos_embed_span) == (16, 16) and "interpolated" in kinds(output)["positions"]
    square = grid_of(load_source(path)).permute(2, 0, 1)[None]
    wanted = F.interpolate(square, size=(16, 16), mode="bicubic")[0].permute(1, 2, 0)
    assert (grid_of(denoiser) - wanted).abs().max() < 1e-6
    assert transfer_config.restore_recorded_settings(new, run).net.pos_embed_span == 16


def test_proportional_positions_on_the_way_to_another_resolution(tmp_path):
    """Resampled: from 0 to the source's side, step g/n. Extrapolated: the source's step."""
    path = write_snapshot(tmp_path, make_run("pixart", net=positions_of("pixart", "proportional")))
    source_grid = grid_of(load_source(path))
    for pos_embed, at in (("resampled", 16), ("extrapolated", None)):
        net = positions_of("pixart", "proportional")
        run, denoiser, _ = transfer_to(make_run("pixart", "none", 32, source=str(path), pos_embed=pos_embed, net=net))
        assert (run.pos_embed_base, run.net.pos_embed_span) == (at, None)
        target_grid = grid_of(denoiser)
        same = target_grid[::2, ::2] if pos_embed == "resampled" else target_grid[:8, :8]
        assert (same - source_grid).abs().max() < 1e-6


@pytest.mark.parametrize("old, new, words", [
    ("resampled", "interpolated",
    "needs the spacing of the source's net.pos_embed=resampled, which net.pos_embed=interpolated"),
    ("resampled", "proportional", "set net.pos_embed=resampled or init.pos_embed=resampled"),
    ("extrapolated", "resampled", "set net.pos_embed=extrapolated or init.pos_embed=resampled"),
])  # fmt: skip
def test_steps_that_a_network_cannot_keep_are_refused(tmp_path, old, new, words):
    path = write_snapshot(tmp_path, make_run("mmdit++", net=positions_of("mmdit++", old)))
    with pytest.raises(UsageError, match=words):
        transfer_to(
            make_run(
                "mmdit++", "none", 32, source=str(path), pos_embed="extrapolated", net=positions_of("mmdit++", new)
            )
        )


def test_an_extrapolated_source_is_not_resampled(tmp_path):
    path = write_snapshot(tmp_path, make_run("mmdit++"))
    run, denoiser, _ = transfer_to(make_run("mmdit++", "none", 32, source=str(path), pos_embed="extrapolated"))
    source = tmp_path / "32.safetensors"
    snapshot.write(source, denoiser.net.state_dict(), 10, snapshot.PowerProfile(0.1), run)
    again, same, _ = transfer_to(
        make_run("mmdit++", "none", 32, source=str(source))
    )  # at its own resolution it stays as it is
    assert again.net.pos_embed_span == 16 and grid_of(same).equal(grid_of(denoiser))
    with pytest.raises(UsageError, match=r"was itself trained with init\.pos_embed=extrapolated"):
        transfer_to(make_run("mmdit++", "none", 64, source=str(source)))


def test_pretraining_crops_are_reported(tmp_path):
    source_run = make_run("mmdit++")
    source_run = source_run.model_copy(update={"data": source_run.data.model_copy(update={"crop_scale": (0.4, 0.6)})})
    _, _, output = transfer_to(make_run("mmdit++", "none", 32, source=str(write_snapshot(tmp_path, source_run))))
    assert kinds(output)["crops"] == "data.crop_scale (0.4, 0.6) -> null"


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"process": EDMConfig(resolution_scale=3)},
            "process.resolution_scale=3, but init.noise_levels=scale requires 2",
        ),
        (
            {"process": EDMConfig(resolution_scale=2), "noise_levels": "keep"},
            "process.resolution_scale=2, but init.noise_levels=keep requires 1",
        ),
        (
            {"net": NETS["mmdit++"].model_copy(update={"pos_embed_base": 8})},
            "net.pos_embed_base=8, but init.pos_embed=",
        ),
        (
            {"net": NETS["mmdit++"].model_copy(update={"pos_embed": "extrapolated"})},
            "set init.pos_embed=extrapolated or net.pos_embed=resampled",
        ),
        ({"resolution": 8}, "init.resolution=8, but"),
    ],
)
def test_what_the_user_says_otherwise_is_refused(tmp_path, options, words):
    path = write_snapshot(tmp_path, make_run("mmdit++"))
    resolution = options.pop("resolution", None)
    run = make_run("mmdit++", "none", 32, source=str(path), **options)
    if resolution:
        run = run.model_copy(update={"init": run.init.model_copy(update={"resolution": resolution})})
    with pytest.raises(UsageError, match=words):
        transfer_to(run)


# --- Another data set: classes ----------------------------------------------------------------------------------------


def outputs(denoiser, run, labels: list[int | None]) -> Tensor:
    """F of one image under each label; None: withheld."""
    x, c_noise, progress, _ = inputs_of(run)
    n = len(labels)
    cond = Cond(
        label=torch.tensor([0 if v is None else v for v in labels]),
        has_semantic=torch.tensor([v is not None for v in labels]),
    )
    with torch.no_grad():
        return denoiser.net(x[:1].expand(n, -1, -1, -1), c_noise[:1].expand(n), progress[:1].expand(n), cond)


LABELLED = [name for name in [*FEW, "ladder D"] if accepts(name, "label")]


@pytest.mark.parametrize("name", LABELLED)
def test_classes_in_another_order_by_name(tmp_path, name):
    path = write_snapshot(tmp_path, make_run(name, "label"))
    run, denoiser, output = transfer_to(make_run(name, "label", classes=("c", "a", "b"), source=str(path)))
    source = load_source(path)
    assert run.init.class_mapping == (2, 0, 1)
    wanted = outputs(source, run, [2, 0, 1, None])
    assert (outputs(denoiser, run, [0, 1, 2, None]) - wanted).abs().max() < 1e-10
    assert (wanted[0] - wanted[1]).abs().max() > 1e-4
    assert "3 of 3 classes copied" in kinds(output)["adapted"]


@pytest.mark.parametrize("name", LABELLED)
def test_more_classes_some_of_them_new(tmp_path, name):
    """Mapped classes are exact (on the sphere but for the length of rows); new ones start as the null class."""
    path = write_snapshot(tmp_path, make_run(name, "label"))
    classes = ("new", "b", "other", "a")
    run, denoiser, output = transfer_to(make_run(name, "label", classes=classes, source=str(path)))
    source = load_source(path)
    assert run.init.class_mapping == (None, 1, None, 0)
    actual, wanted = outputs(denoiser, run, [1, 3, None, 0, 2]), outputs(source, run, [1, 0, None, None, None])
    if name not in ON_SPHERE:
        assert (actual[:3] - wanted[:3]).abs().max() < 1e-10
    else:
        assert "rows times" in kinds(output)["adapted"] or name == "ladder D"
        has_null = name.startswith("mp-")
        assert has_null or (actual[2] - wanted[2]).abs().max() < 1e-10
    if not name.startswith(("edm2", "ladder")):
        assert (actual[3:] - actual[2]).abs().max() < 1e-12
    else:
        assert (actual[3:] - actual[2]).abs().min(0).values.max() > 1e-4  # random: its null class is a vector of zeros
    assert "2 of 4 classes copied" in kinds(output)["adapted"] and "new, other" in kinds(output)["adapted"]


@pytest.mark.parametrize("name, axis, table", [("edm2", 1, "emb_label.weight"), ("mp-dit", 1, "label.linear.weight")])
def test_columns_on_the_sphere_keep_their_direction(tmp_path, name, axis, table):
    """Each row of a class layer has rms 1 over the classes: of others it is another factor for each, which is told."""
    path = write_snapshot(tmp_path, make_run(name, "label", classes=tuple("abcdef")))
    _, denoiser, output = transfer_to(make_run(name, "label", classes=("f", "c"), source=str(path)))
    old, new = load_source(path).net.state_dict()[table], denoiser.net.state_dict()[table]
    assert torch.allclose(new.square().mean(1), torch.ones(len(new), dtype=torch.float64))
    ratio = new[:, :2] / old[:, [5, 2]]
    assert torch.allclose(ratio[:, 0], ratio[:, 1])
    low, high = (float(v) for v in kinds(output)["adapted"].split("rows times ")[1].split(",")[0].split(" to "))
    assert (low, high) == pytest.approx((float(ratio.min()), float(ratio.max())), rel=5e-3)


def test_ways_to_map_classes(tmp_path):
    path = write_snapshot(tmp_path, make_run("dit", "label", classes=("a", "b", "c", "d")))
    table = load_source(path).net.state_dict()["table.weight"]
    maps = {"m.json": '{"x": "d", "y": null, "b": "a"}', "m.yaml": "x: d\ny: null\nb: a\n"}
    for name, text in maps.items():
        (tmp_path / name).write_text(text)
    cases = {
        None: (None, None, 1),
        "names": (None, None, 1),
        "index": (0, 1, 2),
        "random": (None, None, None),
        **{str(tmp_path / name): (3, None, 0) for name in maps},
    }
    for mapping, rows in cases.items():
        run, denoiser, _ = transfer_to(
            make_run("dit", "label", classes=("x", "y", "b"), source=str(path), labels=mapping)
        )
        assert run.init.class_mapping == rows
        created = denoiser.net.state_dict()["table.weight"]
        assert created[3].equal(table[4])  # null stays null
        for row, source_row in zip(created, rows, strict=False):
            is_null = bool(row.equal(table[4]))
            assert row.equal(table[source_row]) if source_row is not None else is_null == (mapping != "random")
    # Without names on one side classes go by number.
    run, _, _ = transfer_to(make_run("dit", "label", classes=("x", "y", "b"), source=str(path)).model_copy())
    nameless = make_run("dit", "label", source=str(path))
    data = nameless.data.model_copy(update={"class_names": None, "num_classes": 5})
    assert transfer_to(nameless.model_copy(update={"data": data}))[0].init.class_mapping == (0, 1, 2, 3, None)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{x: a, y: b, b: e}", "the source has no class 'e'; there are: a, b, c, d"),
        ("{x: a, y: b, bb: c}", "this run has no class 'bb'; (did you mean|there are)"),
        ("{x: a}", r"omits 2 of 3 classes \(y, b\)"),
        ("[a, b]", "contains no mapping"),
        ("{", "neither JSON nor YAML"),
        (None, "neither names, index, random nor an existing file"),
    ],
)
def test_maps_that_do_not_fit(tmp_path, text, words):
    path = write_snapshot(tmp_path, make_run("dit", "label", classes=("a", "b", "c", "d")))
    if text:
        (tmp_path / "m.yaml").write_text(text)
    run = make_run("dit", "label", classes=("x", "y", "b"), source=str(path), labels=str(tmp_path / "m.yaml"))
    with pytest.raises(UsageError, match=words):
        transfer_to(run)


def test_a_map_is_needed_once(tmp_path):
    """Its rows are in run.yaml: the run can be trained again without the file."""
    path, mapping = write_snapshot(tmp_path, make_run("dit", "label")), tmp_path / "m.json"
    mapping.write_text('{"a": "c", "b": null, "c": "a"}')
    run, denoiser, _ = transfer_to(make_run("dit", "label", source=str(path), labels=str(mapping)))
    mapping.unlink()
    again, same, _ = transfer_to(config.validate(config.to_dict(run)))
    assert again == run and same.net.state_dict()["table.weight"].equal(denoiser.net.state_dict()["table.weight"])


def test_pooled_text_that_shares_its_mlp_with_control(tmp_path):
    net = NETS["unet"].model_copy(update={"pooled_mlp": "shared"})
    joint = ControlConfig(variables=("flip", "size"), mlp="joint", schedule="uniform")
    source_run = make_run("unet", "text", net=net).model_copy(update={"control": joint})
    path = write_snapshot(tmp_path, source_run)
    for variables, fresh in ((("flip", "size"), False), (("aspect", "size"), True)):
        target_run = make_run("unet", "text", net=net, source=str(path), seed=1)
        target_run = target_run.model_copy(update={"control": joint.model_copy(update={"variables": variables})})
        assert (
            "pooled text (variables aspect, in the source flip)" in kinds(transfer_to(target_run)[2])["initialized"]
        ) == fresh


def test_labels_where_there_are_none(tmp_path):
    path = write_snapshot(tmp_path, make_run("dit"))
    with pytest.raises(UsageError, match=r"init\.labels=index: the source has no classes"):
        transfer_to(make_run("dit", "label", source=str(path), labels="index"))
    with pytest.raises(UsageError, match="this run has no classes"):
        transfer_to(make_run("dit", source=str(path), labels="names"))


# --- Another condition ------------------------------------------------------------------------------------------------

BOTH = [name for name in NETS if accepts(name, "text")]


@pytest.mark.parametrize("name", BOTH)
def test_class_to_text_and_back(tmp_path, name):
    """What stands behind the condition is the source's in both; its class table is not."""
    path = write_snapshot(tmp_path, make_run(name, "label"))
    run, denoiser, output = transfer_to(make_run(name, "text", source=str(path), seed=1))
    old, new = load_source(path).net.state_dict(), denoiser.net.state_dict()
    same = {
        k
        for k in new.keys() & old.keys()
        if new[k].shape == old[k].shape and torch.allclose(new[k], old[k], rtol=1e-12)
    }
    ada = "blocks.0.ada.linear.weight" if name == "dit-att" else None
    behind = {k for k in new if k.startswith(("blocks.", "down.", "up.", "middle.", "trunk.", "final", "patch"))} - {
        ada
    }
    if name == "dit-att":
        behind = {k for k in behind if ".cross." not in k and ".ada." not in k}
    elif name == "unet":  # whose context is as wide in both by a setting
        assert {k for k in behind if "cross_attention" in k} <= same
    assert behind and behind <= same, sorted(behind - same)[:5]
    fresh = kinds(output)["initialized"]
    readers = {
        "mp-mmdit++": "text.linear",
        "pixart": "semantic.mlp.0",
        "unet": "semantic.mlp.0",
        "dit-att": "semantic.mlp.0",
    }
    assert readers.get(name, "semantic.mlp") in fresh and "semantic.kind label -> text" in kinds(output)["changed"]
    assert "label.linear" in kinds(output)["unused"] or "semantic.table" in kinds(output)["unused"]

    again = tmp_path / "text.safetensors"
    snapshot.write(again, new, 640, snapshot.PowerProfile(0.1), run)
    _, back, output = transfer_to(make_run(name, "label", source=str(again), seed=2))
    state = back.net.state_dict()
    assert behind & state.keys() <= {k for k in state if k in old and torch.allclose(state[k], old[k], rtol=1e-12)}
    table = next(k for k in state if k.endswith("table.weight") or k == "label.linear.weight")
    assert not state[table].equal(old[table]) and (
        "table" in kinds(output)["initialized"] or "label" in kinds(output)["initialized"]
    )


def test_the_layer_that_reads_is_fresh_even_where_it_fits(tmp_path):
    """A class table as wide as the text tokens: the MLP's first matrix has one shape for both, and another meaning."""
    net = NETS["pixart"].model_copy(update={"hidden_size": 12, "num_heads": 1})
    path = write_snapshot(tmp_path, make_run("pixart", "label", net=net))
    _, denoiser, output = transfer_to(make_run("pixart", "text", net=net, source=str(path), seed=1))
    old, new = load_source(path).net.state_dict(), denoiser.net.state_dict()
    assert new["semantic.mlp.2.weight"].equal(old["semantic.mlp.2.weight"])
    assert new["semantic.mlp.0.weight"].shape == old["semantic.mlp.0.weight"].shape
    assert not new["semantic.mlp.0.weight"].equal(old["semantic.mlp.0.weight"])
    assert "semantic.mlp.0 (reads text, in the source classes)" in kinds(output)["initialized"]


@pytest.mark.parametrize(
    "name, kind", [("dit-att", "label"), ("dit-att", "text"), ("pixart", "label"), ("pixart", "text")]
)
def test_a_condition_that_is_new_changes_nothing_at_first(tmp_path, name, kind):
    """The new attention is closed: DiT's by its gate, PixArt's by its last layer."""
    path = write_snapshot(tmp_path, make_run(name))
    run, denoiser, output = transfer_to(make_run(name, kind, source=str(path), seed=1))
    x, _, _, cond = inputs_of(run)
    wanted, actual = F_of(load_source(path), make_run(name), x, Cond()), F_of(denoiser, run, x, cond)
    if name == "dit-att" and kind == "label":  # one token more to attend to
        assert 1e-6 < (actual - wanted).abs().max() / wanted.abs().max() < 1
        assert "attention and MLP copied, the condition's modulation initialized" in kinds(output)["adapted"]
    else:
        assert (actual - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("name", [name for name in NETS if "control" in NETS[name].accepts])
def test_control_variables_that_are_others_add_nothing(tmp_path, name):
    """Of the same number as well: aspect in the place of flip."""
    path = write_snapshot(tmp_path, make_run(name, variables=("flip", "size")))
    run, denoiser, output = transfer_to(make_run(name, variables=("aspect", "size"), source=str(path), seed=1))
    cond_ = inputs_of(run)[3]
    absent = F_of(denoiser, run, cond=Cond())
    assert (absent - F_of(load_source(path), run, cond=Cond())).abs().max() < 1e-12
    assert "aspect, in the source flip" in kinds(output)["initialized"]
    if accepts(name, "text"):  # and with text, pooled too, which has an MLP of its own
        path = write_snapshot(tmp_path, make_run(name, "text", variables=("flip", "size")))
        other_output = transfer_to(make_run(name, "text", variables=("aspect", "size"), source=str(path)))[2]
        assert "pooled" not in kinds(other_output)["initialized"]
    parts = {k: v for k, v in denoiser.net.state_dict().items() if "control" in k}
    if any(k.endswith("control.gain") for k in parts):
        assert F_of(denoiser, run, cond=cond_).equal(absent)  # one gain for both levels, 0 again
    else:
        old = load_source(path).net.state_dict()
        assert all(v.equal(old[k]) == (".low." in k) for k, v in parts.items() if k.endswith("2.weight"))
        high = next(v for k, v in parts.items() if k.endswith("mlps.high.2.weight"))
        assert not high.any()


@pytest.mark.parametrize("name", FEW)
def test_latents_of_other_channels(tmp_path, name):
    """4 -> 16: first and last layer as in a new network, so that F = 0 where a new one begins so."""
    path = write_snapshot(tmp_path, make_run(name, latents=4, resolution=128))
    run, denoiser, output = transfer_to(make_run(name, latents=16, resolution=128, source=str(path), seed=1))
    old, new = load_source(path).net.state_dict(), denoiser.net.state_dict()
    changed = {k for k in new if not (new[k].shape == old[k].shape and torch.allclose(new[k], old[k], rtol=1e-12))}
    ends = ("patch_embed.", "final.", "conv_in.", "conv_out.", "downsamplers.0.", "upsamplers.1.2.", "out.", "out_gain")
    assert changed and all(k.removeprefix("trunk.").startswith(ends) for k in changed), changed
    assert kinds(output)["initialized"].count("in the source") == 2
    if name != "ladder C":  # which begins at random
        assert not F_of(denoiser, run).any()
    assert denoiser.net.state_dict()[sorted(changed)[0]].isfinite().all()


# --- Another project's weights ----------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 32, "depth": 3, "num_heads": 2}
LEVELS = dict(
    channels=32,
    channel_mult=(1, 2),
    num_blocks=1,
    transformer_depth=(0, 1),
    text_projection="none",
    channels_per_head=64,
)
PEERS = {
    "dit": (DiTConfig(**SHAPE, pos_embed="extrapolated"), InputSpec(4, 16, 5), "DiTTransformer2DModel"),
    "pixart": (PixArtConfig(**SHAPE, pos_embed="extrapolated"), InputSpec(4, 16, text_dim=12),
    "PixArtTransformer2DModel"),
    "mmdit": (
        MMDiTConfig(**SHAPE, separate_text_weights="all", pos_embed_max_size=12),
        InputSpec(4, 16, text_dim=12, pooled_dim=10), "SD3Transformer2DModel",
    ),
    "unet": (UNetConfig(**LEVELS), InputSpec(4, 16, text_dim=12), "UNet2DConditionModel"),
}  # fmt: skip


def peer_file(folder: Path, name: str) -> tuple[Path, torch.nn.Module]:
    """Random weights in a file that diffusers' own class writes, and our network with them."""
    import diffusers

    cfg, inputs, kind = PEERS[name]
    torch.manual_seed(0)
    net = randomize_constants_(models.build_network(cfg, inputs))
    _, settings, state = interop.to_diffusers(net, cfg, inputs)
    peer = getattr(diffusers, kind)(**settings)
    peer.load_state_dict(state)
    peer.save_pretrained(folder / name)
    return folder / name / "diffusion_pytorch_model.safetensors", net.double()


def peer_run(name: str, resolution: int = 128, **options):
    cfg, inputs, _ = PEERS[name]
    classes = tuple("abcde")[: inputs.num_classes] if inputs.num_classes else ("a",)
    kind = "label" if inputs.num_classes else "text"
    return make_run(name, kind, resolution, classes, latents=4, pooled=inputs.pooled_dim, net=cfg, **options)


@pytest.mark.parametrize("name", list(PEERS))
def test_a_file_of_diffusers(tmp_path, name):
    path, net = peer_file(tmp_path, name)
    recorded = {} if name == "mmdit" else {"resolution": 128}
    if recorded:
        with pytest.raises(UsageError, match=r"init\.resolution=256"):
            transfer_to(peer_run(name, source=str(path)))
    run = peer_run(name, source=str(path), seed=1)
    run = run.model_copy(update={"init": run.init.model_copy(update=recorded)})
    run, denoiser, output = transfer_to(run)
    args = inputs_of(run)
    with torch.no_grad():
        wanted = net(*args)
        assert (denoiser.net(*args) - wanted).abs().max() < 1e-6 * wanted.abs().max()
    assert (
        "diffusers" in output[0]
        and any("process: " in line for line in output)
        and kinds(output)["initialized"] == "none"
    )
    assert len(run.init.fingerprint) == 64 and run.init.resolution == 128 and run.init.nimg is None


def test_a_file_of_diffusers_at_twice_the_resolution(tmp_path):
    """A table with one step per token is resampled from its grid, which is reported; noise levels are rescaled."""
    path, _ = peer_file(tmp_path, "dit")
    run = peer_run("dit", 256, source=str(path))
    net = run.net.model_copy(update={"pos_embed": "resampled"})
    run = run.model_copy(update={"init": run.init.model_copy(update={"resolution": 128}), "net": net})
    run, _, output = transfer_to(run)
    assert (run.pos_embed_base, run.process.resolution_scale, run.input_spec.pos_embed_base) == (128, 2.0, 16)
    assert "net.pos_embed proportional -> resampled" in kinds(output)["changed"]


def test_the_process_of_another_projects_weights(tmp_path):
    """DiT brings linear betas unless init.process=run; the weights of a run bring no process."""
    path, _ = peer_file(tmp_path, "dit")

    def run_with(there, **init):
        run = peer_run("dit", source=str(path))
        init = {"resolution": 128} | init
        return run.model_copy(update={"process": there, "init": run.init.model_copy(update=init)})

    for there in (VPConfig(), EDMConfig(P_mean=0.3)):
        moved, denoiser, output = transfer_to(run_with(there))
        assert moved.process == VPConfig(betas="linear") and denoiser.process.level_table.equal(
            processes.build_process(moved.process).level_table
        )
        line = kinds(output)["process"]
        assert "process.betas=linear" in line and "init.process=run" in line
        # Resuming takes what the source settled, also where the settings say the old process again.
        again = transfer_config.restore_recorded_settings(run_with(there), moved)
        assert again.process == moved.process
        stored, _, output = transfer_to(run_with(there, process="run"))
        assert stored.process == there and "process" not in kinds(output)
        assert transfer_config.restore_recorded_settings(run_with(there, process="run"), stored).process == there
    scaled = transfer_to(run_with(VPConfig(betas="linear", resolution_scale=1.0)))[2]
    assert "process" not in kinds(scaled)
    local = write_snapshot(tmp_path, make_run("dit"), "own")
    moved, _, _ = transfer_to(
        make_run("dit", source=str(local)).model_copy(update={"process": VPConfig(betas="linear")})
    )
    assert moved.process.betas == "linear" and moved.process.beta_end == 0.02


def test_a_learned_variance_is_taken_where_the_network_has_it(tmp_path):
    """Else it is left, and named; the ordinary output is the same either way."""
    cfg, inputs, _ = PEERS["dit"]
    cfg = cfg.model_copy(update={"learned_variance": True})
    net = randomize_constants_(models.build_network(cfg, inputs))
    save_file(interop.to_diffusers(net, cfg, inputs)[2], tmp_path / "dit.safetensors")
    outputs = []
    for learned in (True, False):
        run = peer_run("dit", source=str(tmp_path / "dit.safetensors"))
        init = run.init.model_copy(update={"resolution": 128})
        run = run.model_copy(update={"init": init, "net": run.net.model_copy(update={"learned_variance": learned})})
        run, denoiser, output = transfer_to(run)
        outputs.append(F_of(denoiser, run))
        assert ("trunk.variance.weight" in kinds(output).get("unused", "")) != learned
        if learned:
            assert denoiser.net.trunk.variance.weight.equal(net.trunk.variance.weight.to(run_dtype(denoiser)))
    assert outputs[0].equal(outputs[1])


def run_dtype(denoiser) -> torch.dtype:
    return next(denoiser.net.parameters()).dtype


def test_pickles_of_tensors_and_of_code(tmp_path):
    path, net = peer_file(tmp_path, "mmdit")
    from safetensors.torch import load_file

    state = load_file(path)
    for name, content in {"plain.pt": state, "nested.ckpt": {"ema": state, "step": 3}}.items():
        torch.save(content, tmp_path / name)
        _, denoiser, output = transfer_to(peer_run("mmdit", source=str(tmp_path / name)))
        assert denoiser.net.state_dict()["blocks.0.image_qkv.linear.weight"].equal(
            net.state_dict()["blocks.0.image_qkv.linear.weight"]
        )
        assert any("only 'ema' of the file was read" in line for line in output) == (name == "nested.ckpt")

    class Code:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    torch.save({"weights": Code()}, tmp_path / "code.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK\3\4 torn")
    torch.save({"a": 3}, tmp_path / "nothing.pt")
    torch.save({"layer.weight": torch.ones(3)}, tmp_path / "unknown.pt")
    for name, words in {
        "code.pt": "contains code, which gesso never runs", "torn.pt": "is damaged",
        "nothing.pt": "contains no named weights",
        "unknown.pt": "the weights belong to no project that gesso knows",
    }.items():  # fmt: skip
        with pytest.raises(GessoError, match=words):
            transfer_to(peer_run("mmdit", source=str(tmp_path / name)))


# --- What is refused --------------------------------------------------------------------------------------------------


def test_positions_lengths_and_times_are_distinguished(tmp_path):
    parsed = init_source.parse_init_source
    assert parsed("runs/a") == (Path("runs/a"), None, None)
    assert parsed("runs/a@0.1") == (Path("runs/a"), 0.1, None)
    assert parsed("runs/a@100k") == (Path("runs/a"), None, 100_000)
    assert parsed("runs/a@0.1@1.5M") == parsed("runs/a@1.5M@0.1") == (Path("runs/a"), 0.1, 1_500_000)
    (tmp_path / "x@0.1").mkdir()
    assert parsed(f"{tmp_path}/x@0.1") == (tmp_path / "x@0.1", None, None)
    assert parsed(f"{tmp_path}/x@0.1@0.2") == (tmp_path / "x@0.1", 0.2, None)
    for text, words in {
        "a@1.5": "neither an EMA length", "a@b": "neither an EMA length", "a@0.1@0.2": "two EMA lengths",
        "a@5@6": "two numbers of images",
        "a@0.3": "must lie between 0 and 0.2887", "a@0": "must lie between",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=words):
            parsed(text)


@pytest.mark.parametrize(
    "source_name, target_name, words",
    [
        ("dit", "mmdit++", "is another network: it has net.name=dit, this run net.name=mmdit.."),
        ("mmdit", "mmdit all", "it has net.separate_text_weights=qkv, this run net.separate_text_weights=all"),
        ("ladder A", "ladder B", "it has net.config=A, this run net.config=B"),
    ],
)
def test_another_network(tmp_path, source_name, target_name, words):
    path = write_snapshot(tmp_path, make_run(source_name))
    with pytest.raises(UsageError, match=words):
        transfer_to(make_run(target_name, source=str(path)))


def test_another_size_names_what_differs(tmp_path):
    path = write_snapshot(tmp_path, make_run("mmdit++"))
    net = NETS["mmdit++"].model_copy(update={"hidden_size": 48, "depth": 3})
    with pytest.raises(
        UsageError, match=r"net\.hidden_size=32 net\.depth=2, this run net\.hidden_size=48 net\.depth=3"
    ):
        transfer_to(make_run("mmdit++", net=net, source=str(path)))
    lists = NETS["unet"].model_copy(update={"channel_mult": (1, 3)})
    with pytest.raises(UsageError, match=r"it has net.channel_mult=\[1,2\], this run net.channel_mult=\[1,3\]"):
        transfer_to(make_run("unet", net=lists, source=str(write_snapshot(tmp_path, make_run("unet")))))


def test_damaged_files(tmp_path):
    run = make_run("dit")
    path = write_snapshot(tmp_path, run)
    weights = random_weights(run)
    bad = tmp_path / "bad.safetensors"
    for tensors, words in [
        (
            {k: v for k, v in weights.items() if k != "trunk.final.bias"},
            r"is incomplete or damaged: 1 missing \(trunk.final.bias\)",
        ),
        (weights | {"trunk.final.bias": weights["trunk.final.bias"] * math.nan}, "NaN or infinity in trunk.final.bias"),
    ]:
        snapshot.write(bad, tensors, 640, snapshot.PowerProfile(0.1), run)
        with pytest.raises(RunError, match=words):
            transfer_to(make_run("dit", source=str(bad)))
    bad.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="is damaged"):
        transfer_to(make_run("dit", source=str(bad)))
    save_file({"layer.weight": torch.ones(3)}, bad)
    with pytest.raises(UsageError, match="no project that gesso knows"):
        transfer_to(make_run("dit", source=str(bad)))


def test_settings_on_the_command_line(tmp_path):
    """init=x and init.labels=... together, in a file too; a new source forgets what the old one told."""
    run, _ = recipes.resolve("digits", ["init=runs/a@0.1", "init.labels=index"])
    assert (run.init.source, run.init.labels) == ("runs/a@0.1", "index")
    (tmp_path / "s.yaml").write_text("init: runs/b\n")
    assert recipes.resolve("digits", [str(tmp_path / "s.yaml"), "init.noise_levels=keep"])[0].init.source == "runs/b"
    assert recipes.resolve("digits", ["init=null"])[0].init == config.InitConfig()
    tree = config.to_dict(run)
    tree["init"] |= {"fingerprint": "ab", "nimg": 3, "class_mapping": [0]}
    assert config.resolve(tree, ["init.noise_levels=keep"])[0].init.fingerprint == "ab"
    new = config.resolve(tree, ["init=runs/c"])[0].init
    assert (new.fingerprint, new.nimg, new.class_mapping, new.labels) == (None, None, None, "index")
    with pytest.raises(UsageError, match=r"did you mean init\.labels"):
        recipes.resolve("digits", ["init.label=index"])


# --- Whole runs -------------------------------------------------------------------------------------------------------

TINY = [
    "net.hidden_size=32", "net.depth=2", "net.num_heads=2", "train.total_images=128", "train.batch_size=32",
    "train.log_every=32",
    "train.snapshot_every=64", "train.checkpoint_every=64", "train.num_threads=1", "optim.warmup_images=32",
    "sample.steps=2",
]  # fmt: skip
LARGE = ["data.resolution=16", "eval.toy_metrics=none"]


def trained(recipe: str, out: Path, *settings: str, resume: bool = False) -> tuple[config.RunConfig, list[str]]:
    output: list[str] = []
    run = start_training(recipes.resolve(recipe, [*TINY, *settings])[0], out, resume, QUIET, output.append)
    return run, output


def bits(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "snapshots").glob("*.safetensors"))}


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("source") / "digits"
    trained("digits", out)
    return out


def test_digits_from_8_to_16_pixels_on_the_command_line(digits, tmp_path):
    out = tmp_path / "large"
    result = CliRunner().invoke(app, ["train", "digits", *TINY, *LARGE, f"init={digits}@0.1@64", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert (
        f"weights from {digits} (sigma_rel 0.1, image 64)" in result.output
        and "8 -> 16 pixels (k = 2)" in result.output
    )
    assert (out / "transfer.txt").read_text().strip() in result.output
    run = config.load_config(out / "run.yaml")
    init = run.init
    assert (init.path, init.sigma_rel, init.nimg, init.resolution) == (str(digits), 0.1, 64, 8)
    assert (run.pos_embed_base, run.process.resolution_scale, run.sample.guidance_base_resolution) == (8, 2.0, 8)
    result = CliRunner().invoke(app, ["sample", str(out), "--label", "3", "--seeds", "0-1"])
    assert result.exit_code == 0 and "guidance 2 (1.5 at 8 pixels, by the scale law)" in result.output, result.output


def test_averages_begin_at_the_weights_that_were_moved(digits):
    run, dataset = open_dataset_for_run(recipes.resolve("digits", [*TINY, f"init={digits}"])[0], QUIET)
    run, denoiser, _ = transfer.init_from_source(run, init_source.open_init_source(run))
    wanted = {k: v.clone() for k, v in denoiser.net.state_dict().items()}
    stored, _, _, _ = snapshot.reconstruct_from_run(digits, [snapshot.PowerProfile(0.075)])
    trainer = Trainer(run, dataset, denoiser=denoiser)
    assert trainer.nimg == 0 and all(
        not v.any() for k, v in trainer.state_tensors().items() if k.startswith("optimizer")
    )
    for average in trainer.ema.averages.values():
        assert all(average[k].equal(wanted[k]) for k in wanted) and wanted.keys() == average.keys()
    assert all(stored[0][k].equal(v) for k, v in wanted.items())
    before = Trainer(*open_dataset_for_run(recipes.resolve("digits", TINY)[0], QUIET))
    assert trainer.step() < before.step() - 0.02  # it has learned something


def test_it_resumes_without_its_source_and_repeats_with_it(digits, tmp_path):
    gone, out, again = tmp_path / "gone", tmp_path / "run", tmp_path / "again"
    shutil.copytree(digits, gone)
    trained("digits", out, f"init={gone}", *LARGE)
    # Half of the run, then the source is gone.
    half = tmp_path / "half"
    stopping = Trainer.step

    def step(self):
        self.received_signals = [signal.SIGTERM] if self.nimg == 32 else []
        return stopping(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "step", step)
        with pytest.raises(StoppedError):
            trained("digits", half, f"init={gone}", *LARGE)
    account = (half / "transfer.txt").read_text()
    moved = gone.rename(tmp_path / "elsewhere")
    _, output = trained("digits", half, f"init={gone}", *LARGE, resume=True)
    assert bits(half) == bits(out) and len(bits(out)) == 4 and not any("weights from" in line for line in output)
    assert (half / "transfer.txt").read_text() == account
    with pytest.raises(UsageError, match="no such run folder or file"):
        trained(str(out / "run.yaml"), again)
    moved.rename(gone)
    # The source has gone on since: the same weights are made of it, by what run.yaml recorded.
    for path in (gone / "snapshots").glob("nimg000000000128*"):
        run, stored = snapshot.read(path)[1:]
        weights = {k: v + 1 for k, v in snapshot.read(path)[0].items()}
        snapshot.write(
            snapshot.snapshot_path(gone / "snapshots", 192, stored.profile), weights, 192, stored.profile, run
        )
    trained(str(out / "run.yaml"), again)
    assert bits(again) == bits(out)
    # Or it is another.
    for path in (gone / "snapshots").glob("nimg000000000128*"):
        weights, run, stored = snapshot.read(path)
        snapshot.write(path, {k: v * 1.01 for k, v in weights.items()}, 128, stored.profile, run)
    with pytest.raises(UsageError, match=r"init\.fingerprint was .* set init\.fingerprint=null"):
        trained(str(out / "run.yaml"), tmp_path / "third")
    assert not (tmp_path / "third" / "run.yaml").exists()
    trained(str(out / "run.yaml"), tmp_path / "third", "init.fingerprint=null", "train.total_images=32")


def test_a_run_killed_before_its_first_state_begins_again(digits, tmp_path):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained("digits", out, f"init={digits}")
    assert (out / "run.yaml").exists()
    trained("digits", out, f"init={digits}", resume=True)
    straight = tmp_path / "straight"
    trained("digits", straight, f"init={digits}")
    assert bits(out) == bits(straight)


def test_places_that_hold_nothing(digits, tmp_path):
    (tmp_path / "empty").mkdir()
    for text, words in {
        f"{digits}x": f"no such run folder or file: {digits}x; did you mean {digits}",
        f"{tmp_path}/empty": "holds no snapshots yet",
        f"{digits}@500k": "lies after the last snapshot",
        f"{digits}@3": "no snapshot up to image 3",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=words):
            trained("digits", tmp_path / "out", f"init={text}")
    path = next((digits / "snapshots").glob("*.safetensors"))
    with pytest.raises(UsageError, match="has the weights of one EMA at one time; remove the @"):
        trained("digits", tmp_path / "out", f"init={path}@0.1")
    with pytest.raises(UsageError, match="remove one of them"):
        trained("digits", tmp_path / "out", f"init={digits}@0.1", "init.sigma_rel=0.05")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("run.yaml"))


def test_from_classes_to_words_on_the_command_line(tmp_path):
    shapes = ["data.resolution=16", "net.patch_size=4", "eval.toy_metrics=none"]
    trained("shapes-class", tmp_path / "classes", "data.source=shapes-class:64", *shapes)
    settings_ = ["data.source=shapes:64", "control.variables=size", f"init={tmp_path / 'classes'}"]
    run, output = trained("shapes", tmp_path / "words", *settings_, *shapes)
    actual = kinds([line for line in output if line.startswith(("weights", "  "))])
    assert "control.variables [] -> ['size']" in actual["changed"]
    assert (
        run.init.class_mapping is None
        and "semantic.mlp" in actual["initialized"]
        and "semantic.table" in actual["unused"]
    )
    assert "semantic.kind label -> text" in actual["changed"]
    _, output = trained(
        "shapes-class",
        tmp_path / "back",
        "data.source=shapes-class:64",
        "control.variables=[]",
        f"init={tmp_path / 'words'}",
        *shapes,
    )
    actual = kinds([line for line in output if line.startswith(("weights", "  "))])
    assert "semantic.table" in actual["initialized"] and "semantic.mlp" in actual["unused"]


@pytest.mark.slow
def test_two_ranks_begin_at_the_same_bits(digits, tmp_path):
    """With no step to speak of, averages are what was moved: of one rank and of two, replicated and sharded."""
    unchanged = FLOAT64_TRAINING | MMDIT_SETTINGS | {
        "init": str(digits), "net.depth": 2, "optim.lr": 1e-300, "train.total_images": 7, "train.snapshot_every": 7,
        "train.checkpoint_every": 7, "train.sharding": "ddp",
    }  # fmt: skip
    launch(1, [{"out": str(tmp_path / "one"), "settings": unchanged}])
    jobs = [
        {"out": str(tmp_path / sharding), "settings": unchanged | {"train.sharding": sharding}}
        for sharding in ("ddp", "fsdp")
    ]
    launch(2, jobs)
    single = snapshot_weights(tmp_path / "one")
    stored = snapshot.reconstruct_from_run(digits, [snapshot.PowerProfile(0.075)])[0][0]
    for sharding in ("ddp", "fsdp"):
        two = snapshot_weights(tmp_path / sharding)
        assert two.keys() == single.keys() and all(two[k].equal(single[k]) for k in single)
    assert all(v.float().equal(stored[k.partition(":")[2]]) for k, v in single.items())
