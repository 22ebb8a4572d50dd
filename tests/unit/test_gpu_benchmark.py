"""benchmarks/gpu.py on tiny networks on the CPU, so that it works the first time that it runs on a GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """Import the benchmark as its folder runs it."""
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("engine", "networks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARGUMENTS = ["--size", "tiny", "--device", "cpu", "--dtype", "float32", "--rounds", "1", "--batch", "4", "--no-compile"]


def test_every_measurement_has_a_row(gpu, tmp_path):
    gpu.main([*ARGUMENTS, "--minutes", "30", "--out", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report.json").read_text())
    measured = report["measurements"]
    assert list(measured) == ["Training steps", "Forward passes of sampling", "Memory", "Training loop"]
    assert all("error" not in row for rows in measured.values() for row in rows), measured
    for title in ("Training steps", "Forward passes of sampling"):
        assert [row["case"] for row in measured[title]] == ["edm2", "dit", "mmdit"]
        assert all(row[key] > 0 for row in measured[title] for key in ("peer/gesso", "gesso/floor", "images/s", "MFU"))
    (memory,) = measured["Memory"]
    assert memory["static ratio"] == pytest.approx(1, abs=0.05)  # buffers are not predicted
    (step,) = measured["Training loop"]
    assert step["EMAs / step"] > 0 and step["batch / step"] > 0
    page = (tmp_path / "report.md").read_text()
    assert page.count("| dit |") == 2 and f"- torch: {report['machine']['torch']}" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_failures_and_the_end_of_time_are_recorded(gpu, tmp_path, monkeypatch):
    def fail(options):
        raise RuntimeError("out of luck\nmore")

    monkeypatch.setattr(gpu, "measure_memory", fail)
    monkeypatch.setattr(gpu, "measure_step", lambda options: {"images/s": 1.0})
    monkeypatch.setattr(gpu, "measure_network", lambda *arguments, **changes: {"peer/gesso": 1.0})
    gpu.main([*ARGUMENTS, "--minutes", "30", "--out", str(tmp_path / "a")])
    page = (tmp_path / "a.md").read_text()
    assert "- not measured, memory: RuntimeError: out of luck\n" in page and "| step | 1.0 |" in page
    gpu.main([*ARGUMENTS, "--minutes", "0", "--out", str(tmp_path / "b")])
    rows = [row for rows in json.loads((tmp_path / "b.json").read_text())["measurements"].values() for row in rows]
    assert len(rows) == 8 and all(row["error"] == "no time was left; raise --minutes" for row in rows)


def test_a_batch_that_does_not_fit_is_halved(gpu, monkeypatch):
    import torch

    sizes = []

    def measure(name, options):
        sizes.append(options.batch)
        if options.batch > 8:
            raise torch.cuda.OutOfMemoryError
        return {"model TFLOPs/s": 10.0}

    monkeypatch.setattr(gpu.networks, "measure_case", measure)
    options = gpu.argparse.Namespace(batch=32, sample=False)
    assert gpu.measure_network("dit", options, 40.0, sample=True) == {"model TFLOPs/s": 10.0, "MFU": 0.25}
    assert sizes == [32, 16, 8]
    monkeypatch.setattr(
        gpu.networks, "measure_case", lambda name, options: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError)
    )
    with pytest.raises(torch.cuda.OutOfMemoryError):
        gpu.measure_network("dit", options, 40.0)
