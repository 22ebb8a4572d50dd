"""Plain technical English in names and docstrings (CONTRIBUTING.md), checked over the syntax trees."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("gesso", "tests", "benchmarks", "tools", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
WORDS = {"found", "said", "told", "asked", "made", "kept", "beside", "theirs", "whole", "own", "settled", "stands", "grounds"}  # fmt: skip
"""Words that name nothing: an identifier says what a thing is."""
FRAGMENT_STARTS = {
    "what", "of", "by", "as", "where", "which", "how", "whether", "if", "in", "over", "under", "on", "for", "with", "without",
    "to", "from", "at", "after", "before", "until", "up", "all", "may", "raises",
}  # fmt: skip
"""First words that open a fragment instead of a sentence."""


def words_of(name: str) -> set[str]:
    """Return the words of an identifier, in lower case."""
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).split("_")
    return {part.lower() for part in parts}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of all functions, classes, parameters, variables and attributes that a file defines."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node.lineno
            case ast.arg():
                yield node.arg, node.lineno
            case ast.Name(ctx=ast.Store()):
                yield node.id, node.lineno
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr, node.lineno
            case ast.alias(asname=str() as name):
                yield name, node.lineno
            case ast.ExceptHandler(name=str() as name):
                yield name, node.lineno


def docstrings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (docstring, line) of modules, classes and functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text, getattr(node, "lineno", 1)


def test_identifiers_say_what_things_are():
    wrong = []
    for path in FILES:
        for name, line in identifiers(ast.parse(path.read_text(encoding="utf-8"))):
            if words_of(name) & WORDS and not name.startswith("test_"):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not wrong, "\n".join(sorted(set(wrong)))


@pytest.mark.parametrize("folder", ["gesso"])
def test_docstrings_open_with_a_sentence(folder):
    wrong = []
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        for text, line in docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            first = text.splitlines()[0]
            word = re.match(r"[A-Za-z]*", first)[0]
            # A module may open with a noun phrase; a class and a function too, but never with a preposition or relative.
            if word.lower() in FRAGMENT_STARTS or first[:1].islower():
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {first[:80]}")
    assert not wrong, "\n".join(wrong)
