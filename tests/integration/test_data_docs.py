"""docs/data.md: every command parses, and runs on small synthetic data of the layout that it is for."""

import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from helpers.encoders import MAX_TOKENS, write_clip, write_vae
from PIL import Image
from rich.console import Console

from gesso import cli, recipes
from gesso.data.cache.plan import parse_cache_args
from gesso.data.cache.read import CachedDataset
from gesso.data.sources import open_source

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))
RNG = np.random.default_rng(0)
COMMANDS = typer.main.get_command(cli.app).commands


def steps(section: str) -> list[str]:
    """Return the shell blocks and the single gesso commands of a section, in order."""
    result: list[str] = []
    for block in re.findall(r"^```sh\n(.*?)^```", SECTIONS[section], re.S | re.M):
        shell = ""
        for line in block.splitlines(keepends=True):
            if gesso_arguments(line):
                result += [shell, line]
                shell = ""
            else:
                shell += line
        result.append(shell)
    return [step for step in result if step.strip()]


def gesso_arguments(line: str) -> list[str]:
    """Return the arguments of a line that runs gesso; empty for other lines."""
    match = re.match(r"(torchrun --standalone --nproc-per-node=\d+ -m )?gesso (.+)", line)
    return shlex.split(match[2]) if match else []


def all_gesso_commands() -> list[str]:
    """Return every gesso command of the page, in blocks and in the text."""
    commands = [step for section in SECTIONS for step in steps(section) if gesso_arguments(step)]
    return [*commands, *(f"gesso {c}" for c in re.findall(r"`gesso ([^`]+)`", PAGE) if " " in c and "RECIPE" not in c)]


@pytest.mark.parametrize("line", all_gesso_commands())
def test_command_parses(line):
    command, *arguments = gesso_arguments(line)
    params = COMMANDS[command].make_context(command, arguments).params
    if command == "train":
        recipes.resolve(params["recipe"], params["settings"] or [])
    if command == "cache":
        flags = {f"--{name.replace('_', '-')}": value for name, value in params.items()}
        parse_cache_args(str(params["source"]), params["out"], flags, list(params["settings"] or []))


def test_links_within_the_page():
    for link in re.findall(r"\]\(#([^)]+)\)", PAGE):
        assert link in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in SECTIONS}
    for file in re.findall(r"\]\((images/[^)]+)\)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / file).is_file()


def test_storage_sizes():
    rows = re.findall(r"^\| ([\d,]+).*?\| (\d+)x\d+(.*?)\| ([\d,]+) \| ([\d.]+) GB", SECTIONS["Storage"], re.M)
    assert len(rows) == 10
    for images, edge, kind, image_bytes, total in rows:
        pixels = "pixels" in kind
        numbers = 3 * int(edge) ** 2 if pixels else 8 * (int(edge) // 8) ** 2
        size = numbers * (1 if pixels else 4 if "float32" in kind else 2)
        assert int(image_bytes.replace(",", "")) == size
        assert float(total) == pytest.approx(int(images.replace(",", "")) * size / 1e9, abs=0.05)


# Data of every layout.


def jpeg(height: int = 40, width: int = 56) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def class_tars(classes: dict[str, int], prefix: str = "") -> dict[str, bytes]:
    return {
        f"{prefix}{name}.tar": tar({f"{name}_{i}.JPEG": jpeg() for i in range(count)})
        for name, count in classes.items()
    }


def imagenet(folder: Path) -> None:
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(class_tars({"n01440764": 3, "n01443537": 2})))


def zips(folder: Path) -> None:
    for name, is_latent in (("img512-sd.zip", True), ("img512.zip", False)):
        labels = []
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_STORED) as archive:
            for i in range(3):
                file = io.BytesIO()
                if is_latent:
                    np.save(file, np.abs(RNG.standard_normal((8, 64, 64))).astype(np.float32))
                else:
                    Image.fromarray(RNG.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(file, "PNG")
                inside = f"00000/img-mean-std-{i:08d}.npy" if is_latent else f"00000/img{i:08d}.png"
                archive.writestr(inside, file.getvalue())
                labels.append([inside, i % 2])
            archive.writestr("dataset.json", json.dumps({"labels": labels}))


def imagenet_22k(folder: Path) -> None:
    files = class_tars({"n00004475": 2, "n00005787": 1, "n00006024": 0}, "winter21_whole/")
    (folder / "winter21_whole.tar.gz").write_bytes(tar(files, "w:gz"))


def cc12m(folder: Path) -> None:
    """Write files as img2dataset 1.45 does; images that it could not download have no files."""
    (folder / "cc12m").mkdir()
    (folder / "cc12m.tsv").write_text("http://a/b.jpg\tone caption\n")
    for shard in range(2):
        files: dict[str, bytes] = {}
        for i in range(3):
            key, caption = f"{shard:05d}{i:04d}", f"a caption of picture {i} of tar {shard}, with <PERSON>"
            metadata = {
                "caption": caption,
                "url": "http://a/b.jpg",
                "key": key,
                "status": "success",
                "width": 56,
                "height": 40,
            }
            files |= {
                f"{key}.jpg": jpeg(),
                f"{key}.txt": caption.encode(),
                f"{key}.json": json.dumps(metadata).encode(),
            }
        (folder / "cc12m" / f"{shard:05d}.tar").write_bytes(tar(files))
        (folder / "cc12m" / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / "cc12m" / f"{shard:05d}_stats.json").write_text("{}")


def coco(folder: Path) -> None:
    images = [{"id": 40 + i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(3)]
    notes = [
        {"id": 100 - n, "image_id": 40 + n % 3, "caption": f" A caption\n number {100 - n} with é "} for n in range(15)
    ]
    with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w") as archive:
        annotations = json.dumps({"info": {}, "licenses": [], "images": images, "annotations": notes})
        archive.writestr("annotations/captions_val2014.json", annotations)
    with zipfile.ZipFile(folder / "val2014.zip", "w") as archive:
        for image in images:
            archive.writestr(f"val2014/{image['file_name']}", jpeg())


def photos(folder: Path) -> None:
    (folder / "photos").mkdir()
    for i in range(4):
        (folder / "photos" / f"{i}.jpg").write_bytes(jpeg())
        (folder / "photos" / f"{i}.txt").write_text(f"photograph {i}")


LAYOUTS = {
    "ImageNet-1k": imagenet, "EDM2's zips": zips, "ImageNet-22k": imagenet_22k, "CC12M": cc12m, "COCO": coco,
    "Your own photographs": photos, "Faces": photos,
}  # fmt: skip
STUBS = {"wget": "", "pip": "", "img2dataset": "", "unzip": 'exec python3 -m zipfile -e "$2" .'}
"""Substitutes for commands that need the network, whose results the tests write, or that may not be installed."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Write small encoders; return their folders by hub id."""
    root = tmp_path_factory.mktemp("models")
    return {
        "stabilityai/sd-vae-ft-mse": str(write_vae(root / "vae", 4)),
        "openai/clip-vit-large-patch14": str(write_clip(root / "clip")),
        "77": str(MAX_TOKENS),  # max_tokens of the small encoder
    }


@pytest.fixture
def run_step(tmp_path, monkeypatch, models):
    """Return a function that runs a step in tmp_path. Trainings are resolved and their data opened, but not run."""
    (tmp_path / "bin").mkdir()
    for name, script in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lists"))
    monkeypatch.setattr(cli, "console", Console(width=80))

    def run_in_shell_or_cli(step: str) -> None:
        arguments = [models.get(argument, argument) for argument in gesso_arguments(step)]
        arguments += ["--batch-size", "2"] if "--vae" in arguments and arguments[0] == "cache" else []
        if not arguments:
            subprocess.run(["bash", "-euc", step], check=True)
            return
        if arguments[0] == "train":
            run, _ = recipes.resolve(arguments[1], arguments[2:])
            CachedDataset(run.data.source) if run.data.source.startswith("caches/") else open_source(run.data.source)
            return
        monkeypatch.setattr(sys, "argv", ["gesso", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            assert not end.code, (step, end.code)

    return run_in_shell_or_cli


def run(section: str, run_step, folder: Path, *options: str) -> dict[str, CachedDataset]:
    """Run every step of a section, and of more sections; return the caches that it wrote."""
    LAYOUTS[section](folder)
    for name in (section, *options):
        for step in steps(name):
            run_step(step)
    written = {
        arguments[2] for step in steps(section) if (arguments := gesso_arguments(step)) and arguments[0] == "cache"
    }
    caches = {str(path.relative_to(folder)): CachedDataset(path) for path in (folder / "caches").iterdir()}
    assert caches.keys() == written
    assert all(not cache.unreadable for cache in caches.values())
    return caches


def test_imagenet(run_step, tmp_path):
    caches = run("ImageNet-1k", run_step, tmp_path, "Several GPUs", "Check")
    for cache in caches.values():
        assert cache.labels.tolist() == [0, 0, 0, 1, 1] and cache.class_names == ("n01440764", "n01443537")
    plan = caches["caches/imagenet-512-edm2"].plan
    assert (plan.dtype, plan.latent.convention, plan.data.resolution) == ("float32", "edm2", 512)
    assert caches["caches/imagenet-64"].plan.latent.vae is None
    assert not list(tmp_path.glob("ilsvrc/train/*.tar")) and (tmp_path / "sheet.png").is_file()


def test_edm2_zips(run_step, tmp_path):
    caches = run("EDM2's zips", run_step, tmp_path)
    with zipfile.ZipFile(tmp_path / "img512-sd.zip") as archive:
        expected = np.load(io.BytesIO(archive.read("00000/img-mean-std-00000001.npy")))
    cache = caches["caches/img512-sd"]
    assert np.array_equal(cache.get(torch.tensor([1]), torch.tensor([0])).x[0].numpy(), expected)
    assert cache.labels.tolist() == [0, 1, 0] and caches["caches/img512-dit"].plan.latent.convention == "dit"


def test_imagenet_22k(run_step, tmp_path):
    (cache,) = run("ImageNet-22k", run_step, tmp_path).values()
    assert cache.class_names == ("n00004475", "n00005787") and cache.labels.tolist() == [0, 0, 1]


def test_cc12m(run_step, tmp_path):
    (cache,) = run("CC12M", run_step, tmp_path).values()
    assert (tmp_path / "cc12m.tsv").read_text() == "url\tcaption\nhttp://a/b.jpg\tone caption\n"
    assert len(cache) == 6 and cache.plan.views == 4 and cache.plan.data.crop_scale == (0.4, 0.6)
    assert cache.captions[5] == "a caption of picture 2 of tar 1, with <PERSON>"
    sample = cache.get(torch.tensor([5]), torch.tensor([0]))
    assert (
        sample.x.shape == (1, 8, 32, 32)
        and sample.encoded_text is not None
        and sample.original_sizes.tolist() == [[40, 56]]
    )


def test_coco(run_step, tmp_path):
    (cache,) = run("COCO", run_step, tmp_path).values()
    lines = [json.loads(line) for line in (tmp_path / "val2014" / "captions.jsonl").read_text().splitlines()]
    assert lines == [
        {"file": f"COCO_val2014_{i:012d}.jpg", "text": f"A caption number {n} with é"}
        for i, n in enumerate((88, 87, 86))
    ]
    assert list(cache.captions) == [line["text"] for line in lines]


@pytest.mark.parametrize("section", ["Your own photographs", "Faces"])
def test_photographs(section, run_step, tmp_path):
    (cache,) = run(section, run_step, tmp_path).values()
    assert len(cache) == 4 and cache.captions[2] == "photograph 2" and cache.plan.blur_faces == (section == "Faces")
