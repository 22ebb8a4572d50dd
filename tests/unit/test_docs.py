"""README.md and docs/: commands parse, settings exist, Python blocks run, and README's commands run on tiny runs.

docs/results/ has generated pages and docs/log.md no commands. `make docs` checks links and headings of the site.
"""

import ast
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import typer
from helpers.cli import run_cli
from helpers.run_factory import write_run
from PIL import Image
from torch.distributed.run import get_args_parser

import gesso
from gesso import cli, config, hub, interop, models, recipes
from gesso.data.cache.plan import parse_cache_args
from gesso.evaluation import metrics, protocols, runner
from gesso.papers import TABLES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [p for p in PAGES if p.parent.name != "results" and p.name != "log.md"]
COMMANDS = typer.main.get_command(cli.app).commands
SITE_PAGES = {"settings.md", "commands.md", "contributing.md", "changelog.md"}
"""Pages that exist only in the site (tools/docs_pages.py)."""


def load_tool(name: str) -> Any:
    """Import a script of tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs_pages = load_tool("docs_pages")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    code: str


def blocks(path: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    return [Block(name, *groups) for groups in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)]


BLOCKS = [block for path in PAGES for block in blocks(path)]
PROSE = {str(p.relative_to(ROOT)): re.sub(r"^```.*?^```", "", p.read_text("utf-8"), flags=re.S | re.M) for p in PAGES}
INLINE_CODE = [(page, code) for page, text in PROSE.items() for code in re.findall(r"`([^`\n]+)`", text)]
SHELL_LINES = [
    (block.page, line.strip())
    for block in BLOCKS
    if block.language in ("", "sh", "bash")
    for line in block.code.replace("\\\n", " ").splitlines()
]


# Commands.

PLACEHOLDERS = {
    "RUN": "runs/digits", "RUN_A": "runs/digits", "RUN_B": "runs/digits-dit", "RUN2": "runs/digits-dit",
    "DIR": "photos",
    "RECIPE": "digits", "SOURCE": "photos", "OUT": "caches/photos", "REFERENCE": "photos", "NAME": "berrada/2a",
    "A": "digits", "B": "digits-dit",
}  # fmt: skip
"""Words of the documentation that a user replaces -> a value to check the command with."""


def gesso_commands() -> Iterator[tuple[str, str]]:
    """Yield (page, command line) of every gesso command with arguments, in blocks and in prose."""
    for page, line in [*SHELL_LINES, *INLINE_CODE]:
        if re.match(r"(srun )?(torchrun .*-m )?gesso ", line) and "..." not in line and "COMMAND" not in line:
            yield page, line.removesuffix("&").strip()


def recipe_of(folder: Path | str | None) -> str:
    """Return a recipe with the conditions and the process of a run folder of the documentation."""
    name = Path(str(folder).removesuffix("/run.yaml")).name
    return name if name in recipes.RECIPES else "digits-berrada"


def check_settings(recipe: str, settings: list[str], allowed: tuple[str, ...]) -> config.RunConfig:
    """Resolve settings; those of a finished run must begin with one of `allowed`."""
    settings = [s for s in settings if not s.endswith(".yaml")]
    assert all(s.startswith(allowed) for s in settings)
    return recipes.resolve(recipe, settings)[0]


def check_gesso_command(command: str, arguments: list[str]) -> None:
    """Parse a command line with gesso's own parsers, and resolve its settings."""
    arguments = [PLACEHOLDERS.get(word, word) for word in arguments]
    params = COMMANDS[command].make_context(command, list(arguments)).params
    settings = list(params.get("settings") or [])
    match command:
        case "train" | "config":
            name = params["recipe"]
            name = recipe_of(name) if name.startswith("runs/") else name
            recipes.resolve(name, [s for s in settings if not s.endswith(".yaml")])
        case "diff":
            for name in (params["a"], params["b"]):
                recipes.resolve(recipe_of(name) if name.startswith("runs/") else name, [])
        case "sample":
            check_settings(recipe_of(params["folder"]), settings, ("sample.",))
        case "ema":
            check_settings(recipe_of(params["folder"]), settings, ("sample.", "eval."))
        case "evaluate" if params["images"]:
            not_flags = ("folder", "settings", "protocol", "allow_addresses")
            flags = {k: v for k, v in params.items() if k not in not_flags and v is not None}
            runner.parse_image_args(settings, flags)
        case "evaluate":
            run = check_settings(recipe_of(params["folder"]), settings, ("sample.", "eval."))
            metrics.select_metrics(run.eval.metrics)
            assert params["protocol"] in (None, *protocols.PROTOCOLS)
        case "cache":
            flags = {f"--{name.replace('_', '-')}": value for name, value in params.items()}
            parse_cache_args(str(params["source"]), params["out"], flags, settings)
        case "reproduce":
            assert params["name"] in {"list", "judge", *TABLES}
        case "sweep":
            over = [text.split(",")[0] for text in params["over"]]
            recipes.resolve(params["recipe"], [*settings, *over])


@pytest.fixture
def hub_of_runs(monkeypatch, tmp_path):
    """Let hub:OWNER/NAME be a run in the folder of the test, which has the recipe file of the guide on extensions."""
    monkeypatch.chdir(tmp_path)
    (recipe,) = (b for b in BLOCKS if b.page == "docs/guides/extend.md" and b.code.startswith("# my_recipe.py"))
    (tmp_path / "my_recipe.py").write_text(recipe.code)

    def download(hub_id, patterns, folder):
        write_run(folder, "digits")
        return folder

    monkeypatch.setattr(hub, "download", download)


@pytest.mark.usefixtures("hub_of_runs", "clean_extensions")
@pytest.mark.parametrize(("page", "line"), list(dict.fromkeys(gesso_commands())))
def test_command_parses(page, line):
    words = shlex.split(re.sub(r"^(srun |gesso --code \S+ )", "", line), comments=True)
    words = words if words[0] in ("torchrun", "gesso") else ["gesso", *words]
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        assert launch.module and launch.training_script == "gesso"
        words = ["gesso", *launch.training_script_args]
    options = {option for parameter in COMMANDS[words[1]].params for option in parameter.opts}
    if len(words) == 2 or (len(words) == 3 and words[2] in options):  # prose on a command, or on one of its options
        return
    check_gesso_command(words[1], words[2:])


def test_other_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page, line in [*SHELL_LINES, *INLINE_CODE]:
        if match := re.match(r"make (\w+)", line):
            assert match[1] in targets, (page, line)
        if match := re.match(r"python3? ((?:examples|benchmarks|tools)/\S+)", line):
            assert (ROOT / match[1]).is_file(), (page, line)
        for names in re.findall(r"(?:gesso-diffusion|\.)\[([\w,]+)\]'", line if line.startswith("pip install") else ""):
            assert set(names.split(",")) - {"NAME"} <= set(extras), (page, line)
        if match := re.match(r"((?:tests|unit|integration|golden|tools|examples|benchmarks)/[\w/.]+\.py)$", line):
            assert (ROOT / match[1]).is_file() or (ROOT / "tests" / match[1]).is_file(), (page, line)


# Settings.


def setting_names() -> set[str]:
    """Return every setting of every block and variant, such as train.seed."""
    names = set()
    for block in config.RunConfig.model_fields:
        for model in docs_pages.variants_of(block):
            names |= {f"{block}.{field}" for field in model.model_fields}
    return names


def test_settings_in_prose_exist():
    known, blocks_of_run = setting_names(), "|".join(config.RunConfig.model_fields)
    for page, code in INLINE_CODE:
        for name in re.findall(rf"(?<![\w./-])((?:{blocks_of_run})\.[A-Za-z_]+)(?![\w(/]|\.\w)", code):
            in_library = code.startswith(("gesso.", "eval.py"))
            file_name = re.search(r"\.(json|py|sh|html|yaml|md|png)\b", name)
            assert name in known or in_library or file_name, (page, code)


def test_settings_page_lists_every_setting():
    page = docs_pages.settings_page()
    listed = set(re.findall(r'^<span id="[^"]+">`([^`]+)`</span> ·', page, re.M))
    nested = {name for name in listed if "[]" in name}
    assert listed - nested == setting_names()
    assert nested == {f"optim.param_groups[].{name}" for name in config.ParamGroupConfig.model_fields}
    for block in config.RunConfig.model_fields:
        for model in docs_pages.variants_of(block):
            texts = [" ".join((field.description or "").split()) for field in model.model_fields.values()]
            for text in texts:
                assert docs_pages.help_markdown(text) in page


def test_commands_page_lists_every_option():
    sections = dict(re.findall(r"^## gesso (\w+)\n(.*?)(?=^## |\Z)", docs_pages.commands_page(), re.S | re.M))
    assert sections.keys() == COMMANDS.keys()
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[-1]}" in sections[name]


# Links. `make docs` checks the anchors.


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text(encoding="utf-8")):
        if not re.match(r"https?:|mailto:", link):
            target = (path.parent / link).resolve()
            in_site = target.parent == ROOT / "docs" and target.name in SITE_PAGES
            assert target.exists() or in_site, link


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"(?<=[ -])([\w/-]+\.md)$", text, re.M))
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "results"}
    assert listed == pages | SITE_PAGES | {"results/README.md"}
    results = docs_pages.results_nav(ROOT / "docs" / "results")
    linked = {
        Path(link).name for group in results for pages in group.values() for page in pages for link in page.values()
    }
    assert linked == {p.name for p in (ROOT / "docs" / "results").glob("*.md")} - {"README.md"}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


# Python blocks, and README's commands, on tiny runs.

TINY_NET = ["net.hidden_size=32", "net.depth=1", "net.num_heads=2"]
TINY = [
    *TINY_NET, "train.total_images=256", "train.batch_size=32", "train.snapshot_every=64", "train.checkpoint_every=256",
    "train.num_threads=1", "train.device=cpu", "monitor.magnitude_every=null", "sample.steps=2",
]  # fmt: skip
FRAGMENTS = {
    "docs/evaluation.md": "def compute", "docs/reproduction.md": "Claim(", "docs/guides/export.md": "DiffusionPipeline",
}  # fmt: skip
"""Python blocks that are parsed only: they belong into a file of the package, or test_export.py has the like."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Return a folder with photographs and a tiny run in runs/digits."""
    folder = tmp_path_factory.mktemp("docs")
    pixels = np.random.default_rng(0)
    for i in range(24):
        path = folder / "photos" / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    gesso.train(recipes.resolve("digits", TINY)[0], folder / "runs" / "digits")
    return folder


def python_namespace(page: str) -> dict[str, Any]:
    """Return the names that the blocks of a page take from the user's program."""
    if page == "docs/guides/ema-in-your-trainer.md":
        return {"module": torch.nn.Linear(4, 4), "num_steps": 4000, "batch_size": 2}
    if page == "docs/guides/pretrained.md":
        cfg = config.DiTConfig(hidden_size=384, depth=12, num_heads=6, pos_embed="proportional")  # DiT-S/2
        inputs = gesso.InputSpec(channels=4, resolution=8, num_classes=10)
        net = models.build_network(cfg, inputs)
        state_dict = interop.to_diffusers(net, cfg, inputs)[2]
        return {"net": net, "net_config": cfg, "inputs": inputs, "state_dict": state_dict}
    if page == "docs/guides/extend.md":
        return {"open_birds": lambda: [], "torch": torch}
    return {}


PYTHON_PAGES = list(dict.fromkeys(block.page for block in BLOCKS if block.language == "python"))


@pytest.mark.usefixtures("hub_of_runs", "clean_extensions")
@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run(page, workplace, monkeypatch):
    original = gesso.recipe
    monkeypatch.setattr(
        gesso, "recipe", lambda name, changes: original(name, {**changes, **dict(s.split("=") for s in TINY)})
    )
    monkeypatch.chdir(workplace)
    namespace = python_namespace(page)
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            tree = ast.parse(block.code)
            if page not in FRAGMENTS or FRAGMENTS[page] not in block.code:
                exec(compile(tree, page, "exec"), namespace)
    if page == "README.md":
        assert namespace["images"].shape == (4, 1, 8, 8) and namespace["again"].nimg == 256
        assert {"fd_digits", "class_accuracy"} <= namespace["values"].keys()


def readme_commands() -> Iterator[list[str]]:
    """Yield the arguments of README's gesso commands that need no download, no GPU and no long training."""
    for page, line in SHELL_LINES:
        if page == "README.md" and line.startswith("gesso "):
            words = shlex.split(line, comments=True)
            slow = words[1] == "reproduce" and words[2] != "list"
            needs_network = words[1] in ("push", "play") or any(word.startswith("hub:") for word in words)
            if words[1] != "doctor" and "--images" not in words and not slow and not needs_network:
                yield words[1:]


def test_readme_commands_run(tmp_path, workplace, monkeypatch):
    (tmp_path / "photos").symlink_to(workplace / "photos")
    monkeypatch.chdir(tmp_path)
    names = []
    for command, *arguments in readme_commands():
        shapes = ["data.source=shapes:64"] if "shapes" in arguments else []
        run_cli(command, *arguments, *([*TINY, *shapes] if command == "train" else []))
        names.append(command)
    assert names.count("train") == 5 and {"sample", "evaluate", "report", "inspect", "reproduce"} <= set(names)
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {
        "digits",
        "photos",
        "shapes",
        "digits-dit",
        "digits-mmdit",
    }
    assert len(list((tmp_path / "runs" / "digits" / "samples").rglob("*.png"))) == 16
    assert (tmp_path / "comparison.html").is_file() and (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(
    "line",
    [
        "gesso recipes",
        "gesso config digits",
        "gesso diff digits-dit digits-mmdit",
        "gesso diff runs/digits runs/digits",
        "gesso models edm2-xxs",
        "gesso ema runs/digits --sigma-rel 0.15",
        "gesso report runs/digits",
    ],
)
def test_cheap_command_runs(line, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert run_cli(*line.split()[1:])


def test_figures_are_in_the_documentation():
    figures = load_tool("docs_figures").FIGURES
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    for name in figures:
        assert (ROOT / "docs" / "images" / name).is_file() and f"images/{name}" in text
