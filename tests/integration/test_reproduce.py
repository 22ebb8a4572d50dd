"""gesso reproduce: jobs, shared trainings, verdicts, pages, dry runs, and a real run through the command."""

import io
import itertools
import json
import math
import os
import signal
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from gesso import atomic_io
from gesso.config import suggest
from gesso.errors import DivergenceError, StoppedError, UsageError
from gesso.papers import TABLES
from gesso.reproduce import (
    claims,
    dry_run,
    estimates,
    footnotes,
    index,
    labels,
    page,
    plan,
    requirements,
    results,
    runner,
    slurm,
)
from gesso.reproduce.cli import ReproduceArgs
from gesso.reproduce.schema import (
    DIVERGED,
    ChecklistItem,
    Claim,
    Column,
    ColumnGroup,
    Measurement,
    Row,
    Scale,
    Table,
    Training,
    get_table,
)
from gesso.training import loop

QUIET = Console(quiet=True)
SMALL = ("net.hidden_size=32", "net.depth=1", "net.num_heads=2", "train.total_images=256", "train.batch_size=32",
"train.snapshot_every=64",
         "train.checkpoint_every=64", "train.log_every=64", "train.num_threads=1",
         "optim.warmup_images=64")  # fmt: skip
METRICS = ("eval.metrics=fd_digits,class_accuracy", "eval.num_samples=40", "sample.steps=3")
SLOW, FAST = Training("digits", (*SMALL, "optim.lr=1e-4")), Training("digits", (*SMALL, "optim.lr=4e-3"))


def fake(**changes) -> Table:
    """Return a table of two trained rows, a row that shares a training, and a column that needs no training."""
    scored = {
        "slow": Measurement(SLOW),
        "fast": Measurement(FAST),
        "fast, guided": Measurement(FAST, ("sample.guidance=2",)),
    }
    table = Table(
        "test/1",
        "Rates | of <two> kinds",
        "Nobody 2024, Table 1",
        (Column("FID"), Column("right", False), Column("size", None)),
        (
            Row("slow", {"FID": 9.5}),
            Row("fast", {"FID": 3.25}),
            Row("fast, guided", {"FID": DIVERGED}),
            Row("never made"),
        ),
        {
            "tiny": Scale(
                (
                    ColumnGroup({"FID": "fd_digits", "right": "class_accuracy"}, scored, settings=METRICS),
                    ColumnGroup(
                        {"size": "parameters"}, {"slow": Measurement(settings=("net.hidden_size=32",))}, method="counts"
                    ),
                ),
                cost="a second",
                notes="As small as can be",
            ),
            "small": Scale((), cost="nothing"),
        },
        (
            Claim("A higher rate is better", lambda v: v.improves(("fast", "FID"), ("slow", "FID"))),
            Claim("It is right more often", lambda v: v.improves(("fast", "right"), ("slow", "right"))),
        ),
        notes="The paper says nothing of it.",
    )
    return table._replace(**changes)


def write_records(
    table: Table, out_folder: Path, values: dict[tuple[str, str, int], float | None], **protocol
) -> list[plan.MeasurementJob]:
    """Write records of three seeds with made-up numbers by (row, name, seed), and return the jobs."""
    planned_jobs = plan.plan_jobs(table, "tiny", range(3), out_folder)
    for job in planned_jobs:
        collected = {name: values.get((job.row, name, job.seed), 0.5) for name in job.group.columns.values()}
        content = {"name": None, "num_samples": 40, "diversity_prompts": 9, "reference": "digits",
        "reference_images": 1797,
                "reference_fingerprint": "abc", "networks": {"digits": "a"}, "nimg": 256, "guidance": 1.5,
                "sigma_rel": 0.1}  # fmt: skip
        atomic_io.write_json(job.path, {
            "method": job.group.method, "row": job.row, "seed": job.seed, "evaluate_command": job.evaluate_command,
            "values": collected,
            "training_commands": [step.command for step in plan.unique_trainings([job])],
            "protocol": content | protocol.get(job.row, {}),
            "measurement_minutes": 0.25, "training_minutes": 1.5 * bool(job.training),
            "environment": {"device": "cpu", "threads": 1, "torch": "2.13"},
        })  # fmt: skip
    return planned_jobs


@pytest.fixture
def fake_table(monkeypatch):
    """Register the fake table, and a count that needs no torch."""
    monkeypatch.setitem(TABLES, "test/1", fake)
    monkeypatch.setitem(runner.measurements.MEASUREMENT_METHODS, "counts", lambda job: {"values": {"parameters": 17.0}})


def collect_result(table: Table, out: Path, jobs: list[plan.MeasurementJob]) -> results.TableResult:
    """Return the result of finished jobs at scale tiny."""
    return results.load_result(table, results.collect_record(table, "tiny", out, jobs), out)


# Jobs and trainings


def test_jobs_of_rows_parts_and_seeds(tmp_path):
    planned_jobs = plan.plan_jobs(fake(), "tiny", range(2), tmp_path)
    assert [(job.row, job.group.method, job.seed) for job in planned_jobs] == [
        ("slow", "metrics", 0), ("fast", "metrics", 0), ("fast, guided", "metrics", 0), ("slow", "counts", 0),
        ("slow", "metrics", 1), ("fast", "metrics", 1), ("fast, guided", "metrics", 1),
    ]  # fmt: skip
    assert [job.row for job in plan.plan_jobs(fake(), "tiny", [0], tmp_path, ["fast"])] == ["fast"]
    assert len({job.path for job in planned_jobs}) == 7


def test_trainings_are_shared_within_and_between_tables(tmp_path):
    planned_jobs = plan.plan_jobs(fake(), "tiny", range(3), tmp_path)
    assert len(plan.unique_trainings(planned_jobs)) == 6  # two rates, three seeds
    other = fake(name="test/2", rows=(Row("another name"),))
    part = ColumnGroup({"FID": "fd_digits"}, {"another name": Measurement(FAST)}, settings=METRICS)
    (job,) = plan.plan_jobs(other._replace(scales={"tiny": Scale((part,), "")}), "tiny", [0], tmp_path)
    assert job.training.folder == planned_jobs[1].training.folder and job.path == planned_jobs[1].path


FIRST = plan.plan_training(FAST, 0, Path("w"))


@pytest.mark.parametrize(
    "setting",
    [
        "sample.guidance=3",
        "sample.steps=99",
        "eval.num_samples=7",
        "monitor.sample_every=64",
        "train.device=cpu",
        "train.num_threads=2",
    ],
)
def test_settings_that_do_not_change_the_weights_do_not_change_the_key(setting):
    assert plan.plan_training(Training("digits", (*FAST.settings, setting)), 0, Path("w")).key == FIRST.key


@pytest.mark.parametrize(
    "setting",
    [
        "optim.lr=5e-3",
        "train.total_images=288",
        "net.hidden_size=64",
        "data.source=digits-mixed-resolution",
        "process.name=vp",
        "ema.sigma_rels=[0.05]",
    ],
)
def test_settings_that_change_the_weights_change_the_key(setting):
    assert plan.plan_training(Training("digits", (*FAST.settings, setting)), 0, Path("w")).key != FIRST.key


def test_seeds_and_parents_change_the_key():
    later = Training("digits", FAST.settings, parent=SLOW)
    keys = {
        plan.plan_training(t, seed, Path("w")).key
        for t in (FAST, later, Training("digits", FAST.settings, FAST))
        for seed in (0, 1)
    }
    assert len(keys) == 6
    training = plan.plan_training(later, 0, Path("w"))
    assert (
        training.parent.key == plan.plan_training(SLOW, 0, Path("w")).key
        and f"init={training.parent.folder}" in training.command
    )
    assert [step.key for step in plan.unique_trainings([plan.MeasurementJob("r", fake().scales["tiny"].groups[0], 0,
    training, None, (), Path("x"))])] == [
        training.parent.key, training.key,
    ]  # fmt: skip


@given(st.permutations(list(FAST.settings)))
def test_the_order_of_settings_does_not_matter(settings):
    assert plan.plan_training(Training("digits", tuple(settings)), 0, Path("w")).folder == FIRST.folder


# Pages


def get_stored_table(path: Path) -> str:
    """Return the table of a stored page; empty for other files."""
    return json.loads(path.read_text()).get("table", "")


def test_a_page(tmp_path, fake_table):
    values = {("slow", "fd_digits", s): 9 + s for s in range(3)} | {
        ("fast", "fd_digits", s): 3 + 0.1 * s for s in range(3)
    }
    values |= {("fast", "class_accuracy", 1): None, ("slow", "parameters", 0): 17.0}
    planned_jobs = write_records(fake(), tmp_path, values)
    paths = page.write_page(fake(), "tiny", tmp_path, planned_jobs, ("train.device=cpu",))
    assert [path.name for path in paths] == ["test-1-tiny.md", "test-1-tiny.html", "README.md"]
    text, html = (path.read_text() for path in paths[:2])
    assert "| slow | 10.00\u00a0\u00b1\u00a01.00 | 9.50 |" in text and "| 3.10\u00a0\u00b1\u00a00.10 | 3.25 |" in text
    assert (
        "| fast, guided | **0.50\u00a0\u00b1\u00a00.00** | diverged |" in text and text.count("**0.5") == 1
    )  # equal means: none is best
    assert "| never made | - | - | - | - |" in text and "(1 of 3 NaN)" in text
    assert "not FID" in text and "As small as can be." in text and "Every training with train.device=cpu." in text
    assert "| A higher rate is better | **reproduced** | +6.9 (+5.38 to +8.42) | +6.25 |" in text
    assert "| It is right more often | **undecided**" in text  # NaN does not count
    assert "# Rates \\| of \\<two\\> kinds" in text and "<h1>Rates | of &lt;two&gt; kinds</h1>" in html
    assert (
        "gesso reproduce test/1 train.device=cpu --scale tiny --num-seeds 3" in text
        and text.count("gesso train digits") == 6
    )
    assert str(tmp_path) not in text + html and "tables/runs/digits-" in text
    assert 'class="tag"' in html and "src=" not in html and "The paper says nothing of it." in html
    assert "A row and seed took 1.8 minutes (cpu, 1 thread, torch 2.13); expected for a row: a second." in text
    content = json.loads((tmp_path / "test-1-tiny.json").read_text())
    assert (
        content["rows"]["slow"]["FID"]["by_seed"] == {"0": 9, "1": 10, "2": 11}
        and content["rows"]["slow"]["FID"]["published"] == 9.5
    )
    assert (
        content["rows"]["fast"]["right"]["by_seed"]["1"] == "NaN"
        and content["rows"]["fast, guided"]["FID"]["published"] == "diverged"
    )
    assert content["claims"][0]["verdict"] == "reproduced" and content["claims"][0]["published_effect"] == 6.25
    assert str(tmp_path) not in json.dumps(content)


def test_stored_pages_are_judged_again(tmp_path, fake_table, gesso, monkeypatch):
    """`gesso reproduce judge` writes the same page from its JSON, new verdicts of new claims, and the outdated note."""
    values = {("slow", "fd_digits", s): 9 + s for s in range(3)} | {("fast", "class_accuracy", 1): None}
    page.write_page(fake(), "tiny", tmp_path, write_records(fake(), tmp_path, values))
    for path in tmp_path.glob("measurements/*"):
        path.unlink()
    before = {end: (tmp_path / f"test-1-tiny.{end}").read_text() for end in ("md", "html", "json")}
    assert gesso("reproduce", "judge", "--out", tmp_path)[0] == 0
    assert before == {end: (tmp_path / f"test-1-tiny.{end}").read_text() for end in ("md", "html", "json")}
    claim = Claim("The contrary", lambda v: v.improves(("slow", "FID"), ("fast", "FID")))
    monkeypatch.setitem(TABLES, "test/1", lambda: fake(claims=(claim,)))
    stored = json.loads(before["json"]) | {"outdated": "the recipes have changed."}
    atomic_io.write_json(tmp_path / "test-1-tiny.json", stored)
    assert gesso("reproduce", "judge", "--out", tmp_path)[0] == 0
    text = (tmp_path / "test-1-tiny.md").read_text()
    assert "| The contrary | **contradicted** |" in text and "Outdated: the recipes have changed." in text
    assert "| **contradicted** | 3 | 12 min | [test/1](test-1-tiny.md) * |" in (tmp_path / "README.md").read_text()


STORED = [
    path
    for path in sorted((Path(__file__).parents[2] / "docs" / "results").glob("*.json"))
    if get_stored_table(path) in TABLES
]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_verdicts_follow_from_the_stored_numbers(path):
    """Every verdict, effect and bound in docs/results is reproduced from the numbers of its page."""
    stored = json.loads(path.read_text())
    table = TABLES[stored["table"]]()
    result = results.load_result(table, stored, path.parent)
    assert len(result.claims) == len(stored["claims"])
    for (judgement, _, _), claim in zip(result.claims, stored["claims"], strict=True):
        assert judgement.verdict == claim["verdict"], judgement.text
        if claim["effect"] is not None:
            assert judgement.effect == pytest.approx(float(claim["effect"]), rel=1e-9, abs=1e-12)
            for actual, expected in zip((judgement.low, judgement.high), claim["bounds"], strict=True):
                assert actual == (expected if expected is None else pytest.approx(expected, rel=1e-6))


def test_a_diverged_seed_and_a_single_seed(tmp_path, fake_table):
    planned_jobs = write_records(fake(), tmp_path, {})
    for job in planned_jobs:
        if job.row == "fast" or (job.row == "slow" and job.seed == 2 and job.group.method == "metrics"):
            atomic_io.write_json(job.path, {"training_commands": [], "diverged": "at image 3"})
        if job.row == "fast, guided" and job.seed:
            job.path.unlink()
    text = page.write_page(fake(), "tiny", tmp_path, planned_jobs)[0].read_text()
    assert "(1 of 3 diverged)" in text and "| fast | diverged | 3.25 | diverged |" in text
    assert "(1 of 3 seeds)" in text and "| it diverged | +6.25 |" in text and "**contradicted**" not in text


def test_untrained_cells_need_one_seed(tmp_path, fake_table):
    claim = Claim("It is small", lambda v: v["slow", "size"] < 20)
    table = fake(claims=(claim,))
    planned_jobs = plan.plan_jobs(table, "tiny", [0], tmp_path)
    (counted,) = [job for job in planned_jobs if job.group.method == "counts"]
    atomic_io.write_json(counted.path, {"training_commands": [], "values": {"parameters": 17.0}})
    result = collect_result(table, tmp_path, planned_jobs)
    assert result.claims[0].judgement.verdict == claims.Verdict.EXACT and result.cells["slow", "size"].std is None


def test_cells_with_another_protocol_have_footnotes(tmp_path, fake_table):
    """Differences that a row makes on purpose, and the EMA length and time of its training, have no footnote."""
    unlike = {
        "fast": {"num_samples": 20, "diversity_prompts": 1, "sigma_rel": 0.2, "nimg": 9},
        "fast, guided": {"guidance": 2.0, "networks": {"digits": "b", "classifier": "c"}},
    }
    planned_jobs = write_records(fake(), tmp_path, {}, **unlike)
    result = collect_result(fake(), tmp_path, planned_jobs)
    assert result.footnotes == ["num_samples 20, where other rows have 40", "network digits b, where other rows have a"]
    assert {cell: n.footnotes for cell, n in result.cells.items() if n.footnotes} == {
        ("fast", "FID"): (1,), ("fast", "right"): (1,), ("fast, guided", "FID"): (2,), ("fast, guided", "right"): (2,),
    }  # fmt: skip
    text = page.write_page(fake(), "tiny", tmp_path, planned_jobs)[0].read_text()
    assert "<sup>1</sup> num\\_samples 20" in text and text.count("<sup>2</sup>") == 3


def test_another_reference_or_measure_has_a_footnote(tmp_path):
    table = fake()
    first = table.scales["tiny"].groups[0]
    parts = (
        first._replace(rows={"slow": first.rows["slow"], "fast": first.rows["fast"]}),
        ColumnGroup(
            {"FID": "digits_feature_distance"},
            {"never made": Measurement(FAST)},
            settings=("eval.metrics=digits_feature_distance",),
        ),
    )
    table = table._replace(scales={"tiny": Scale(parts, "")})
    planned_jobs = write_records(table, tmp_path, {}, **{"never made": {"reference": "shapes"}})
    notes = footnotes.collect_footnotes(
        table, planned_jobs, {job.path: runner.read_record(job.path) for job in planned_jobs}
    )[1]
    assert any(note.startswith("reference 1,797 of shapes (abc), where") for note in notes)
    assert "measure digits_feature_distance, where other rows have fd_digits" in notes


def curves(out_folder: Path, names: str) -> tuple[Table, list[plan.MeasurementJob]]:
    rows = tuple(Row(f"{x:g}", x=x) for x in (0.01, 0.1, 1.0, 10.0))
    parts = tuple(
        ColumnGroup({name: "fd_digits"}, {row.name: Measurement(FAST, (f"sample.S_noise={row.x}{i}",)) for row in rows})
        for i, name in enumerate(names)
    )
    table = fake(name="test/fig2", columns=tuple(Column(name) for name in names), rows=rows, x_axis="length", claims=(),
                 scales={"tiny": Scale(parts, "")})  # fmt: skip
    planned_jobs = write_records(
        table, out_folder, {(r.name, "fd_digits", s): (r.x - 1) ** 2 + 1 + s for r in rows for s in range(3)}
    )
    return table, planned_jobs


def test_a_figure_has_a_picture(tmp_path):
    table, planned_jobs = curves(tmp_path, "abcdefg")
    for job in planned_jobs:
        if job.group.columns == {"c": "fd_digits"} and job.row == "10":
            atomic_io.write_json(job.path, {"training_commands": [], "diverged": "x"})
    paths = page.write_page(table, "tiny", tmp_path, planned_jobs)
    assert (tmp_path / "test-fig2-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "](test-fig2-tiny.png)" in paths[0].read_text() and paths[1].read_text().count("<svg") == 1
    ((figure, _),) = page.plots.make_plots(collect_result(table, tmp_path, planned_jobs), planned_jobs)
    (axes,) = figure.axes
    named = {line.get_label(): line for line in axes.lines}
    assert [name for name in named if len(name) == 1] == list("abcdefg") and axes.get_xscale() == "log"
    assert named["a"].get_ydata().tolist() == pytest.approx([(x - 1) ** 2 + 2 for x in (0.01, 0.1, 1, 10)])
    assert math.isnan(named["c"].get_ydata()[3]) and axes.get_xlabel() == "length"
    assert sum(len(line.get_xdata()) for line in axes.lines if line.get_label().startswith("_")) == 1  # one cross


def test_a_figure_of_samples_shows_them_once(tmp_path):
    """Samples are those of the first seed; their number counts for all seeds."""
    part = ColumnGroup({"samples": "num_images"}, {"fast": Measurement(FAST)}, method="sample_grid")
    table = fake(name="test/fig9", columns=(Column("samples", None),), rows=(Row("fast"),), claims=(),
                 scales={"tiny": Scale((part,), "")})  # fmt: skip
    planned_jobs = plan.plan_jobs(table, "tiny", range(3), tmp_path)
    assert [job.seed for job in planned_jobs] == [0] and len(plan.unique_trainings(planned_jobs)) == 1
    atomic_io.write_json(
        planned_jobs[0].path, {"training_commands": [planned_jobs[0].training.command], "values": {"num_images": 12}}
    )
    paths = page.write_page(table, "tiny", tmp_path, planned_jobs)
    assert not (tmp_path / "test-fig9-tiny.png").exists() and "| fast | 12 |" in paths[0].read_text()
    Image.new("RGB", (40, 10), "red").save(page.plots.sample_grids.grid_path(planned_jobs[0]))
    paths = page.write_page(table, "tiny", tmp_path, planned_jobs)
    with Image.open(tmp_path / "test-fig9-tiny.png") as picture:
        width, height = picture.size
    assert width == pytest.approx(4 * height, rel=0.02) and paths[1].read_text().count("<svg") == 1
    assert "![" in paths[0].read_text() and "\n\nfast\n" in paths[0].read_text()


def test_a_figure_over_a_column(tmp_path, fake_table):
    """The x of rows without one is their number in the column of the x axis."""
    part = ColumnGroup(
        {"cost": "fd_digits", "right": "class_accuracy"},
        {"slow": Measurement(SLOW), "fast": Measurement(FAST)},
        settings=METRICS,
    )
    table = fake(
        columns=(Column("cost", None), Column("right", False)),
        x_axis="cost",
        scales={"tiny": Scale((part,), "")},
        claims=(),
    )
    values = {(row, "fd_digits", s): x for s in range(3) for row, x in (("slow", 4.0), ("fast", 2.0))}
    planned_jobs = write_records(table, tmp_path, values | {("fast", "class_accuracy", s): 0.75 for s in range(3)})
    ((figure, _),) = page.plots.make_plots(collect_result(table, tmp_path, planned_jobs), planned_jobs)
    line = figure.axes[0].lines[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2, 4], [0.75, 0.5])
    assert "|  | cost | right \u2191 |" in page.write_page(table, "tiny", tmp_path, planned_jobs)[0].read_text()


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    table, planned_jobs = curves(tmp_path, "a")
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    paths = page.write_page(table, "tiny", tmp_path, planned_jobs)
    assert all("it needs matplotlib" in path.read_text() for path in paths[:2]) and not list(tmp_path.glob("*.png"))


def test_a_checklist_reads_the_verdicts_of_its_tables(tmp_path, fake_table):
    checks = (
        ChecklistItem("Which rate?", "a high one", "test/1", 0),
        ChecklistItem("Which size?", "large", "test/9", 1),
    )
    table = Table("test/a5", "Advice", "Nobody 2024", (), (), {}, checklist=checks)
    values = {("slow", "fd_digits", s): 9 + s for s in range(3)}
    page.write_page(fake(), "tiny", tmp_path, write_records(fake(), tmp_path, values))
    text = page.write_page(table, "tiny", tmp_path, [])[0].read_text()
    assert "| Which rate? | a high one | **reproduced** | A higher rate is better | test/1 |" in text
    assert "| Which size? | large | **not measured** | - | test/9 |" in text
    listed = (tmp_path / "README.md").read_text()
    assert (
        "1 reproduced, 1 undecided." in listed and "- [test/a5](test-a5-tiny.md): Advice (1 reproduced, 1 not" in listed
    )


def test_column_descriptions():
    table = fake()
    first = table.scales["tiny"].groups[0]
    lengths = tuple(
        first._replace(
            columns={"FID": "1-all"},
            select="min",
            rows={"slow": Measurement(SLOW, (f"sample.sigma_rel={s}", "sample.steps=3"))},
        )
        for s in (0.05, 0.1)
    )
    table = table._replace(scales={"tiny": Scale((*lengths, *table.scales["tiny"].groups[1:]), "")})
    content = {name: label.description for name, label in labels.label_columns(table, "tiny").items()}
    assert content["FID"].startswith("one minus the share of samples")
    assert content["FID"].endswith(", the minimum over sample.sigma_rel")
    assert content == {
        **content,
        "right": "not measured at this scale",
        "size": "parameters (counts of the network of a run, without training it)",
    }


def test_the_list_of_results_has_a_line_for_each_claim(tmp_path, fake_table):
    """Effects are relative to the larger number, beside those of the paper; claims without a verdict are folded."""
    values = {("slow", "fd_digits", s): 9 + s for s in range(3)} | {
        ("fast", "fd_digits", s): 3 + 0.1 * s for s in range(3)
    }
    unknown = Claim("It is smaller", lambda v: v["fast", "size"] < v["slow", "size"])
    table = fake(claims=(*fake().claims, unknown))
    page.write_page(table, "tiny", tmp_path, write_records(table, tmp_path, values))
    text = (tmp_path / "README.md").read_text()
    decided, folded = text.split("<details>")
    line = "| A higher rate is better | +69 % (+54 % to +84 %) | +66 % | **reproduced** | 3 | 12 min | "
    assert line + "[test/1](test-1-tiny.md) |" in decided  # 6 trainings of 1.5 minutes, 10 measurements of .25
    assert "1 reproduced, 1 undecided, 1 not measured." in decided and "plan.md" not in text
    assert (
        "Claims without a verdict: 1" in decided + folded
        and "| It is smaller | - | - | **not measured** | - |" in folded
    )
    plot = (tmp_path / "effects-test.svg").read_text()
    assert plot.count("<title>test/1</title>") == 2 and plot.count('stroke-width="1.5"') == 2  # legend, one published
    assert ">A higher rate is better</text>" in plot and "not measured" not in plot
    (tmp_path / "plan.md").write_text("x")
    assert "[plan.md](plan.md)" in index.write_index(tmp_path).read_text()


@pytest.mark.parametrize(
    "effect, relative, text",
    [
        (0.5, (0.123, -0.05, 0.3), "+12 % (-5 % to +30 %)"),
        (0.5, (0.012, None, None), "+1.2 %"),
        (math.inf, (None, None, None), "the other diverged"),
        ("-inf", (None, None, None), "it diverged"),
        (None, (None, None, None), "-"),
    ],
)
def test_relative_effects_as_text(effect, relative, text):
    assert index.format_relative(effect, relative) == text


def test_columns_and_claims_name_what_is_measured():
    """Where a scale measures another value than the paper, its name replaces that of the paper's metric."""
    table = fake()
    groups = table.scales["tiny"].groups
    paper = tuple(group._replace(columns={name: "fid" for name in group.columns if name == "FID"}) for group in groups)
    claim = Claim("FID falls, not FIDs", lambda v: v["slow", "FID"] > 1)
    table = table._replace(claims=(claim,), scales={**table.scales, "paper": Scale(paper, "")})
    assert labels.label_columns(table, "tiny")["FID"].title == "FD (digits)"
    assert labels.label_columns(table, "paper")["FID"].title == "FID"
    assert labels.name_measured(table, {"FID": "fd_digits"}).claims[0].text == "FD (digits) falls, not FIDs"
    assert labels.name_measured(table, {"FID": "fid"}).claims[0].text == claim.text
    assert labels.name_measured(table, {"right": "fd_digits"}).claims[0].text == claim.text


def test_names_are_in_the_order_of_their_numbers():
    names = ["a/fig11", "a/2b", "a/fig2", "a/10", "a/2a"]
    assert sorted(names, key=index.natural_key) == ["a/2a", "a/2b", "a/10", "a/fig2", "a/fig11"]


def test_another_readme_is_not_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="choose another folder"):
        index.write_index(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("values", "due"),
    [
        ([1.7931, 2.0], "1.793"), ([280.21, 1523.2], "280"), ([0.98765], "0.9877"), ([1e-9, 5.0], "1e-09"),
        ([0.0], "0.000"),
        ([-3.14159], "-3.142"), ([0.0000234, 0.02], "2.34e-05"), ([math.nan], "NaN"), ([math.inf, 2.0], "diverged"),
    ],
)  # fmt: skip
def test_digits(values, due):
    cells = [results.CellNumbers({0: value}) for value in values]
    assert page.format_number(values[0], page.column_decimals(cells)) == due


# Running jobs


def test_measured_jobs_are_not_measured_again(tmp_path, fake_table, monkeypatch):
    calls = []

    def measured(job):
        calls.append((job.row, job.seed))
        return {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}}

    monkeypatch.setitem(runner.measurements.MEASUREMENT_METHODS, "metrics", measured)
    monkeypatch.setattr(runner, "start_training", lambda *arguments: None)
    planned_jobs = plan.plan_jobs(fake(), "tiny", range(2), tmp_path)
    assert [job.row for job in runner.run_jobs(planned_jobs, QUIET, lambda text: None)] == [
        job.row for job in planned_jobs
    ]
    assert len(calls) == 6
    output = []
    assert len(list(runner.run_jobs(planned_jobs, QUIET, output.append))) == 7 and len(calls) == 6 and output == []
    planned_jobs[1].path.unlink()
    list(runner.run_jobs(planned_jobs, QUIET, output.append))
    assert calls[6:] == [("fast", 0)] and output[0] == "2 of 7: fast, FID, right, seed 0"


def test_a_row_that_diverges_is_a_result(tmp_path, fake_table, monkeypatch):
    tried = []

    def start(run, folder, *arguments):
        tried.append(run.optim.lr)
        if run.optim.lr == 4e-3:
            raise DivergenceError("the loss is not finite at image 64\nTry a lower optim.lr")

    monkeypatch.setattr(runner, "start_training", start)
    monkeypatch.setitem(
        runner.measurements.MEASUREMENT_METHODS,
        "metrics",
        lambda job: {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}},
    )
    planned_jobs = plan.plan_jobs(fake(), "tiny", [0], tmp_path)
    list(runner.run_jobs(planned_jobs, QUIET, lambda text: None))
    assert tried == [1e-4, 4e-3]  # two rows share the second training, which is not tried again
    collected = runner.collect_values(planned_jobs)[0]
    assert collected["slow", "FID"] == 1 and collected["fast", "FID"] == collected["fast, guided", "right"] == DIVERGED
    assert runner.read_record(planned_jobs[1].path)["diverged"] == "the loss is not finite at image 64"


def test_an_interruption_names_the_command_that_resumes(tmp_path, fake_table, monkeypatch):
    """A signal during a training writes a checkpoint, and the same command resumes it."""
    after, sent = loop.Monitor.on_step_end, []

    def interrupted(watcher, before):
        after(watcher, before)
        if not sent and before >= 96:
            sent.append(before)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Monitor, "on_step_end", interrupted)
    monkeypatch.setitem(
        runner.measurements.MEASUREMENT_METHODS,
        "metrics",
        lambda job: {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}},
    )
    planned_jobs = plan.plan_jobs(fake(), "tiny", [0], tmp_path, ["slow"])
    with pytest.raises(StoppedError) as stopped:
        list(runner.run_jobs(planned_jobs, QUIET, lambda text: None, "gesso reproduce test/1"))
    content = str(stopped.value).splitlines()
    assert content == ["SIGINT at image 160: a checkpoint is written. Resume with", "  gesso reproduce test/1"]
    assert stopped.value.exit_code == 130 and not planned_jobs[0].path.exists()
    console = Console(record=True, quiet=False, file=io.StringIO())
    list(runner.run_jobs(planned_jobs, console, lambda text: None))
    assert "resumed at image 160" in console.export_text() and runner.is_finished(planned_jobs[0].training)
    monkeypatch.setitem(
        runner.measurements.MEASUREMENT_METHODS, "counts", lambda job: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    planned_jobs[1].path.unlink()
    with pytest.raises(StoppedError, match=r"finished work is stored\. Resume with\n  gesso reproduce test/1"):
        list(runner.run_jobs(planned_jobs, QUIET, lambda text: None, "gesso reproduce test/1"))


def test_two_processes_share_the_work(tmp_path, fake_table, monkeypatch):
    """A job that another process has locked is skipped, awaited at the end, and not run again."""
    monkeypatch.setattr(runner, "POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr(runner, "start_training", lambda *arguments: None)
    monkeypatch.setitem(
        runner.measurements.MEASUREMENT_METHODS,
        "metrics",
        lambda job: {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}},
    )
    planned_jobs, output = plan.plan_jobs(fake(), "tiny", [0], tmp_path), []
    with atomic_io.try_lock(planned_jobs[0].training.folder) as mine:
        assert mine
        order = []
        for job in runner.run_jobs(planned_jobs, QUIET, output.append):
            order.append((job.row, job.group.method))
            if len(order) == 3:
                break
    assert order == [("fast", "metrics"), ("fast, guided", "metrics"), ("slow", "counts")]
    held = atomic_io.try_lock(planned_jobs[0].path)
    assert held.__enter__()

    def other(text):
        output.append(text)
        if text.startswith("waiting"):
            atomic_io.write_json(planned_jobs[0].path, {"values": {"fd_digits": 2.0, "class_accuracy": 1.0}})
            held.__exit__(None, None, None)

    assert len(list(runner.run_jobs(planned_jobs, QUIET, other))) == 4
    assert (
        output[-1] == "waiting for another process, which runs slow, seed 0"
        and runner.collect_values(planned_jobs)[0]["slow", "FID"] == 2
    )


def test_minutes_are_those_of_the_steps(tmp_path):
    step = plan.plan_training(FAST, 0, tmp_path)
    step.folder.mkdir(parents=True)
    lines = [
        {"nimg": 0, "unreadable": []},
        {"nimg": 600, "images_per_second": 10.0},
        {"nimg": 1200, "images_per_second": 5.0},
    ]
    (step.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runner.training_minutes(step) == 3


# Dry runs and Slurm


def reproduce_args(out_folder: Path, **changes) -> ReproduceArgs:
    return ReproduceArgs("test/1", (), "tiny", (), 2, out_folder, True)._replace(**changes)


def test_a_dry_run(tmp_path, fake_table):
    planned_jobs = plan.plan_jobs(fake(), "tiny", range(2), tmp_path)
    text = "\n".join(dry_run.dry_run_lines(fake(), reproduce_args(tmp_path), planned_jobs))
    assert text.startswith("test/1 at --scale tiny: 7 measurements (0 done) of 4 trainings (0 done), 2 seeds")
    assert text.count("gesso train digits") == 4 and "torchrun" not in text and "GPU-hours" not in text
    assert (
        "counts of slow" in text
        and "needed, available: digits, scikit-learn" in text
        and text.endswith("nothing was run")
    )
    assert list(tmp_path.iterdir()) == []


def test_missing_requirements_are_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    table = get_table(TABLES, "berrada/2a")
    planned_jobs = plan.plan_jobs(table, "paper", [0], Path("tables"), ["uniform"])
    text = "\n".join(
        dry_run.dry_run_lines(table, reproduce_args(Path("tables"), scale="paper", num_seeds=1), planned_jobs)
    )
    assert "torchrun --nproc-per-node 8 -m gesso train table-2a control.schedule=uniform" in text
    assert (
        "the cache caches/imagenet-256-0.9-1-flip\n      gesso cache /path/to/imagenet caches/imagenet-256-0.9-1-flip"
        in text
    )
    assert (
        "checkpoints/pt_inception-2015-12-05-6726825d.pth" in text
        and "lpips-alex.pth" in text
        and "github.com/mseitzer" in text
    )
    assert "GPU-hours of training" in text and "not the hub" not in text
    (tmp_path / "caches" / "imagenet-256-0.9-1-flip").mkdir(parents=True)
    (tmp_path / "caches" / "imagenet-256-0.9-1-flip" / "manifest.json").write_text("{}")
    (tmp_path / "vae").mkdir()
    run = planned_jobs[0].training.run
    run = run.model_copy(update={"latent": run.latent.model_copy(update={"vae": str(tmp_path / "vae")})})
    assert {need.label: need.available for need in requirements.training_requirements(run) if "vae" in need.label} == {
        f"the VAE {tmp_path}/vae": True
    }
    assert next(requirements.training_requirements(planned_jobs[0].training.run)).available


def test_hub_models_are_located_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--vae"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    assert not requirements.is_in_hub_cache("some/vae", "a.safetensors") and not requirements.is_in_hub_cache(
        "bad id//", "x"
    )
    (folder / "snapshots" / "abc" / "a.safetensors").write_text("x")
    assert requirements.is_in_hub_cache("some/vae", "a.safetensors")
    assert requirements.hub_requirement("some/vae", "a", "the VAE", "latent.vae=DIR") == (
        "the VAE some/vae",
        True,
        "downloaded from the hub at first use, or set latent.vae=DIR",
    )


def test_networks_of_the_hub_are_needed(tmp_path):
    run = plan.plan_training(
        Training("digits", ("eval.metrics=fd_dinov2,clip,fd_clip,fid", "eval.clip=a/b")), 0, tmp_path
    ).run
    collected = [need.label for need in requirements.measurement_requirements(run)]
    assert (
        "dinov2 facebook/dinov2-large" in collected
        and collected.count("clip a/b") == 2
        and "pt_inception" in collected[-1]
    )


def test_hours_by_hand(tmp_path):
    """EDM2-S has 102 G multiply-accumulates (Table 2); training on 2^31 images took 5.3 days on 32 A100 (Table 6)."""
    run = plan.plan_training(Training("edm2-img512-s"), 0, tmp_path).run
    cost = estimates.training_cost(run)
    assert cost.gpu_hours == pytest.approx(2 * 3 * 102e9 * 2**31 / (0.4 * 312e12) / 3600, rel=0.02)
    assert (
        cost.published_gpu_hours == 5.3 * 32 * 24
        and cost.disk_bytes.num_snapshots == 2 * 256
        and cost.parameters == pytest.approx(280.2e6, rel=1e-3)
    )
    shorter = plan.plan_training(Training("edm2-img512-s", ("train.total_images=1M",)), 0, tmp_path).run
    assert estimates.training_cost(shorter).published_gpu_hours is None


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ((), 20 * 2), (("sample.guidance=1",), 20), (("sample.sampler=heun",), 39 * 2),
        (("eval.num_repeats=3",), 3 * 20 * 2),
        (("control.variables=size", "sample.control_guidance=1.4"), 20 * 3),
        (("control.variables=size", "eval.metrics=digits_feature_distance", "eval.diversity_prompts=50"), 20 * 2),
    ],
)  # fmt: skip
def test_evaluations_of_sampling(tmp_path, settings, passes):
    """The hours of 100 samples follow from the number of network evaluations."""
    control = tuple(setting for setting in settings if setting.startswith("control"))
    measurement = Measurement(Training("digits", control), tuple(s for s in settings if s not in control))
    part = ColumnGroup({}, {"r": measurement}, settings=("eval.metrics=fd_digits", "eval.num_samples=100"))
    table = fake(rows=(Row("r"),), scales={"tiny": Scale((part,), "")})
    (job,) = plan.plan_jobs(table, "tiny", [0], tmp_path)
    run = estimates.with_dataset_info(estimates.evaluation_config(job))
    macs = estimates.count_model(run.net, run.input_spec, run.semantic.max_tokens).macs
    assert estimates.measurement_hours(job) == pytest.approx(estimates.gpu_hours(100 * passes * macs, "float32"))


def test_slurm_scripts(tmp_path, fake_table):
    """The scripts parse; with a fake sbatch, a training waits only for the training that it starts from."""
    part = ColumnGroup(
        {"FID": "fd_digits"},
        {
            "slow": Measurement(SLOW),
            "fast": Measurement(Training("digits", FAST.settings, parent=SLOW)),
            "never made": Measurement(FAST, guide=SLOW),
        },
        settings=METRICS,
    )
    table = fake(scales={"tiny": Scale((part,), "")})
    out_folder, out = tmp_path / "some where", tmp_path / "jobs"
    planned_jobs = plan.plan_jobs(table, "tiny", range(2), out_folder)
    lines = slurm.write_scripts(table, reproduce_args(out_folder, slurm=out), planned_jobs)
    assert lines[0].startswith("wrote train.sh (6 trainings), measure.sh (3 rows)")
    for script in out.iterdir():
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\necho "$(wc -l < {tmp_path}/calls);cluster"\n'
    )
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for tool in ("sbatch", "srun"):
        (tmp_path / "bin" / tool).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    subprocess.run(["bash", out / "submit.sh"], env=env, check=True, capture_output=True)
    calls = [call.split() for call in (tmp_path / "calls").read_text().splitlines()]
    train, measure = str(out / "train.sh"), str(out / "measure.sh")
    assert calls == [
        ["--parsable", "--array=0,2,3,5", train],
        ["--parsable", "--array=1", "--dependency=afterok:1_0", "--kill-on-invalid-dep=yes", train],
        ["--parsable", "--array=4", "--dependency=afterok:1_3", "--kill-on-invalid-dep=yes", train],
        ["--parsable", "--array=0-2", "--dependency=afterany:1:2:3", measure],
    ]
    env |= {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "7"}
    content = subprocess.run(["bash", measure], env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    assert content == [
        "gesso",
        "reproduce",
        "test/1",
        "--scale",
        "tiny",
        "--rows",
        "fast",
        "--num-seeds",
        "2",
        "--out",
        str(out_folder),
    ]
    content = subprocess.run(["bash", train], env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    child = plan.unique_trainings(planned_jobs)[1]
    assert content[:3] == ["gesso", "train", "digits"] and f"init={child.parent.folder}" in content
    assert content[-3:] == ["--out", str(child.folder), "--resume"]


def test_slurm_on_many_gpus_is_torchrun(tmp_path):
    text = slurm.format_script("a", "b", ["  0) command=(gesso train x) ;;"], 8)
    assert "--gpus-per-node=8" in text and '-m "${command[@]}" &' in text and '--nnodes="$SLURM_NNODES"' in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TABLES))
def test_every_table_at_every_scale(name, tmp_path):
    table = get_table(TABLES, name)
    for scale in table.scales:
        planned_jobs = plan.plan_jobs(table, scale, [0], tmp_path)
        assert dry_run.dry_run_lines(table, ReproduceArgs(name, scale=scale, out=tmp_path, dry_run=True), planned_jobs)


# The command


def test_two_rows_and_two_seeds(tmp_path, fake_table, gesso):
    """Train and measure for real; a second run uses the stored results."""
    out_folder = tmp_path / "made here"
    code, output, _ = gesso(
        "reproduce", "test/1", "--rows", "slow", "--rows", "fast", "--num-seeds", 2, "--out", out_folder
    )
    assert code == 0 and "5 of 5" in output and output.count("gesso train digits") == 4
    assert output.splitlines()[-1].startswith(f"wrote {out_folder}/test-1-tiny.md")
    assert len(list((out_folder / "runs").glob("digits-*/snapshots/*"))) == 4 * 4 * 2
    content = json.loads((out_folder / "test-1-tiny.json").read_text())
    for row in ("slow", "fast"):
        values = list(content["rows"][row]["FID"]["by_seed"].values())
        assert len(values) == 2 and all(value > 0 for value in values) and values[0] != values[1]
        assert all(0 <= value <= 1 for value in content["rows"][row]["right"]["by_seed"].values())
        assert content["minutes"][row]["training"] > 0
    assert content["rows"]["fast, guided"]["FID"]["by_seed"] == {} and content["rows"]["slow"]["size"]["by_seed"] == {
        "0": 17,
        "1": 17,
    }
    assert content["protocols"]["FID"]["num_samples"] == 40 and content["environments"][0].startswith("cpu, 1 thread")
    code, again, _ = gesso("reproduce", "test/1", "--rows", "slow", "--num-seeds", 2, "--out", out_folder)
    assert code == 0 and again.count("\n") <= 2  # only the line on written files
    assert gesso("reproduce", "test/1", "--rows", "slow", "--out", out_folder)[0] == 0
    assert (
        json.loads((out_folder / "test-1-tiny.json").read_text())["rows"] == content["rows"]
    )  # all stored rows and seeds
    code, listed, _ = gesso("reproduce", "list", "--out", out_folder)
    assert "test/1" in listed and f"{index.describe_page(content)} (tiny, 2 seeds)" in listed


def test_bad_input(tmp_path, fake_table, gesso, monkeypatch):
    monkeypatch.setitem(
        TABLES,
        "test/a5",
        lambda: Table("test/a5", "A", "B", (), (), {}, checklist=(ChecklistItem("q", "r", "test/1"),)),
    )
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("x")
    cases = {
        "did you mean test/1?": ("tst/1",),
        "did you mean slow?": ("test/1", "--rows", "slwo"),
        suggest("tyni", ["tiny", "small", "paper"]): ("test/1", "--scale", "tyni"),
        "is not defined at --scale paper: use --scale tiny or small": ("test/1", "--scale", "paper"),
        "no row of it is defined at --scale small": ("test/1", "--scale", "small"),
        "no row of never made is defined": ("test/1", "--rows", "never made"),
        "--num-seeds 0: must be at least 1": ("test/1", "--num-seeds", 0),
        "is a file: name a folder": ("test/1", "--slurm", tmp_path / "file"),
        "choose another": ("test/1", "--out", tmp_path / "file"),
        "choose another folder": ("test/1", "--out", tmp_path / "other"),
        "did you mean net.hidden_size?": ("test/1", "net.hiden_size=3"),
        "only collects the verdicts": ("test/a5", "--dry-run"),
    }
    for message, words in cases.items():
        code, _, error = gesso("reproduce", *words)
        assert code in (1, 2) and message in error and "Traceback" not in error and error.count("\n") <= 3, (
            words,
            error,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_a_failure_leaves_a_page_of_finished_jobs(tmp_path, fake_table, gesso, monkeypatch):
    def fails(job):
        if job.row == "fast":
            raise UsageError("weights are missing")
        return {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}}

    monkeypatch.setattr(runner, "start_training", lambda *arguments: None)
    monkeypatch.setitem(runner.measurements.MEASUREMENT_METHODS, "metrics", fails)
    code, _, error = gesso("reproduce", "test/1", "--out", tmp_path)
    assert (
        code == 2 and "weights are missing" in error and "| slow | **1" not in (tmp_path / "test-1-tiny.md").read_text()
    )
    assert json.loads((tmp_path / "test-1-tiny.json").read_text())["rows"]["slow"]["FID"]["by_seed"] == {"0": 1.0}


def test_the_list_is_by_paper(gesso, tmp_path):
    code, listed, _ = gesso("reproduce", "list", "--out", tmp_path)
    heads = [line for line in listed.splitlines() if line and not line.startswith(" ")]
    assert code == 0 and heads[0] == index.PAPER_TITLES["berrada"] and "berrada/2a" in listed
    assert list(itertools.chain(heads))[-1].startswith("`gesso reproduce NAME`")
