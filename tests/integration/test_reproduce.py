"""gesso reproduce: jobs, trainings shared by fingerprint, verdicts, pages, what it would take, and a real run through the command."""

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
    cli,
    dry_run,
    estimates,
    footnotes,
    index,
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
    Check,
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
SMALL = ("net.hidden_size=32", "net.depth=1", "net.num_heads=2", "train.total_images=256", "train.batch_size=32", "train.snapshot_every=64",
         "train.checkpoint_every=64", "train.log_every=64", "train.num_threads=1", "optim.warmup_images=64")  # fmt: skip
DRAWN = ("eval.metrics=fd_digits,class_accuracy", "eval.num_samples=40", "sample.steps=3")
SLOW, FAST = Training("digits", (*SMALL, "optim.lr=1e-4")), Training("digits", (*SMALL, "optim.lr=4e-3"))


def fake(**changes) -> Table:
    """Two rows that train, one that shares the training of another, one column that needs none."""
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
                    ColumnGroup({"FID": "fd_digits", "right": "class_accuracy"}, scored, settings=DRAWN),
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
            Claim("A higher rate is better", claims.improves_on(("fast", "FID"), ("slow", "FID"))),
            Claim("It is right more often", claims.improves_on(("fast", "right"), ("slow", "right"))),
        ),
        notes="The paper says nothing of it.",
    )
    return table._replace(**changes)


def numbers(
    table: Table, where: Path, values: dict[tuple[str, str, int], float | None], **protocol
) -> list[plan.MeasurementJob]:
    """Jobs of three seeds with made-up numbers by (row, name, seed), each with a protocol."""
    todo = plan.plan_jobs(table, "tiny", range(3), where)
    for job in todo:
        actual = {name: values.get((job.row, name, job.seed), 0.5) for name in job.group.columns.values()}
        recorded = {"name": None, "num_samples": 40, "diversity_prompts": 9, "reference": "digits", "reference_images": 1797,
                "reference_fingerprint": "abc", "networks": {"digits": "a"}, "nimg": 256, "guidance": 1.5, "sigma_rel": 0.1}  # fmt: skip
        atomic_io.write_json(job.path, {
            "by": job.group.method, "row": job.row, "seed": job.seed, "evaluation": job.evaluation_args, "values": actual,
            "training": [one.command for one in plan.unique_trainings([job])], "protocol": recorded | protocol.get(job.row, {}),
            "minutes": 0.25, "training_minutes": 1.5 * bool(job.training), "environment": {"device": "cpu", "threads": 1, "torch": "2.13"},
        })  # fmt: skip
    return todo


@pytest.fixture
def known(monkeypatch):
    """The fake as a table that there is, and a way of counting that needs no torch."""
    monkeypatch.setitem(TABLES, "test/1", fake)
    monkeypatch.setitem(runner.measurements.MEASUREMENT_METHODS, "counts", lambda job: {"values": {"parameters": 17.0}})


# Jobs and trainings


def test_jobs_of_rows_parts_and_seeds(tmp_path):
    todo = plan.plan_jobs(fake(), "tiny", range(2), tmp_path)
    assert [(job.row, job.group.method, job.seed) for job in todo] == [
        ("slow", "scores", 0), ("fast", "scores", 0), ("fast, guided", "scores", 0), ("slow", "counts", 0),
        ("slow", "scores", 1), ("fast", "scores", 1), ("fast, guided", "scores", 1),
    ]  # fmt: skip
    assert [job.row for job in plan.plan_jobs(fake(), "tiny", [0], tmp_path, ["fast"])] == ["fast"]
    assert len({job.path for job in todo}) == 7


def test_trainings_are_shared_within_and_between_tables(tmp_path):
    todo = plan.plan_jobs(fake(), "tiny", range(3), tmp_path)
    assert len(plan.unique_trainings(todo)) == 6  # two rates, three seeds
    other = fake(name="test/2", rows=(Row("its own name"),))
    part = ColumnGroup({"FID": "fd_digits"}, {"its own name": Measurement(FAST)}, settings=DRAWN)
    (job,) = plan.plan_jobs(other._replace(scales={"tiny": Scale((part,), "")}), "tiny", [0], tmp_path)
    assert job.training.folder == todo[1].training.folder and job.path == todo[1].path


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
def test_what_is_not_trained_does_not_count(setting):
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
def test_what_is_trained_counts(setting):
    assert plan.plan_training(Training("digits", (*FAST.settings, setting)), 0, Path("w")).key != FIRST.key


def test_seeds_and_beginnings_count():
    later = Training("digits", FAST.settings, parent=SLOW)
    keys = {
        plan.plan_training(t, seed, Path("w")).key
        for t in (FAST, later, Training("digits", FAST.settings, FAST))
        for seed in (0, 1)
    }
    assert len(keys) == 6
    one = plan.plan_training(later, 0, Path("w"))
    assert one.parent.key == plan.plan_training(SLOW, 0, Path("w")).key and f"init={one.parent.folder}" in one.command
    assert [step.key for step in plan.unique_trainings([plan.MeasurementJob("r", fake().scales["tiny"].groups[0], 0, one, None, (), Path("x"))])] == [
        one.parent.key, one.key,
    ]  # fmt: skip


@given(st.permutations(list(FAST.settings)))
def test_the_order_of_settings_does_not_matter(settings):
    assert plan.plan_training(Training("digits", tuple(settings)), 0, Path("w")).folder == FIRST.folder


# Pages


def test_a_page(tmp_path, known):
    values = {("slow", "fd_digits", s): 9 + s for s in range(3)} | {
        ("fast", "fd_digits", s): 3 + 0.1 * s for s in range(3)
    }
    values |= {("fast", "class_accuracy", 1): None, ("slow", "parameters", 0): 17.0}
    todo = numbers(fake(), tmp_path, values)
    paths = page.write_page(fake(), "tiny", tmp_path, todo, ("train.device=cpu",))
    assert [path.name for path in paths] == ["test-1-tiny.md", "test-1-tiny.html", "README.md"]
    text, html = (path.read_text() for path in paths[:2])
    assert "| slow | 10.00\u00a0\u00b1\u00a01.00 | 9.50 |" in text and "| 3.10\u00a0\u00b1\u00a00.10 | 3.25 |" in text
    assert (
        "| fast, guided | **0.50\u00a0\u00b1\u00a00.00** | diverged |" in text and text.count("**0.5") == 1
    )  # all alike: none is best
    assert "| never made | - | - | - | - |" in text and "(1 of 3 NaN)" in text
    assert "not FID" in text and "As small as can be." in text and "Every training with train.device=cpu." in text
    assert "| A higher rate is better | **reproduced** | +6.9 (+5.38 to +8.42) | +6.25 |" in text
    assert "| It is right more often | **undecided**" in text  # a NaN is no number
    assert "# Rates \\| of \\<two\\> kinds" in text and "<h1>Rates | of &lt;two&gt; kinds</h1>" in html
    assert (
        "gesso reproduce test/1 train.device=cpu --scale tiny --seeds 3" in text
        and text.count("gesso train digits") == 6
    )
    assert str(tmp_path) not in text + html and "tables/trained/digits-" in text
    assert 'class="tag"' in html and "src=" not in html and "The paper says nothing of it." in html
    assert "A row and seed took 1.8 minutes (cpu, 1 thread, torch 2.13); expected for a row: a second." in text
    recorded = json.loads((tmp_path / "test-1-tiny.json").read_text())
    assert (
        recorded["rows"]["slow"]["FID"]["ours"] == {"0": 9, "1": 10, "2": 11}
        and recorded["rows"]["slow"]["FID"]["published"] == 9.5
    )
    assert (
        recorded["rows"]["fast"]["right"]["ours"]["1"] == "NaN"
        and recorded["rows"]["fast, guided"]["FID"]["published"] == "diverged"
    )
    assert recorded["claims"][0]["verdict"] == "reproduced" and recorded["claims"][0]["published_effect"] == 6.25
    assert str(tmp_path) not in json.dumps(recorded)


def test_stored_pages_are_judged_again(tmp_path, known, gesso, monkeypatch):
    """`gesso reproduce judge`: the same page from its JSON alone; other claims, another verdict; the mark stays."""
    values = {("slow", "fd_digits", s): 9 + s for s in range(3)} | {("fast", "class_accuracy", 1): None}
    page.write_page(fake(), "tiny", tmp_path, numbers(fake(), tmp_path, values))
    for path in tmp_path.glob("measured/*"):
        path.unlink()
    before = {end: (tmp_path / f"test-1-tiny.{end}").read_text() for end in ("md", "html", "json")}
    assert gesso("reproduce", "judge", "--out", tmp_path)[0] == 0
    assert before == {end: (tmp_path / f"test-1-tiny.{end}").read_text() for end in ("md", "html", "json")}
    claim = Claim("The contrary", claims.improves_on(("slow", "FID"), ("fast", "FID")))
    monkeypatch.setitem(TABLES, "test/1", lambda: fake(claims=(claim,)))
    stored = json.loads(before["json"]) | {"outdated": "the recipes have changed."}
    atomic_io.write_json(tmp_path / "test-1-tiny.json", stored)
    assert gesso("reproduce", "judge", "--out", tmp_path)[0] == 0
    text = (tmp_path / "test-1-tiny.md").read_text()
    assert "| The contrary | **contradicted** |" in text and "To be made again: the recipes have changed." in text
    assert "1 contradicted; to be made again |" in (tmp_path / "README.md").read_text()


def test_a_diverged_seed_and_a_lone_one(tmp_path, known):
    todo = numbers(fake(), tmp_path, {})
    for job in todo:
        if job.row == "fast" or (job.row == "slow" and job.seed == 2 and job.group.method == "scores"):
            atomic_io.write_json(job.path, {"training": [], "diverged": "at image 3"})
        if job.row == "fast, guided" and job.seed:
            job.path.unlink()
    text = page.write_page(fake(), "tiny", tmp_path, todo)[0].read_text()
    assert "(1 of 3 diverged)" in text and "| fast | diverged | 3.25 | diverged |" in text
    assert "(1 of 3 seeds)" in text and "| it diverged | +6.25 |" in text and "**contradicted**" not in text


def test_what_needs_no_seed_needs_no_second(tmp_path, known):
    claim = Claim("It is small", lambda seed: claims._tests(20 - seed["slow", "size"]))
    table = fake(claims=(claim,))
    todo = plan.plan_jobs(table, "tiny", [0], tmp_path)
    (counted,) = [job for job in todo if job.group.method == "counts"]
    atomic_io.write_json(counted.path, {"training": [], "values": {"parameters": 17.0}})
    result = results.collect_result(table, "tiny", tmp_path, todo)
    assert result.verdicts[0][0].verdict == claims.Verdict.EXACT and result.cells["slow", "size"].spread is None


def test_cells_measured_otherwise_are_marked(tmp_path, known):
    """But not for what their row varies on purpose, nor for the EMA length and time of their own training."""
    unlike = {
        "fast": {"num_samples": 20, "diversity_prompts": 1, "sigma_rel": 0.2, "nimg": 9},
        "fast, guided": {"guidance": 2.0, "networks": {"digits": "b", "classifier": "c"}},
    }
    todo = numbers(fake(), tmp_path, {}, **unlike)
    result = results.collect_result(fake(), "tiny", tmp_path, todo)
    assert result.notes == ["num_samples 20, where other rows have 40", "network digits b, where other rows have a"]
    assert {cell: n.notes for cell, n in result.cells.items() if n.notes} == {
        ("fast", "FID"): (1,), ("fast", "right"): (1,), ("fast, guided", "FID"): (2,), ("fast, guided", "right"): (2,),
    }  # fmt: skip
    text = page.write_page(fake(), "tiny", tmp_path, todo)[0].read_text()
    assert "<sup>1</sup> num\\_samples 20" in text and text.count("<sup>2</sup>") == 3


def test_another_reference_or_another_measure_is_marked(tmp_path):
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
    todo = numbers(table, tmp_path, {}, **{"never made": {"reference": "shapes"}})
    notes = footnotes.footnotes(table, todo, {job.path: runner.read_record(job.path) for job in todo})[1]
    assert any(note.startswith("reference 1,797 of shapes (abc), where") for note in notes)
    assert "measure digits_feature_distance, where other rows have fd_digits" in notes


def curves(where: Path, names: str) -> tuple[Table, list[plan.MeasurementJob]]:
    rows = tuple(Row(f"{x:g}", x=x) for x in (0.01, 0.1, 1.0, 10.0))
    parts = tuple(
        ColumnGroup({name: "fd_digits"}, {row.name: Measurement(FAST, (f"sample.S_noise={row.x}{i}",)) for row in rows})
        for i, name in enumerate(names)
    )
    table = fake(name="test/fig2", columns=tuple(Column(name) for name in names), rows=rows, x="length", claims=(),
                 scales={"tiny": Scale(parts, "")})  # fmt: skip
    todo = numbers(table, where, {(r.name, "fd_digits", s): (r.x - 1) ** 2 + 1 + s for r in rows for s in range(3)})
    return table, todo


def test_a_figure_has_a_picture(tmp_path):
    table, todo = curves(tmp_path, "abcdefg")
    for job in todo:
        if job.group.columns == {"c": "fd_digits"} and job.row == "10":
            atomic_io.write_json(job.path, {"training": [], "diverged": "x"})
    paths = page.write_page(table, "tiny", tmp_path, todo)
    assert (tmp_path / "test-fig2-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "](test-fig2-tiny.png)" in paths[0].read_text() and paths[1].read_text().count("<svg") == 1
    ((figure, _),) = page.plots.make_plots(results.collect_result(table, "tiny", tmp_path, todo), todo)
    (axes,) = figure.axes
    named = {line.get_label(): line for line in axes.lines}
    assert [name for name in named if len(name) == 1] == list("abcdefg") and axes.get_xscale() == "log"
    assert named["a"].get_ydata().tolist() == pytest.approx([(x - 1) ** 2 + 2 for x in (0.01, 0.1, 1, 10)])
    assert math.isnan(named["c"].get_ydata()[3]) and axes.get_xlabel() == "length"
    assert sum(len(line.get_xdata()) for line in axes.lines if line.get_label().startswith("_")) == 1  # one cross


def test_a_figure_of_samples_shows_them_once(tmp_path):
    """Of the first seed, whatever the number of seeds; how many counts for all."""
    part = ColumnGroup({"samples": "pictures"}, {"fast": Measurement(FAST)}, method="pictures")
    table = fake(name="test/fig9", columns=(Column("samples", None),), rows=(Row("fast"),), claims=(),
                 scales={"tiny": Scale((part,), "")})  # fmt: skip
    todo = plan.plan_jobs(table, "tiny", range(3), tmp_path)
    assert [job.seed for job in todo] == [0] and len(plan.unique_trainings(todo)) == 1
    atomic_io.write_json(todo[0].path, {"training": [todo[0].training.command], "values": {"pictures": 12}})
    paths = page.write_page(table, "tiny", tmp_path, todo)
    assert not (tmp_path / "test-fig9-tiny.png").exists() and "| fast | 12 |" in paths[0].read_text()
    Image.new("RGB", (40, 10), "red").save(page.plots.sample_grids.sample_grid(todo[0]))
    paths = page.write_page(table, "tiny", tmp_path, todo)
    with Image.open(tmp_path / "test-fig9-tiny.png") as picture:
        width, height = picture.size
    assert width == pytest.approx(4 * height, rel=0.02) and paths[1].read_text().count("<svg") == 1
    assert "![" in paths[0].read_text() and "\n\nfast\n" in paths[0].read_text()


def test_a_figure_over_a_column(tmp_path, known):
    """Rows without an x stand at what was measured of the column that the axis is named after."""
    part = ColumnGroup(
        {"cost": "fd_digits", "right": "class_accuracy"},
        {"slow": Measurement(SLOW), "fast": Measurement(FAST)},
        settings=DRAWN,
    )
    table = fake(
        columns=(Column("cost", None), Column("right", False)), x="cost", scales={"tiny": Scale((part,), "")}, claims=()
    )
    values = {(row, "fd_digits", s): x for s in range(3) for row, x in (("slow", 4.0), ("fast", 2.0))}
    todo = numbers(table, tmp_path, values | {("fast", "class_accuracy", s): 0.75 for s in range(3)})
    ((figure, _),) = page.plots.make_plots(results.collect_result(table, "tiny", tmp_path, todo), todo)
    line = figure.axes[0].lines[0]
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([2, 4], [0.75, 0.5])
    assert "|  | cost | right \u2191 |" in page.write_page(table, "tiny", tmp_path, todo)[0].read_text()


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    table, todo = curves(tmp_path, "a")
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    paths = page.write_page(table, "tiny", tmp_path, todo)
    assert all("it needs matplotlib" in path.read_text() for path in paths[:2]) and not list(tmp_path.glob("*.png"))


def test_a_checklist_reads_the_verdicts_of_its_tables(tmp_path, known):
    checks = (Check("Which rate?", "a high one", "test/1", 0), Check("Which size?", "large", "test/9", 1))
    table = Table("test/a5", "Advice", "Nobody 2024", (), (), {}, checks=checks)
    values = {("slow", "fd_digits", s): 9 + s for s in range(3)}
    page.write_page(fake(), "tiny", tmp_path, numbers(fake(), tmp_path, values))
    text = page.write_page(table, "tiny", tmp_path, [])[0].read_text()
    assert "| Which rate? | a high one | **reproduced** | A higher rate is better | test/1 |" in text
    assert "| Which size? | large | **not measured** | - | test/9 |" in text
    listed = (tmp_path / "README.md").read_text()
    assert (
        "| [test/1](test-1-tiny.md) | Rates \\| of \\<two\\> kinds | tiny | 3 | 1 of 2 claims reproduced, 1 undecided |"
        in listed
    )
    assert "| tiny | - | 1 of 2 checks reproduced, 1 not measured |" in listed


def test_column_descriptions():
    table = fake()
    first = table.scales["tiny"].groups[0]
    lengths = tuple(
        first._replace(
            columns={"FID": "1-all"},
            best="least",
            rows={"slow": Measurement(SLOW, (f"sample.sigma_rel={s}", "sample.steps=3"))},
        )
        for s in (0.05, 0.1)
    )
    todo = plan.plan_jobs(
        table._replace(scales={"tiny": Scale((*lengths, *table.scales["tiny"].groups[1:]), "")}), "tiny", [0], Path("w")
    )
    recorded = page.labels.describe_columns(table, todo)
    assert recorded["FID"].startswith("one minus the share of samples") and recorded["FID"].endswith(
        ", the least over sample.sigma_rel"
    )
    assert recorded == {
        **recorded,
        "right": "not made at this scale",
        "size": "parameters (counts of the network that a run builds, without training it)",
    }


def test_names_are_in_the_order_of_their_numbers():
    names = ["a/fig11", "a/2b", "a/fig2", "a/10", "a/2a"]
    assert sorted(names, key=index.natural_key) == ["a/2a", "a/2b", "a/10", "a/fig2", "a/fig11"]


def test_another_readme_is_not_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="choose another --out"):
        index.write_index(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("values", "due"),
    [
        ([1.7931, 2.0], "1.793"), ([280.21, 1523.2], "280"), ([0.98765], "0.9877"), ([1e-9, 5.0], "1e-09"), ([0.0], "0.000"),
        ([-3.14159], "-3.142"), ([0.0000234, 0.02], "2.34e-05"), ([math.nan], "NaN"), ([math.inf, 2.0], "diverged"),
    ],
)  # fmt: skip
def test_digits(values, due):
    cells = [results.CellNumbers({0: value}) for value in values]
    assert page.format_number(values[0], page.significant_digits(cells)) == due


# Making


def test_what_is_measured_is_not_measured_again(tmp_path, known, monkeypatch):
    calls = []

    def measured(job):
        calls.append((job.row, job.seed))
        return {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}}

    monkeypatch.setitem(runner.measurements.MEASUREMENT_METHODS, "scores", measured)
    monkeypatch.setattr(runner, "start_training", lambda *arguments: None)
    todo = plan.plan_jobs(fake(), "tiny", range(2), tmp_path)
    assert [job.row for job in runner.run_jobs(todo, QUIET, lambda text: None)] == [job.row for job in todo]
    assert len(calls) == 6
    output = []
    assert len(list(runner.run_jobs(todo, QUIET, output.append))) == 7 and len(calls) == 6 and output == []
    todo[1].path.unlink()
    list(runner.run_jobs(todo, QUIET, output.append))
    assert calls[6:] == [("fast", 0)] and output[0] == "2 of 7: fast, FID, right, seed 0"


def test_a_row_that_diverges_is_a_result(tmp_path, known, monkeypatch):
    tried = []

    def start(run, folder, *arguments):
        tried.append(run.optim.lr)
        if run.optim.lr == 4e-3:
            raise DivergenceError("the loss is not finite at image 64\nTry a lower optim.lr")

    monkeypatch.setattr(runner, "start_training", start)
    monkeypatch.setitem(
        runner.measurements.MEASUREMENT_METHODS,
        "scores",
        lambda job: {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}},
    )
    todo = plan.plan_jobs(fake(), "tiny", [0], tmp_path)
    list(runner.run_jobs(todo, QUIET, lambda text: None))
    assert tried == [1e-4, 4e-3]  # two rows have the second: it is not tried again
    actual = runner.collect_values(todo)[0]
    assert actual["slow", "FID"] == 1 and actual["fast", "FID"] == actual["fast, guided", "right"] == DIVERGED
    assert runner.read_record(todo[1].path)["diverged"] == "the loss is not finite at image 64"


def test_what_is_stopped_names_the_command_that_goes_on(tmp_path, known, monkeypatch):
    """A signal in the middle of a training: its state is saved, and the same command goes on from there."""
    after, sent = loop.Monitor.on_step_end, []

    def interrupted(watcher, before):
        after(watcher, before)
        if not sent and before >= 96:
            sent.append(before)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.Monitor, "on_step_end", interrupted)
    monkeypatch.setitem(
        runner.measurements.MEASUREMENT_METHODS,
        "scores",
        lambda job: {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}},
    )
    todo = plan.plan_jobs(fake(), "tiny", [0], tmp_path, ["slow"])
    with pytest.raises(StoppedError) as stopped:
        list(runner.run_jobs(todo, QUIET, lambda text: None, "gesso reproduce test/1"))
    recorded = str(stopped.value).splitlines()
    assert recorded == ["SIGINT at image 160: the state is saved. Resume with", "  gesso reproduce test/1"]
    assert stopped.value.exit_code == 130 and not todo[0].path.exists()
    console = Console(record=True, quiet=False, file=io.StringIO())
    list(runner.run_jobs(todo, console, lambda text: None))
    assert "resumed at image 160" in console.export_text() and runner.is_finished(todo[0].training)
    monkeypatch.setitem(
        runner.measurements.MEASUREMENT_METHODS, "counts", lambda job: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    todo[1].path.unlink()
    with pytest.raises(StoppedError, match=r"finished work is stored\. Resume with\n  gesso reproduce test/1"):
        list(runner.run_jobs(todo, QUIET, lambda text: None, "gesso reproduce test/1"))


def test_two_processes_share_the_work(tmp_path, known, monkeypatch):
    """What another one is making is left to it, done last, and not done again."""
    monkeypatch.setattr(runner, "POLL_INTERVAL_S", 0.001)
    monkeypatch.setattr(runner, "start_training", lambda *arguments: None)
    monkeypatch.setitem(
        runner.measurements.MEASUREMENT_METHODS,
        "scores",
        lambda job: {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}},
    )
    todo, output = plan.plan_jobs(fake(), "tiny", [0], tmp_path), []
    with atomic_io.try_lock(todo[0].training.folder) as mine:
        assert mine
        order = []
        for job in runner.run_jobs(todo, QUIET, output.append):
            order.append((job.row, job.group.method))
            if len(order) == 3:
                break
    assert order == [("fast", "scores"), ("fast, guided", "scores"), ("slow", "counts")]
    held = atomic_io.try_lock(todo[0].path)
    assert held.__enter__()

    def other(text):
        output.append(text)
        if text.startswith("waiting"):
            atomic_io.write_json(todo[0].path, {"values": {"fd_digits": 2.0, "class_accuracy": 1.0}})
            held.__exit__(None, None, None)

    assert len(list(runner.run_jobs(todo, QUIET, other))) == 4
    assert (
        output[-1] == "waiting for another process, which runs slow, seed 0"
        and runner.collect_values(todo)[0]["slow", "FID"] == 2
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


# What it would take


def reproduce_args(where: Path, **changes) -> ReproduceArgs:
    return ReproduceArgs("test/1", (), "tiny", (), 2, where, True)._replace(**changes)


def test_a_dry_run(tmp_path, known):
    todo = plan.plan_jobs(fake(), "tiny", range(2), tmp_path)
    text = "\n".join(dry_run.dry_run_lines(fake(), reproduce_args(tmp_path), todo))
    assert text.startswith("test/1 at --scale tiny: 7 measurements (0 done) of 4 trainings (0 done), 2 seeds")
    assert text.count("gesso train digits") == 4 and "torchrun" not in text and "GPU-hours" not in text
    assert (
        "counts of slow" in text
        and "needed, available: digits, scikit-learn" in text
        and text.endswith("nothing was run")
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    table = get_table(TABLES, "berrada/2a")
    todo = plan.plan_jobs(table, "paper", [0], Path("tables"), ["uniform"])
    text = "\n".join(dry_run.dry_run_lines(table, reproduce_args(Path("tables"), scale="paper", seeds=1), todo))
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
    run = todo[0].training.run
    run = run.model_copy(update={"latent": run.latent.model_copy(update={"vae": str(tmp_path / "vae")})})
    assert {need.label: need.available for need in requirements.training_requirements(run) if "vae" in need.label} == {
        f"the VAE {tmp_path}/vae": True
    }
    assert next(requirements.training_requirements(todo[0].training.run)).available


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
    actual = [need.label for need in requirements.measurement_requirements(run)]
    assert "dinov2 facebook/dinov2-large" in actual and actual.count("clip a/b") == 2 and "pt_inception" in actual[-1]


def test_hours_by_hand(tmp_path):
    """EDM2-S is 102 G multiply-accumulates (Table 2); its training of 2^31 images took 5.3 days on 32 A100 (Table 6)."""
    run = plan.plan_training(Training("edm2-img512-s"), 0, tmp_path).run
    cost = estimates.training_cost(run)
    assert cost.hours == pytest.approx(2 * 3 * 102e9 * 2**31 / (0.4 * 312e12) / 3600, rel=0.02)
    assert (
        cost.published == 5.3 * 32 * 24
        and cost.disk_bytes.num_snapshots == 2 * 256
        and cost.parameters == pytest.approx(280.2e6, rel=1e-3)
    )
    shorter = plan.plan_training(Training("edm2-img512-s", ("train.total_images=1M",)), 0, tmp_path).run
    assert estimates.training_cost(shorter).published is None


@pytest.mark.parametrize(
    ("output", "passes"),
    [
        ((), 20 * 2), (("sample.guidance=1",), 20), (("sample.sampler=heun",), 39 * 2), (("eval.num_repeats=3",), 3 * 20 * 2),
        (("control.variables=size", "sample.control_guidance=1.4"), 20 * 3),
        (("control.variables=size", "eval.metrics=digits_feature_distance", "eval.diversity_prompts=50"), 20 * 2),
    ],
)  # fmt: skip
def test_passes_of_drawing(tmp_path, output, passes):
    """Hours of 100 samples, in passes of the network."""
    part = ColumnGroup({}, {"r": Measurement(Training("digits", tuple(s for s in output if s.startswith("control"))), tuple(s for s in output if not s.startswith("control")))},
                settings=("eval.metrics=fd_digits", "eval.num_samples=100"))  # fmt: skip
    table = fake(rows=(Row("r"),), scales={"tiny": Scale((part,), "")})
    (job,) = plan.plan_jobs(table, "tiny", [0], tmp_path)
    run = estimates.resolved_config(estimates.evaluation_config(job))
    one = estimates.count_macs(run.net, run.input_spec, run.semantic.max_tokens).macs
    assert estimates.measurement_hours(job) == pytest.approx(estimates.gpu_hours(100 * passes * one, "float32"))


def test_slurm_scripts(tmp_path, known):
    """They parse; submit.sh, with a stand-in for sbatch, lets a training wait for the one it starts from alone."""
    part = ColumnGroup(
        {"FID": "fd_digits"},
        {
            "slow": Measurement(SLOW),
            "fast": Measurement(Training("digits", FAST.settings, parent=SLOW)),
            "never made": Measurement(FAST, guide=SLOW),
        },
        settings=DRAWN,
    )
    table = fake(scales={"tiny": Scale((part,), "")})
    where, out = tmp_path / "some where", tmp_path / "jobs"
    todo = plan.plan_jobs(table, "tiny", range(2), where)
    lines = slurm.write_scripts(table, reproduce_args(where, slurm=out), todo)
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
    recorded = subprocess.run(
        ["bash", measure], env=env, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert recorded == [
        "gesso",
        "reproduce",
        "test/1",
        "--scale",
        "tiny",
        "--rows",
        "fast",
        "--seeds",
        "2",
        "--out",
        str(where),
    ]
    recorded = subprocess.run(["bash", train], env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    child = plan.unique_trainings(todo)[1]
    assert recorded[:3] == ["gesso", "train", "digits"] and f"init={child.parent.folder}" in recorded
    assert recorded[-3:] == ["--out", str(child.folder), "--resume"]


def test_slurm_on_many_gpus_is_torchrun(tmp_path):
    text = slurm.format_script("a", "b", ["  0) command=(gesso train x) ;;"], 8)
    assert "--gpus-per-node=8" in text and '-m "${command[@]}" &' in text and '--nnodes="$SLURM_NNODES"' in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TABLES))
def test_every_table_at_every_scale(name, tmp_path):
    table = get_table(TABLES, name)
    for scale in table.scales:
        todo = plan.plan_jobs(table, scale, [0], tmp_path)
        assert dry_run.dry_run_lines(table, ReproduceArgs(name, scale=scale, out=tmp_path, dry_run=True), todo)


# The command


def test_two_rows_and_two_seeds(tmp_path, known, gesso):
    """Really trained and measured, then found again."""
    where = tmp_path / "made here"
    code, output, _ = gesso("reproduce", "test/1", "--rows", "slow", "--rows", "fast", "--seeds", 2, "--out", where)
    assert code == 0 and "5 of 5" in output and output.count("gesso train digits") == 4
    assert output.splitlines()[-1].startswith(f"wrote {where}/test-1-tiny.md")
    assert len(list((where / "trained").glob("digits-*/snapshots/*"))) == 4 * 4 * 2
    recorded = json.loads((where / "test-1-tiny.json").read_text())
    for row in ("slow", "fast"):
        values = list(recorded["rows"][row]["FID"]["ours"].values())
        assert len(values) == 2 and all(value > 0 for value in values) and values[0] != values[1]
        assert all(0 <= value <= 1 for value in recorded["rows"][row]["right"]["ours"].values())
        assert recorded["minutes"][row]["training"] > 0
    assert recorded["rows"]["fast, guided"]["FID"]["ours"] == {} and recorded["rows"]["slow"]["size"]["ours"] == {
        "0": 17,
        "1": 17,
    }
    assert recorded["protocols"]["FID"]["num_samples"] == 40 and recorded["environment"][0].startswith("cpu, 1 thread")
    code, again, _ = gesso("reproduce", "test/1", "--rows", "slow", "--seeds", 2, "--out", where)
    assert code == 0 and again.count("\n") <= 2  # nothing but what is written
    assert gesso("reproduce", "test/1", "--rows", "slow", "--out", where)[0] == 0
    assert (
        json.loads((where / "test-1-tiny.json").read_text())["rows"] == recorded["rows"]
    )  # all rows and seeds that are there
    code, listed, _ = gesso("reproduce", "list", "--out", where)
    assert "test/1" in listed and f"{index.count_verdicts(recorded)} (tiny, 2 seeds)" in listed


def test_bad_input(tmp_path, known, gesso, monkeypatch):
    monkeypatch.setitem(
        TABLES, "test/a5", lambda: Table("test/a5", "A", "B", (), (), {}, checks=(Check("q", "r", "test/1"),))
    )
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("x")
    cases = {
        "did you mean test/1?": ("tst/1",),
        "did you mean slow?": ("test/1", "--rows", "slwo"),
        suggest("tyni", ["tiny", "small", "paper"]): ("test/1", "--scale", "tyni"),
        "--scale tiny or small, not 'paper'": ("test/1", "--scale", "paper"),
        "no row of it is defined at --scale small": ("test/1", "--scale", "small"),
        "no row of never made is defined": ("test/1", "--rows", "never made"),
        "--seeds 0: must be at least 1": ("test/1", "--seeds", 0),
        "is a file: name a folder": ("test/1", "--slurm", tmp_path / "file"),
        "choose another": ("test/1", "--out", tmp_path / "file"),
        "choose another --out": ("test/1", "--out", tmp_path / "other"),
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


def test_what_fails_leaves_a_page_of_what_is_there(tmp_path, known, gesso, monkeypatch):
    def fails(job):
        if job.row == "fast":
            raise UsageError("weights are missing")
        return {"values": {"fd_digits": 1.0, "class_accuracy": 1.0}}

    monkeypatch.setattr(runner, "start_training", lambda *arguments: None)
    monkeypatch.setitem(runner.measurements.MEASUREMENT_METHODS, "scores", fails)
    code, _, error = gesso("reproduce", "test/1", "--out", tmp_path)
    assert (
        code == 2 and "weights are missing" in error and "| slow | **1" not in (tmp_path / "test-1-tiny.md").read_text()
    )
    assert json.loads((tmp_path / "test-1-tiny.json").read_text())["rows"]["slow"]["FID"]["ours"] == {"0": 1.0}


def test_the_list_is_by_paper(gesso, tmp_path):
    code, listed, _ = gesso("reproduce", "list", "--out", tmp_path)
    heads = [line for line in listed.splitlines() if line and not line.startswith(" ")]
    assert code == 0 and heads[0] == cli.PAPERS["berrada"] and "berrada/2a" in listed
    assert list(itertools.chain(heads))[-1].startswith("gesso reproduce NAME")
