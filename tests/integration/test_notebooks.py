"""The notebooks of examples/: they have no outputs, and their cells run in order on short trainings."""

import json
import sys
import types
from pathlib import Path

import pytest

import gesso

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SHORT = {
    "train.total_images": 256, "train.batch_size": 32, "train.snapshot_every": 64, "train.checkpoint_every": 256,
    "train.num_threads": 1, "train.device": "cpu", "monitor.sample_every": None, "monitor.magnitude_every": None,
    "sample.steps": 2,
}  # fmt: skip


def test_every_extension_has_a_notebook():
    assert [path.stem for path in NOTEBOOKS] == ["own_dataset", "own_loss", "own_network", "posthoc_ema"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    cells = json.loads(path.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"][0].startswith("# ")
    for cell in cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


@pytest.mark.usefixtures("clean_extensions")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order(path, tmp_path, monkeypatch, capsys):
    original = gesso.recipe
    monkeypatch.setattr(gesso, "recipe", lambda name, changes: original(name, {**changes, **SHORT}))
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    for i, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {i}", "exec"), module.__dict__)
    names = vars(module)
    match path.stem:
        case "own_network":
            assert names["run"].config.net.network == "conv" and names["images"].shape == (20, 1, 8, 8)
            assert capsys.readouterr().out.count("\n") == 3
        case "own_dataset":
            assert names["run"].class_names == ("disc", "square") and names["images"].shape == (16, 1, 16, 16)
        case "own_loss":
            first, second = (run.config for run in names["runs"].values())
            assert [path for path, _, _ in gesso.config.differences(first, second)] == ["loss.weighting"]
            assert names["values"]["squared"] != names["values"]["huber"]
        case "posthoc_ema":
            errors = names["errors"]
            assert min(errors.values()) < errors["last weights"] < 0.3
