"""Pages on runs: what is on them, that they stand alone, and that they say what is wrong."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.run_factory import tiny_run
from PIL import Image
from typer.testing import CliRunner

from gesso import config, report
from gesso.cli import app
from gesso.errors import UsageError
from gesso.evaluation import results
from gesso.report import compare, load, plotting
from gesso.report.render import Figure
from gesso.reproduce.markdown import escape, format_table_cell, markdown_to_html, to_markdown_table
from gesso.training.run_folder import open_dataset_for_run

MEASURED = {"class_accuracy": 0.9, "frechet_distance": 1.5, "frechet_distance_std": 0.1}


def record(folder: Path, *evaluations: results.Evaluation) -> None:
    """Write metrics.json with these evaluations only."""
    (folder / "metrics.json").unlink(missing_ok=True)
    for evaluation in evaluations:
        results.record_evaluation(folder, evaluation)


def toy_evaluation(steps: int, reference: dict[str, float]) -> results.Evaluation:
    protocol = {"series": "guided", "toy_metrics": "digits", "guidance": 2.0, "steps": steps, "num_samples": 10}
    return results.Evaluation(protocol, {}, results.single_values(MEASURED), reference)


def written(out: Path, lines: list[dict], toy: results.Evaluation | None = None, **settings) -> Path:
    """A run folder as training leaves it, made up."""
    from rich.console import Console

    run, _ = open_dataset_for_run(tiny_run(**settings), Console(quiet=True))
    out.mkdir(parents=True)
    config.save_config(run, out / "run.yaml")
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if toy:
        record(out, toy)
    (out / "sheets").mkdir()
    for nimg in (1000, 2000, 3000, 4000, 5000):
        Image.new("L", (8, 8), nimg // 20).save(out / "sheets" / f"nimg{nimg:012d}.png")
    return out


def log(scale: float = 1.0, n: int = 40) -> list[dict]:
    lines: list[dict] = [{"nimg": 0, "unreadable": [["bad <name>.png", "truncated"]]}]
    for i in range(1, n + 1):
        loss = scale / i
        lines.append({
            "nimg": 100 * i, "loss": loss, "lr": 1e-3, "loss_by_noise": [None] + [loss * (b + 1) for b in range(1, 10)],
            "grad_norm": 1.0 + i % 3, "images_per_second": 50.0,
            "data_wait_fraction": 0.01, "mfu": 0.3, "matmul_tflops": 0.1,
        })  # fmt: skip
        if i % 10 == 0:
            by = [loss] * 10
            lines.append({"nimg": 100 * i, "validation": {"weights": 2 * loss, "ema0.05": loss},
                          "validation_by_noise": {"weights": by, "ema0.05": by}})  # fmt: skip
            pair = [2.0 + scale * i, 1.0 + scale * i]
            lines.append(
                {
                    "nimg": 100 * i,
                    "magnitudes": {k: {"block 1": pair, "blocks 2-3": pair} for k in ("activations", "weights")},
                }
            )
            lines.append({"nimg": 100 * i, "metrics": MEASURED})
    return lines


class Checker(HTMLParser):
    """Raises when elements are not closed in order; collects what would be loaded."""

    VOID = {"meta", "img", "link", "br", "path", "use", "image"}

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.headings, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("data:", "#")):
                self.loaded.append((tag, value))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        self.text.append(data)


def checked(page: Path) -> Checker:
    actual = Checker()
    actual.feed(page.read_text())
    assert actual.open == [] and actual.loaded == []
    assert "@import" not in page.read_text() and "<script" not in page.read_text()
    return actual


def test_a_page_on_one_run(tmp_path):
    out = written(tmp_path / "one & <only>", log())
    assert report.write_report(out) == out / "report.html"
    actual = checked(out / "report.html")
    assert actual.headings == [
        "Samples", "Samples during training", "Training", "Loss by noise level", "Magnitudes", "Speed", "Environment",
        "Recipe",
    ]  # fmt: skip
    text = " ".join(actual.text)
    assert "one & <only>" in text and "bad <name>.png" in text and "4,000" in text
    assert (out / "report.html").read_text().count("data:image/png") == 4  # of five, evenly
    assert "image 1,000" in text and "image 5,000" in text
    # The same bytes again.
    before = (out / "report.html").read_bytes()
    report.write_report(out)
    assert (out / "report.html").read_bytes() == before


def test_a_log_of_an_older_run_and_one_without_lines(tmp_path):
    plain = [
        {"nimg": 100 * i, "loss": 1 / i, "lr": 1e-3, "grad_norm": None, "images_per_second": 5.0} for i in (1, 2, 3)
    ]
    checked(report.write_report(written(tmp_path / "old", plain)))
    checked(report.write_report(written(tmp_path / "none", [])))
    checked(report.write_report([tmp_path / "old", tmp_path / "none"], tmp_path / "both.html"))


def test_comparison_of_runs(tmp_path):
    a = written(tmp_path / "a", log(), toy_evaluation(20, {"frechet_distance": 0.5}))
    b = written(tmp_path / "b", log(2.0), toy_evaluation(32, {}), **{"optim.lr": 0.5, "train.seed": 3})
    actual = checked(report.write_report([a, b], tmp_path / "page.html"))
    assert actual.headings == ["Scores", "Samples", "Training", "Magnitudes", "Speed", "Settings that differ"]
    page = (tmp_path / "page.html").read_text()
    cells = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert ("optim.lr", "0.002", "0.5") in cells and ("train.seed", "0", "3") in cells
    assert ("Frechet distance, guidance 2", "1.5 \u00b1 0.1", "1.5 \u00b1 0.1") in cells
    assert ("class accuracy, guidance 2", "90.0%", "90.0%") in cells
    assert ("Frechet distance, training images", "0.5", "\u2013") in cells and ("steps", "20", "32") in cells
    assert not [row for row in cells if row[0] in ("net.hidden_size", "num_samples")]
    assert page.count("data:image/png") == 2


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b/a"):
        written(tmp_path / name, log(n=3))
    done = CliRunner().invoke(app, ["report", "a", "b/a"])
    assert done.exit_code == 0 and "wrote report.html" in done.output
    assert "b/a" in checked(tmp_path / "report.html").text  # equal names are told apart by their paths
    with pytest.raises(UsageError, match="a run is given twice"):
        report.write_report([Path("a"), tmp_path / "a"])
    with pytest.raises(UsageError, match="nowhere has no trained run"):
        report.write_report([Path("a"), Path("nowhere")])


def test_long_curves_are_averaged_in_groups(tmp_path):
    lines = [{"nimg": i, "loss": float(i)} for i in range(1, 1001)]
    actual = load.RunData(tmp_path, "x", None, lines)
    x, y = actual.curve("loss")
    assert len(x) <= load.MAX_POINTS and x[-1] == 1000 and y[0] == 2.5 and x[0] == 4  # of 1, 2, 3, 4
    assert sum(y) / len(y) == pytest.approx(500.5)
    assert actual.curve("loss_by_noise", 3) == ([], []) and actual.last("none", 2) is None


def test_what_is_late(tmp_path):
    lines = [{"nimg": i, "by": [None, float(i)]} for i in range(1, 21)]
    assert load.RunData(tmp_path, "x", None, lines).late_mean("by") == [None, 19.5]
    assert load.RunData(tmp_path, "x", None, []).late_mean("by") == []


def test_growth_is_relative_to_the_first(tmp_path):
    lines = [{"nimg": n, "magnitudes": {"weights": {"a": [n, 1.0], "b": [3 * n, 3.0]}}} for n in (1, 2)]
    actual = load.RunData(tmp_path, "x", None, lines)
    assert compare.growth(actual, "weights", 0) == ([1, 2], [1.0, 2.0])
    assert compare.growth(actual, "weights", 1) == ([1, 2], [1.0, 1.0])


def test_strokes_of_many_runs_differ():
    assert len({plotting.line_style(i) for i in range(8)}) == 8
    svg = plotting.plot_curves({f"run {i}": ([1.0, 2.0], [i, i + 1.0]) for i in range(6)}, "loss")
    assert svg.startswith("<svg") and all(color in svg for color in plotting.COLORS[:6])
    assert plotting.plot_curves({"a": ([1.0], [1.0])}, "loss") == "" == plotting.plot_curves({}, "loss")


def test_no_figure_without_matplotlib(tmp_path, monkeypatch):
    out = written(tmp_path / "run", log(n=2))
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"reports need matplotlib: pip install 'gesso-diffusion\[plots\]'"):
        report.write_report(out)


def measurement(fid: float, name: str = "berrada", **protocol) -> results.Evaluation:
    base = {
        "name": name,
        "num_samples": 50_000,
        "num_repeats": 1,
        "steps": 250,
        "nimg": 4000,
        "sigma_rel": 0.05,
        "labels": None,
        "networks": {"inception": "x"},
    }
    return results.Evaluation(base | protocol, {}, results.single_values({"fid": fid}))


def test_one_table_per_protocol(tmp_path):
    a, b = written(tmp_path / "a", log()), written(tmp_path / "b", log())
    least = measurement(2.5, "edm2", num_repeats=3)
    record(a, measurement(7.25), least)
    record(b, measurement(6.75, nimg=9000, sigma_rel=0.1), measurement(8.5, steps=50))
    one = checked(report.write_report([a], None))
    assert "Evaluations" in one.headings and {
        "7.25",
        "2.5",
        "best of 3",
        "berrada: 50,000 samples, image 4,000",
    } <= set(one.text)
    lossy = {"loss": 0.5, **{f"loss_{10 * i}_{10 * i + 10}": i + 0.125 for i in range(10)}}
    other = {"networks": {}, "validation_pairs": 700, "sigma_rel": 0.1, "name": None}
    pairs = measurement(0, **other)._replace(metrics=results.single_values(lossy))
    record(a, measurement(7.25), least, pairs)
    text = " ".join(checked(report.write_report([a], None)).text)
    assert (
        "berrada: 50,000 samples, image 4,000, sigma_rel 0.05" in text
        and "scores: 700 pairs, image 4,000, sigma_rel 0.1" in text
    )
    assert "by noise, clean to noise 0.125 1.12 2.12" in text and "loss_0_10" not in text
    both = checked(report.write_report([a, b], tmp_path / "both.html"))
    text = " ".join(both.text)
    # Three ways: at 250 steps both runs, in one table; the others alone.
    assert "7.25 6.75" in text and both.text.count("berrada: 50,000 samples") == 2 and "8.5" in both.text
    assert both.text.count("edm2: 50,000 samples") == 1
    # Several lengths of one run are told apart.
    record(a, *(measurement(10 * s, sigma_rel=s) for s in (0.05, 0.2)))
    text = " ".join(checked(report.write_report([a, b], tmp_path / "both.html")).text)
    assert "sigma_rel 0.05" in text and "sigma_rel 0.2" in text and " 0.5 " in text and " 2 " in text


def test_report_notes_runs_of_both_loss_reductions(tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for folder, reduction in ((one, "mean"), (two, "sum"), (three, "sum")):
        written(folder, log(), **{"loss.reduction": reduction})
    for folders, has_note in (([one, two], True), ([two, three], False)):
        captions = " ".join(figure.caption for figure in compare.training(load.load_runs(folders)))
        assert ("C*H*W times" in captions) == has_note


def test_markdown_pages_become_html_in_the_style_of_reports(tmp_path):
    """Texts are the same after both escapes; verdicts are tags, published numbers gray, images inline."""
    text = "a|b *c* _d_ <e> & `f` [g](h) ~i~ $j$ \\"
    Image.new("L", (8, 8)).save(tmp_path / "grid.png")
    rows = [[format_table_cell(text, footnotes=(1,)), format_table_cell("2", bold=True), "3"]]
    page = "\n\n".join([
        f"# {escape(text)}", to_markdown_table(("", "FID", "FID, paper"), rows, numeric=True),
        to_markdown_table(("claim", "verdict"), [["x", format_table_cell("failed", bold=True)]]),
        "![Plot](plot.png)", "![Grid](grid.png)", f"caption {escape(text)}",
    ])  # fmt: skip
    figures = {"plot.png": Figure("", svg="<svg></svg>"), "grid.png": Figure("", image=tmp_path / "grid.png")}
    html = markdown_to_html(page, figures, {"failed": "#a33a2a"})
    actual = Checker()
    actual.feed(html)
    assert actual.open == [] and actual.loaded == []
    assert "".join(actual.text).count(text) == 3 and f"{text}1" in "".join(actual.text)
    assert '<table class="numbers">' in html and '<table class="words">' in html
    assert re.search(r'<td [^>]*class="paper">3</td>', html) and "<strong>2</strong>" in html
    assert '<strong class="tag" style="background:#a33a2a">failed</strong>' in html
    assert "<figure><svg></svg></figure>" in html and '<figure><img src="data:image/png;base64,' in html


def test_cli_does_not_import_template_engines():
    code = "import sys, gesso.cli; print(sorted({'jinja2', 'markdown_it', 'matplotlib'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
