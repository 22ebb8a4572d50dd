"""`gesso sweep`: trainings at equal budget over a grid of settings, and its page."""

import json

import pytest
from helpers.run_factory import QUIET_CONSOLE

from gesso.errors import UsageError
from gesso.reproduce.sweep import FIRST_SEED, SweepArgs, build_table, edge_note, parse_axis, sweep

TINY = (
    "data.num_validation=100", "train.total_images=256", "train.batch_size=32", "train.snapshot_every=128",
    "net.hidden_size=16",
    "net.depth=1", "net.num_heads=2", "optim.warmup_images=0", "monitor.validate_every=null",
    "eval.validation_pairs=200",
)  # fmt: skip


def test_points_are_trained_measured_and_ranked_once(tmp_path):
    args = SweepArgs("digits", ("optim.lr=1e-2,1e-6", "net.depth=1,2"), TINY, num_seeds=2, out=tmp_path)
    points = sweep(args, QUIET_CONSOLE, lambda line: None)
    assert len(points) == 4 and [p.mean for p in points] == sorted(p.mean for p in points)
    assert all(p.settings[0] == "optim.lr=1e-2" for p in points[:2])  # 1e-6 trains hardly at all
    assert all(len(set(p.values)) == 2 for p in points)
    page = json.loads((tmp_path / "sweep-digits.json").read_text())
    assert page["seeds"] == [FIRST_SEED, FIRST_SEED + 1] and page["points"][0]["values"] == list(points[0].values)
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    lines = []
    assert sweep(args, QUIET_CONSOLE, lines.append) == points
    assert folders == sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert not any(line.startswith("gesso train") for line in lines)
    assert "| `optim.lr=1e-2 net.depth=" in (tmp_path / "sweep-digits.md").read_text()


def test_values_that_contain_commas_are_separated_by_bars():
    assert parse_axis("net.channel_mult=1,2|1,2,2") == ["net.channel_mult=1,2", "net.channel_mult=1,2,2"]
    for text in ("optim.lr=1e-3", "optim.lr", "lr=1,2", "optim.lr=1e-3,1e-3", "optim.lr=1e-3,"):
        with pytest.raises(UsageError, match="two or more values"):
            parse_axis(text)
    with pytest.raises(UsageError, match="which settings"):
        build_table(SweepArgs("digits", ()))


def test_an_optimum_at_the_edge_is_reported():
    from gesso.reproduce.sweep import SweepPoint

    axes = ("optim.lr=1,2,3", "net.depth=1,2")
    assert "optim.lr=3 is at the edge" in edge_note(axes, SweepPoint(("optim.lr=3", "net.depth=1"), (0.0,)))
    assert edge_note(axes, SweepPoint(("optim.lr=2", "net.depth=2"), (0.0,))) == ""
