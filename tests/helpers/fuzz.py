"""Fuzzers, deterministic by seed: settings, and damaged bytes."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

from gesso import config, recipes
from gesso.errors import GessoError
from gesso.recipes import RECIPES

VALUES = (
    "0", "1", "-1", "2", "3", "7", "0.5", "1e999", "-1e999", "1e-12", "1e-320", "1e308", "NaN", "Infinity", "null",
    "true", "false", "[]", "{}", "[1]", '{"a": 1}', "[[1]]", "[1,2]", "[2,1]", "[1,1]", ".4,.6", "-0.0", '""', '"x"',
    "x", "a,b", "[a,b]", "no", "010", "200k", "1e6", "1.5M", "18446744073709551616", "18446744073709551615", "9" * 30,
    "9" * 400, "9" * 5000, "1000000", "65536", "2.5", "3:2", "1:9999999999", "3:0", "a:b", "/", "..", "\x1b[31m", "é",
    "²", "١",
    "[/b]", "[red]", "edm", "vp", "rf", "dit", "edm2", "unet", "none", "linear", "self", "s3://a/b", "file:///x",
    "a::b://c",
    "[" * 500, "&a [*a]", "!!python/object:os.system", "shapes", "shapes:0", "shapes:9999999999", "digits", "text",
    "label",
)  # fmt: skip
MILD_VALUES = ("1", "2", "4", "8", "16", "0.5", "0.1", "null", "true", "false", "1e-3", "[1,2]", "x")
YAML_FILES = (
    "", "1", "[]", "net: 3", "net: [1]", "net: {name: [1]}", "net: {name: {}}", "process: {name: 1e999}", "1: 2",
    "null: {a: 1}",
    "? [1]\n: 2", "a: &a [*a]", "data: {source: [1]}", "train: {seed: !!binary aGk=}", "train: 2020-01-01",
    "init: {source: {}}",
    "net: {name: null}", "process: null", "data: null", "environment: {a: {b: 1}}", "environment: []", "train: {1: 2}",
    "data: {class_names: [" + "x," * 1000 + "]}", "a: " + "[" * 5000, "x: !!timestamp 9999-99-99",
    "data: {crop_scale: .nan}",
    "y: &y [x,x]\nz: &z [*y,*y]\ndata: {class_names: *z}", "%YAML 9.9\n---\na: 1", "\t", "a: !!int 9_9x",
    "a: !!float x",
    "optim: {param_groups: [{match: [1]}]}", "optim: {param_groups: 3}", "control: {variables: [[1]]}", "!!set {a}",
    "<<: 1",
)  # fmt: skip


def random_arguments(generator: random.Random, names: dict[str, list[str]], folder) -> list[str]:
    """Return a recipe and settings, some of them absurd; YAML files are written to `folder`."""
    recipe = generator.choice(list(names))
    arguments = [recipe]
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        if generator.random() < 0.1:
            path = folder / f"{generator.randrange(10**9)}.yaml"
            path.write_text(generator.choice(YAML_FILES), encoding="utf-8")
            arguments.append(str(path))
        else:
            name = generator.choice(names[recipe])
            if generator.random() < 0.1:
                parts = name.split(".")
                name = generator.choice([parts[0], f"{name}.x", f"{name}x", ".".join([*parts[:-1], "name"])])
            value = generator.choice(VALUES if generator.random() < 0.7 else MILD_VALUES)
            arguments.append(f"{name}={value}")
    return arguments


def setting_names() -> dict[str, list[str]]:
    """Return the settings of every recipe."""
    return {name: list(config.flatten(recipes.resolve(name, [])[0])) for name in RECIPES}


def mutate(generator: random.Random, content: bytes) -> bytes:
    """Return damaged bytes: cut, with flipped bits, other numbers, or parts removed, repeated or exchanged."""
    data = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 5))):
        if not data:
            break
        at, kind = generator.randrange(len(data)), generator.randrange(7)
        n = generator.choice((1, 2, 4, 8, 64))
        match kind:
            case 0:
                data[at] ^= 1 << generator.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + n]
            case 3:
                data[at:at] = data[at : at + n]
            case 4:
                data[at : at + n] = generator.choice((b"\0", b"\xff", b"\x7f")) * n
            case 5:
                data[at : at + n] = generator.randbytes(n)
            case 6:
                number = generator.choice(
                    (b"-1", b"0", b"99999999999999999999", b"1e999", b"null", b"[]", b"{}", b'"x"')
                )
                data[at : at + len(number)] = number
    return bytes(data)


def read_mutants(
    readers: Mapping[str, tuple[bytes, Callable[[Path], object]]], folder: Path, seed: int, count: int
) -> int:
    """Read damaged files; return the number of refused ones.

    Args:
        readers: The content of a valid file, and a function that reads such a file, by its name.
        folder: Folder for the files; a file that leads to another error than a GessoError stays there.
        seed: Seed of the damage.
        count: Number of files; each reader gets its share.
    """
    generator, num_refused, cases = random.Random(seed), 0, list(readers.items())
    for i in range(count):
        name, (content, read) = cases[i % len(cases)]
        path, damaged = folder / name, mutate(generator, content)
        path.write_bytes(damaged)
        try:
            read(path)
        except GessoError as error:
            num_refused += 1
            assert len(str(error).splitlines()) <= 3, error
        except Exception as error:
            (folder / f"failed-{name}").write_bytes(damaged)
            raise AssertionError(f"mutant {i} of {name} in {folder}") from error
    return num_refused
