"""Import order of the packages, size limits of files and functions, and dependencies that must stay out."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gesso

ROOT = Path(gesso.__file__).parent

# A package may import only packages of earlier groups. Packages within one group must not import each other.
ORDER = [
    {"errors", "untrusted"}, {"atomic_io", "hub", "published"}, {"config", "rng", "devices", "safetensors_io"},
    {"conditioning", "extensions"},
    {"models", "recipes"}, {"diffusion", "data", "ema"}, {"snapshot", "interop"}, {"sampling"}, {"sample_files"},
    {"evaluation", "export"},
    {"training"}, {"report"}, {"api"}, {"share", "play"}, {"reproduce"}, {"papers"}, {"cli"}, {"__main__"},
]  # fmt: skip
LAYER_INDEX = {name: i for i, names in enumerate(ORDER) for name in names}
UNRESTRICTED = {"cli", "__main__"}
INDEPENDENT = "doctor"  # imports nothing of gesso at all, so that it runs where gesso does not
SUB_PACKAGES = {"data", "evaluation", "papers"}
MAX_FILE_LINES, MAX_BODY_LINES = 600, 60
NEEDS_TORCHVISION = {"torchvision", "timm", "lpips", "torch_fidelity", "cleanfid", "pytorch_fid", "open_clip"}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (imported module, line) for every import in a file, including those inside functions."""
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


def layer_of_module(module: str) -> str | None:
    """Return the package of gesso that a module belongs to; None for other modules."""
    parts = module.split(".")
    known = len(parts) > 1 and parts[0] == "gesso" and (parts[1] in LAYER_INDEX or parts[1] == INDEPENDENT)
    return parts[1] if known else None


def source_files() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def layer_of_file(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_every_file_has_a_layer():
    assert {layer_of_file(path) for path in source_files()} - LAYER_INDEX.keys() == {INDEPENDENT}


def test_packages_import_only_earlier_packages():
    violations = []
    for path in source_files():
        importing = layer_of_file(path)
        if importing in UNRESTRICTED:
            continue
        for module, line in imports(path):
            imported = layer_of_module(module)
            if imported in (None, importing):
                continue
            if importing == INDEPENDENT or LAYER_INDEX[imported] >= LAYER_INDEX[importing]:
                violations.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert violations == []


def test_layers_are_resolved_from_module_names():
    assert LAYER_INDEX["training"] > LAYER_INDEX["models"]
    assert layer_of_module("gesso.training.loop") == "training"
    assert layer_of_module("torch") is None


def test_depth_and_size_of_files_and_functions():
    for path in source_files():
        parts, text = path.relative_to(ROOT).parts, path.read_text()
        assert len(parts) <= (3 if parts[0] in SUB_PACKAGES else 2), f"{path}: too deep"
        assert len(text.splitlines()) <= MAX_FILE_LINES, f"{path}: more than {MAX_FILE_LINES} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno  # without the signature
                assert lines <= MAX_BODY_LINES, f"{path}:{node.lineno} {node.name}: more than {MAX_BODY_LINES} lines"


def test_no_torchvision_dependency():
    files = [*source_files(), *Path("tests").rglob("*.py"), *Path("examples").glob("*.py")]
    packages = {module.split(".")[0] for path in files for module, _ in imports(path)}
    assert packages & NEEDS_TORCHVISION == set()


def test_settings_recipes_and_cli_do_not_import_torch():
    code = "import sys, gesso.recipes, gesso.cli; gesso.recipes.RECIPES['digits'](); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle():
    for path in source_files():
        assert "pickle" not in {module for module, _ in imports(path)}, path
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(call), f"{path}:{call.lineno}"


def test_commands_on_settings_start_without_torch():
    code = """
import contextlib, io, sys
from gesso import cli
for arguments in (["--help"], ["recipes"], ["config", "digits"], ["diff", "digits", "digits-dit"]):
    sys.argv = ["gesso", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main()
    assert "torch" not in sys.modules and "numpy" not in sys.modules, arguments
print("ok")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout == "ok\n", process.stderr
