"""Imports run one way (DESIGN.md), and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import gesso

ROOT = Path(gesso.__file__).parent

ORDER = [
    {"errors"}, {"files", "torchrun"}, {"config", "keyed", "devices"}, {"cond"}, {"nets", "recipes"}, {"diffusion", "data", "ema"},
    {"snapshot", "interop", "conditions"}, {"generate"}, {"evaluate"}, {"train"}, {"report"}, {"tables"}, {"play"}, {"__main__"},
]  # fmt: skip
RANK = {name: i for i, names in enumerate(ORDER) for name in names}
TORCHVISION_BOUND = {"torchvision", "timm", "lpips", "torch_fidelity", "cleanfid", "pytorch_fid", "open_clip"}


def imports(path: Path):
    """(imported module, line) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module, node.lineno
            if node.module == "gesso":
                for alias in node.names:
                    yield f"gesso.{alias.name}", node.lineno


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "gesso" and len(parts) > 1 and (parts[1] in RANK or parts[1] == "doctor") else None


def files():
    return [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]


def own_room(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_every_file_has_a_room():
    assert {own_room(p) for p in files()} - RANK.keys() == {"doctor"}


def test_imports_run_one_way():
    wrong = []
    for path in files():
        here = own_room(path)
        for module, line in imports(path):
            there = room(module)
            if there is None or there == here or here == "__main__":
                continue
            if here == "doctor" or RANK[there] >= RANK[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_the_rule_would_notice():
    assert RANK["train"] > RANK["nets"] and room("gesso.train.loop") == "train" and room("torch") is None


def test_depth_and_size():
    for path in files():
        assert len(path.relative_to(ROOT).parts) <= 2, f"{path}: deeper than two"
        assert len(path.read_text().splitlines()) <= 600, f"{path}: more than 600 lines"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno <= 60, f"{path}:{node.lineno} {node.name}: more than 60 lines"


def test_nothing_brings_torchvision():
    found = {
        m.split(".")[0]
        for path in [*files(), *Path("tests").glob("*.py"), *Path("examples").glob("*.py")]
        for m, _ in imports(path)
    }
    assert found & TORCHVISION_BOUND == set()


def test_settings_and_recipes_need_no_torch():
    code = "import sys, gesso.recipes, gesso.__main__; gesso.recipes.RECIPES['digits'](); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle():
    for path in files():
        assert "pickle" not in {m for m, _ in imports(path)}, path
        for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(call), f"{path}:{call.lineno}"
