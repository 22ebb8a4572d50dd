"""Build the source distribution and from it the wheel, install it elsewhere, and run commands outside the checkout.

python tools/check_wheel.py                       # downloads the dependencies into a new environment
python tools/check_wheel.py --packages FOLDER     # takes them from the site-packages of another environment
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = (
    "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "Dockerfile", "constraints.txt", "mkdocs.yml", "docs/start.md",
    "docs/images/digits.png", "examples/toy2d.py", "tests/conftest.py", "tools/check_wheel.py", "gesso/py.typed",
)  # fmt: skip
IN_WHEEL = (
    "gesso/py.typed", "gesso/published/edm2.toml", "gesso/report/templates/card.md", "gesso/cli.py",
    "gesso/play/page.py",
)  # fmt: skip
COMMANDS = (
    ["gesso", "--version"], ["gesso", "recipes"], ["gesso", "config", "digits"], ["gesso", "models", "edm2-xxs"],
    ["python", "-m", "gesso", "diff", "digits", "digits-dit"],
    ["python", "-c", "import gesso; gesso.recipe('digits'); print(gesso.__file__)"],
)  # fmt: skip


def run(command: list[str], folder: Path) -> str:
    """Run a command in a folder without the checkout on its path; return its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}:\n{result.stdout}{result.stderr}")
    return result.stdout


def build(python: Path, folder: Path, options: list[str]) -> tuple[Path, Path]:
    """Build the source distribution and from it the wheel; return their paths."""
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    checkout = folder / "checkout"
    files = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).splitlines()
    for name in files:  # a copy, because setuptools writes into the folder that it builds
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).write_bytes((ROOT / name).read_bytes())
    run([str(python), "-c", code], checkout)
    (sdist,) = folder.glob("*.tar.gz")
    run([str(python), "-m", "pip", "wheel", "--quiet", "--no-deps", *options, "-w", str(folder), str(sdist)], folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Exit with a message if a file is missing."""
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    missing = [*sorted(set(IN_SDIST) - in_sdist), *sorted(set(IN_WHEEL) - in_wheel)]
    foreign = sorted({name.split("/")[0] for name in in_wheel if not name.startswith(("gesso/", "gesso_diffusion-"))})
    if missing or foreign:
        sys.exit(f"missing: {missing}; in the wheel, but not of the package: {foreign}")


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="site-packages with the dependencies and setuptools")
    packages = parser.parse_args().packages
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        options = []
        if packages:
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            link = folder / "env" / "lib" / version / "site-packages" / "dependencies.pth"
            link.write_text(f"{packages.resolve()}\n")
            options = ["--no-build-isolation"]
            if "setuptools" in run([str(python), "-m", "pip", "list", "--format=freeze", "--local"], folder):
                run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], folder)  # is too old
        else:
            run([str(python), "-m", "pip", "install", "--quiet", "setuptools>=77"], folder)
        sdist, wheel = build(python, folder, options)
        check_contents(sdist, wheel)
        dependencies = ["--no-deps"] if packages else ["-c", str(ROOT / "constraints.txt")]
        run([str(python), "-m", "pip", "install", "--quiet", *dependencies, str(wheel)], folder)
        for command in COMMANDS:
            output = run([str(folder / "env" / "bin" / command[0]), *command[1:]], folder)
            print(f"{' '.join(command[:3])}: {output.strip().splitlines()[-1][:100]}")
        location = Path(output.strip()).resolve()
        if not location.is_relative_to(folder.resolve() / "env"):
            sys.exit(f"gesso was imported from {location}, not from the wheel")
        print(f"{wheel.name} and {sdist.name} are complete")


if __name__ == "__main__":
    main()
