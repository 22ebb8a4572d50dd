"""The package for pip: its name in messages, metadata, extras, version, short help, completion, and the wheel."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import gesso
from gesso import cli, doctor, errors

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = sorted(typer.main.get_command(cli.app).commands)


def test_the_name_for_pip_is_the_same_everywhere():
    assert PROJECT["name"] == errors.DISTRIBUTION == doctor.DISTRIBUTION
    assert errors.install_command("vae") == "pip install 'gesso-diffusion[vae]'"
    files = [
        *(ROOT / "gesso").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "README.md",
        ROOT / "pyproject.toml",
    ]
    extras = PROJECT["optional-dependencies"]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w-])gesso\[\w", text), f"{path}: pip needs {errors.DISTRIBUTION}[...]"
        for names in re.findall(r"gesso-diffusion\[([\w,]+)\]|install_command\(['\"](\w+)", text):
            assert set("".join(names).split(",")) <= extras.keys(), (path, names)


def test_the_development_extra_has_every_library_but_gradio():
    (extras,) = (line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("gesso-diffusion["))
    others = PROJECT["optional-dependencies"].keys() - {"dev", "docs", "play"}
    assert set(re.search(r"\[(.*)\]", extras)[1].split(",")) == others


def test_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0 and result.output.strip() == f"gesso {gesso.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_short_and_long_help_are_the_same(command):
    outputs = [CliRunner().invoke(cli.app, [command, option]) for option in ("-h", "--help")]
    assert [result.exit_code for result in outputs] == [0, 0]
    assert outputs[0].output == outputs[1].output and "Usage" in outputs[0].output


def test_commands_are_completed():
    environment = os.environ | {"_GESSO_COMPLETE": "complete_bash", "COMP_WORDS": "gesso ev", "COMP_CWORD": "1"}
    process = subprocess.run([sys.executable, "-m", "gesso"], env=environment, capture_output=True, text=True)
    assert process.stdout.split() == ["evaluate"] and process.returncode == 0


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout():
    command = [sys.executable, ROOT / "tools" / "check_wheel.py", "--packages", sysconfig.get_path("purelib")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "are complete" in process.stdout and f"gesso {gesso.__version__}" in process.stdout
