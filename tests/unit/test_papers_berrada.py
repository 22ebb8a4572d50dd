"""Tables and figures of Berrada et al. 2024: published numbers, claims, jobs, and shared trainings."""

import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gesso import config, models, recipes
from gesso.data.synthetic import with_synthetic_data
from gesso.evaluation import protocols
from gesso.papers import TABLES
from gesso.reproduce import claims, plan, results, runner
from gesso.reproduce.schema import DIVERGED, SCALES

BERRADA = [name for name in TABLES if name.startswith("berrada/")]
ALL_TABLES = {name: TABLES[name]() for name in BERRADA}
PLACES = [(name, scale) for name, table in ALL_TABLES.items() for scale in SCALES if scale in table.scales]


def jobs(name: str, scale: str) -> list[plan.MeasurementJob]:
    return plan.plan_jobs(ALL_TABLES[name], scale, [0], Path("tables"))


JOBS = {place: jobs(*place) for place in PLACES}


def test_all_tables_exist():
    names = [
        "1",
        "2a",
        "2b",
        "2c",
        "3",
        "4a",
        "4b",
        "4c",
        "A1",
        "A2",
        "A3",
        "A4",
        "A5",
        "A6",
        "fig2",
        "fig6",
        "fig7",
        "fig8",
        "figA1",
        "figA2",
        "figA3",
        "figA4",
        "figA5",
    ]
    assert {name.partition("/")[2] for name in BERRADA} == set(names)


@pytest.mark.parametrize("name", BERRADA)
def test_tables_are_complete(name):
    table = ALL_TABLES[name]
    columns, rows = [c.name for c in table.columns], [row.name for row in table.rows]
    assert len(set(columns)) == len(columns) and len(set(rows)) == len(rows)
    assert all(set(row.published) <= set(columns) for row in table.rows)
    for scale in table.scales.values():
        filled_cells = [(row, column) for part in scale.groups for row in part.rows for column in part.columns]
        assert len(set(filled_cells)) == len(filled_cells), "two groups measure one cell"
        assert {row for row, _ in filled_cells} <= set(rows) and {column for _, column in filled_cells} <= set(columns)
        assert all(part.protocol is None or part.protocol in protocols.PROTOCOLS for part in scale.groups)
    assert bool(table.x_axis) == any(row.x is not None for row in table.rows)


# Numbers read from the paper independently.
SPOTS = {
    "1": {("DiT-XL/2 w/ LN", "FID, ImageNet 512"): 2.85, ("PixArt-alpha-XL/2", "FID, ImageNet 256"): 2.06,
          ("PixArt-alpha-XL/2", "CLIP, CC12M 512"): DIVERGED, ("DiT-XL/2 w/ Att", "FID, ImageNet 512"): DIVERGED,
          ("UNet (SDXL)", "CLIP, CC12M 256"): 25.36, ("mmDiT-XL/2 (SD3)", "FID on COCO, CC12M 512"): 6.78,
          ("mmDiT-XL/2 (Berrada)", "FID, CC12M 512"): 6.27},
    "2a": {("uniform", "LPIPS/HR"): 0.21, ("cosine, alpha = 4", "FID"): 3.05, ("no size condition", "FID"): 3.29},
    "2b": {("one size", "cosine, alpha = 8"): 4.12, ("height = width, at random", "uniform"): 5.04,
    ("height and width, at random", "uniform"): 4.51},
    "2c": {("crop", "FID"): 8.43, ("crop, flip", "CLIP"): 23.68},
    "3": {("replicate", "FID"): 6.93, ("noisy, 0.05", "CLIP"): 26.58, ("noisy, 0.2", "FID"): 7.02,
    ("zero", "CLIP"): 26.25},
    "4a": {("IN1k, IN22k (110k)", "FID"): 4.67, ("IN1k, CC12M (60k)", "FID"): 7.59, ("CC12M (600k)", "CLIP"): 24.78},
    "4b": {("200k, then 150k", "FID, CC12M"): 7.15, ("300k, then 50k", "FID, ImageNet-22k"): 5.41,
    ("300k, then 50k", "CLIP, CC12M"): 25.30},
    "4c": {("UNet, 1000k", "FID"): 6.80, ("mmDiT, 500k", "FID"): 3.98, ("UNet, 750k, then 250k", "FID"): 4.81,
    ("mmDiT, 350k, then 150k", "FID"): 3.02},
    "A1": {("mmDiT, text", "FLOPs, 256"): 397.06, ("mDT, class", "parameters"): 748.07,
    ("UNet, text", "FLOPs, 512"): 819.56},
    "A2": {("UNet, batch 4096", "1e-4"): 9.26, ("DiT, batch 64", "5e-4"): DIVERGED, ("DiT, batch 512", "1e-5"): 83.6,
    ("UNet, batch 64", "1e-6"): 104.73},
    "A3": {("+ control", "FID, ImageNet 256"): 1.76, ("+ control guidance", "CLIP, CC12M 256"): 26.13,
    ("+ local crops in pre-training", "FID, CC12M 512"): 6.89},
    "A4": {("SD-XL", "FID on COCO, CC12M 512"): 7.26, ("SD3", "FID, CC12M 256"): 7.54,
    ("Berrada", "CLIP, CC12M 512"): 26.17},
    "A6": {("linear", "LPIPS/HR"): 0.041, ("step at sigma = 2", "LPIPS"): 0.14, ("step at sigma = 6", "FID"): 3.09,
    ("uniform", "LPIPS"): 0.33},
    "fig8": {("before, at 256", "all improvements"): 245.55},
    "figA2": {("0.9, 0.999", "FID"): 26.43, ("0.9, 0.95", "FID"): 21.65},
}  # fmt: skip


@pytest.mark.parametrize("name", SPOTS)
def test_published_numbers(name):
    published = ALL_TABLES[f"berrada/{name}"].published()
    assert {cell: published[cell] for cell in SPOTS[name]} == pytest.approx(SPOTS[name])


@pytest.mark.parametrize(
    "name, numbers",
    [("1", 14 + 5 + 2 * 5 + 2 * 5), ("2a", 16), ("2b", 8), ("2c", 4), ("3", 12), ("4a", 11), ("4b", 6), ("4c", 4),
    ("A1", 30),
     ("A2", 33 + 5 + 5 + 1), ("A3", 5 + 4 + 4 + 10), ("A4", 15), ("A6", 28), ("fig8", 3), ("figA2", 2)],
)  # fmt: skip
def test_number_of_published_numbers(name, numbers):
    assert len(ALL_TABLES[f"berrada/{name}"].published()) == numbers


@pytest.mark.parametrize("name, i", [(name, i) for name, table in ALL_TABLES.items() for i in range(len(table.claims))])
def test_claims_hold_on_the_published_numbers(name, i):
    table = ALL_TABLES[name]
    claim = table.claims[i]
    effect = claims.compute_effect(table, claim, table.published())
    assert effect is None or effect > 0
    assert len(claim.text) < 90 and not claim.text.endswith(".")
    # Figures without numbers, and comparisons that the paper does not make.
    pictures = {"berrada/fig2", "berrada/fig6", "berrada/fig7", "berrada/figA1", "berrada/figA3", "berrada/figA4"}
    detail = {("berrada/2a", 0), ("berrada/2a", 1), ("berrada/2b", 1), ("berrada/A6", 0), ("berrada/A6", 3)}
    silent = name in pictures or (name, i) in {("berrada/4b", 2), *detail} or (name == "berrada/fig8" and i < 3)
    assert (effect is None) == silent


@pytest.mark.parametrize("name", BERRADA)
def test_claims_can_be_judged_on_reproduced_tables(name):
    """At each scale some claim has all of its cells."""
    table = ALL_TABLES[name]
    for scale in table.scales.values():
        cells = {(row, c): 1.0 for part in scale.groups for row in part.rows for c in part.columns}
        if cells and table.claims:
            assert any(claims.compute_effect(table, claim, cells) is not None for claim in table.claims)


@pytest.mark.parametrize("name, scale", PLACES)
def test_every_job_is_valid(name, scale):
    """Recipe, settings, parent and measurement are valid."""
    planned = JOBS[name, scale]
    assert bool(planned) == (name != "berrada/A5")
    for job in planned:
        assert job.training is not None
        if job.group.method == "noise_levels":
            assert job.settings[0].startswith("t=")
            continue
        run, _ = config.resolve(config.to_dict(job.training.run), job.overrides)
        if job.group.method == "metrics":
            assert job.group.protocol or run.eval.metrics
            assert (run.eval.nimg or 1) <= run.train.total_images
        if scale != "paper":
            assert run.data.source.startswith(("digits", "shapes"))
            assert not {"fid", "clip", "lpips"} & set(run.eval.metrics), "no downloads"


def test_equal_trainings_have_one_folder():
    """Equal trainings of all tables have one folder."""
    folders: dict[str, set[Path]] = {}
    for planned in JOBS.values():
        for one in plan.unique_trainings(planned):
            folders.setdefault(one.key, set()).add(one.folder)
    assert {key: at for key, at in folders.items() if len(at) > 1} == {}


def keys(name: str, scale: str) -> set[str]:
    return {job.training.key for job in JOBS[f"berrada/{name}", scale]}


def paths(name: str, scale: str) -> set[Path]:
    return {job.path for job in JOBS[f"berrada/{name}", scale]}


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_tables_share_trainings(scale):
    assert len(keys("2a", scale)) == 6 and len(keys("A6", scale)) == 10
    assert len(keys("2b", scale)) == 2 and keys("2b", scale) < keys("2a", scale) < keys("A6", scale)
    numbers = {job.path for job in JOBS["berrada/fig2", scale] if job.group.method == "metrics"}
    assert keys("fig2", scale) == keys("2b", scale) and numbers < paths("2a", scale)
    assert keys("figA5", scale) < keys("1", scale)
    assert len(keys("3", scale)) == 6 and len(keys("figA3", scale)) == 3
    assert keys("figA3", scale) == keys("figA4", scale) < keys("3", scale)
    assert len(paths("2b", scale) & paths("2a", scale)) == 4  # sizes as in training, and the detail of each
    assert len(keys("A2", scale)) == {"tiny": 30, "paper": 44}[scale] and len(keys("figA2", scale)) == 3
    assert len(keys("figA2", scale) & keys("A2", scale)) == 1
    if scale == "tiny":
        assert keys("2c", scale) == keys("fig6", scale) and paths("2c", scale) == paths("fig6", scale)
        moved = {t.key for t in plan.unique_trainings(JOBS["berrada/4c", scale])}
        assert keys("fig7", scale) < keys("2a", scale) | moved
        assert {t.key for t in plan.unique_trainings(JOBS["berrada/4a", scale])} & keys("1", scale)
    else:
        assert len(keys("1", scale)) == 24
        assert len(keys("1", scale) & keys("3", scale)) == 1 and len(keys("1", scale) & keys("A4", scale)) == 4
        assert keys("fig7", scale) < keys("1", scale) and len(keys("4c", scale) & keys("1", scale)) == 2
        assert len(keys("fig8", scale) & keys("1", scale)) == 2  # full crops at 256, ours at 512
        assert len(keys("A3", scale) & keys("1", scale)) == 5


def test_parents_of_trainings():
    """Runs at 512 start from 256, with the positions and noise levels of each network's paper."""
    for job in JOBS["berrada/1", "paper"]:
        run, before = job.training.run, job.training.parent
        assert (before is not None) == (run.data.resolution == 512)
        if before:
            is_berrada, is_sd3 = run.recipe.endswith("berrada"), run.recipe.endswith("sd3")
            assert (
                run.init.noise_levels == ("scale" if is_berrada or is_sd3 else "keep")
                and before.run.data.resolution == 256
            )
            assert before.run.data.crop_scale == ((0.4, 0.6) if is_berrada else (0.9, 1.0))
    mmdit = next(job.training for job in JOBS["berrada/4c", "paper"] if job.row == "mmDiT, 350k, then 150k")
    assert mmdit.parent.run.train.total_images == 350_000 * 2048 and mmdit.run.train.total_images == 150_000 * 384
    late = next(
        job.training for job in JOBS["berrada/4b", "paper"] if job.row == "300k, then 50k" and job.training.parent
    )
    assert late.parent.run.train.total_images == 300_000 * 384 and late.run.train.total_images == 50_000 * 384
    assert late.parent.run.data.source == "caches/imagenet-22k-512-0.9-1-flip" and late.run.semantic.kind == "text"
    for job in JOBS["berrada/fig8", "paper"][3:]:
        assert job.training.run.init.noise_levels == ("keep" if "noise not rescaled" in job.group.columns else "scale")
        assert job.training.run.process.resolution_scale == (1 if "noise not rescaled" in job.group.columns else 2)


def test_crops_decide_the_pretraining_of_figure_8():
    by_curve = {next(iter(job.group.columns)): job.training for job in JOBS["berrada/fig8", "tiny"]}
    parents = {curve: one.parent for curve, one in by_curve.items()}
    assert len({one.key for one in parents.values()}) == 3 and len({one.key for one in by_curve.values()}) == 6
    assert all(one.run.data.resolution == 16 and one.run.process.resolution_scale == 0.5 for one in parents.values())
    assert all(one.run.data.crop_scale is None and one.run.data.resolution == 32 for one in by_curve.values())


@pytest.mark.parametrize("name, scale", [place for place in PLACES if place[1] != "tiny"])
def test_networks_can_be_built(name, scale):
    """Build each network and kind of condition once, on the meta device."""
    kinds = {}
    for one in plan.unique_trainings(JOBS[name, scale]):
        run, _ = with_synthetic_data(one.run)
        kinds[run.net.name, run.input_spec] = run
    with torch.device("meta"):
        for run in kinds.values():
            assert sum(p.numel() for p in models.build_network(run.net, run.input_spec).parameters()) > 10_000_000


def test_equation_3_is_judged_by_the_closed_form():
    table = ALL_TABLES["berrada/figA1"]
    process = recipes.resolve("cc12m-256-berrada", [])[0].process
    roots = torch.linspace(process.beta_start**0.5, process.beta_end**0.5, process.timesteps, dtype=torch.float64)
    abar = torch.cumprod(1 - roots**2, 0)
    sigma = ((1 - abar) / abar).sqrt()
    values = {}
    for row in table.rows:
        i = min(int(row.x * process.timesteps), process.timesteps - 1)
        for s in (1, 2):
            values[row.name, f"s = {s}"] = float(1 / (1 + (s * sigma[i]) ** 2))
    assert all(claims.compute_effect(table, claim, values) > 0 for claim in table.claims)
    perturbed = {cell: value * (1.001 if cell[1] == "s = 2" else 1) for cell, value in values.items()}
    more_noise, equation = (claims.compute_effect(table, claim, perturbed) for claim in table.claims)
    assert equation < 0 < more_noise


def test_computed_values_are_judged_exactly(tmp_path):
    table = ALL_TABLES["berrada/figA1"]
    planned_jobs = plan.plan_jobs(table, "paper", [0], tmp_path)
    for _ in runner.run_jobs(planned_jobs, Console(quiet=True), lambda line: None):
        pass
    assert not list(tmp_path.glob("trained/*"))
    judged = results.load_result(table, results.collect_record(table, "paper", tmp_path, planned_jobs), tmp_path).claims
    assert [claim.judgement.verdict for claim in judged] == [claims.Verdict.EXACT] * 2


def test_the_checklist_refers_to_existing_claims():
    checks = ALL_TABLES["berrada/A5"].checklist
    judged = [ALL_TABLES[check.table].claims[check.claim].text for check in checks]
    assert len(checks) == 12 and len(set(judged)) == 12
    words = ("joint attention", "size as control helps", "cosine weight", "control guidance", "Noisy copies",
    "Pre-trained", "as many other images",
             "less pre-training", "Rescaled noise", "Resampled positions", "half the resolution",
             "Local crops")  # fmt: skip
    assert all(word in text for word, text in zip(words, judged, strict=True))


@pytest.mark.parametrize("scale", SCALES)
def test_padding_of_the_rows_of_table_3(scale):
    for job in JOBS["berrada/3", scale]:
        semantic, (padding, _, noise) = job.training.run.semantic, job.row.partition(", ")
        assert semantic.kind == "text" and semantic.padding == padding
        assert not noise or semantic.padding_noise == float(noise)


def test_rates_and_batches_of_table_a2():
    """Equal steps and no EMA at both scales."""
    for scale, steps in (("tiny", 400), ("paper", 70_000)):
        for job in JOBS["berrada/A2", scale]:
            run = job.training.run
            assert run.train.total_images == steps * run.train.batch_size and run.optim.schedule == "constant"
            assert (run.ema.sigma_rels, run.ema.halflives, run.sample.halflife) == ((), (1,), 1)
            if scale == "paper":
                net, _, batch = job.row.partition(", batch ")
                assert run.net.name == net.lower() and run.train.batch_size == int(batch)
                assert math.isclose(run.optim.lr, float(next(iter(job.group.columns))))


def test_figure_8_has_bicubic_positions():
    """Section 2.2 and Figure 4: the position table at 256 is resized."""
    for scale, side in (("tiny", 16), ("paper", 256)):
        job = next(j for j in JOBS["berrada/fig8", scale] if "positions interpolated" in j.group.columns)
        assert job.training.run.net.pos_embed == "interpolated"
        assert job.training.parent.run.net.pos_embed == "resampled" and job.training.parent.run.data.resolution == side
