"""Plain technical English in names and docstrings (CONTRIBUTING.md), and no imports between test modules."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("gesso", "tests", "benchmarks", "tools", "examples")
FILES = {str(path.relative_to(ROOT)): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}

WORDS = {
    "found", "said", "told", "asked", "made", "kept", "beside", "theirs", "whole", "own", "settled", "stands",
    "grounds",
}  # fmt: skip
"""Words that no identifier contains, because they do not say what the thing is."""
FRAGMENT_STARTS = {
    "what", "of", "by", "as", "where", "when", "which", "how", "whether", "if", "in", "over", "under", "on", "for",
    "with", "without", "to", "from", "at", "after", "before", "until", "up", "may", "that", "whose", "and", "but", "so",
}  # fmt: skip
"""First words of a docstring that open a fragment instead of a sentence."""

PENDING_NAMES: set[str] = set()
PENDING_DOCSTRINGS: set[str] = set()
"""Files that are not clean yet. Both sets must only shrink: remove a file as soon as it is clean."""


def words_of(name: str) -> set[str]:
    """Return the words of an identifier, split at underscores and capitals, in lower case."""
    return {part.lower() for part in re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).split("_")}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (name, line) of all functions, classes, parameters, variables and attributes that a file defines."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                if not name.startswith("test_"):  # the name of a test is a sentence
                    yield name, node.lineno
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case (
                ast.alias(asname=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.MatchMapping(rest=str(name))
            ):
                yield name, node.lineno


def forbidden_names(tree: ast.AST) -> list[str]:
    """Return "line: name" of every identifier with one of WORDS."""
    return [f"{line}: {name}" for name, line in identifiers(tree) if words_of(name) & WORDS]


def fragments(tree: ast.AST) -> list[str]:
    """Return "line: text" of every docstring whose first line is a fragment or has no period at its end."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "None.").splitlines()[0]
            word = re.match(r"[A-Za-z]*", first)[0]
            if word.lower() in FRAGMENT_STARTS or re.match("[a-z](?!mDiT)", first) or not first.endswith("."):
                wrong.append(f"{getattr(node, 'lineno', 1)}: {first}")
    return wrong


def check(find: Callable[[ast.AST], list[str]], folders: tuple[str, ...], pending: set[str]) -> None:
    """Assert that no file has violations, except those of `pending`, which all have some."""
    violations = {
        name: find(ast.parse(path.read_text(encoding="utf-8")))
        for name, path in FILES.items()
        if name.startswith(tuple(f"{folder}/" for folder in folders))
    }
    lines = [f"{name}:{v}" for name, values in violations.items() if name not in pending for v in values]
    assert not lines, "\n" + "\n".join(lines)
    clean = sorted(name for name in pending if not violations.get(name))
    assert not clean, f"remove from the pending files, they are clean: {clean}"


def test_no_identifier_has_a_word_that_says_nothing():
    check(forbidden_names, FOLDERS, PENDING_NAMES)


def test_docstrings_open_with_a_sentence():
    check(fragments, ("gesso",), PENDING_DOCSTRINGS)


def test_no_test_module_is_imported():
    for name in (name for name in FILES if name.startswith("tests/")):
        for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                last = module.split(".")[-1]
                assert last != "conftest" and not last.startswith("test_"), f"{name}:{node.lineno}: move it to helpers"


@pytest.mark.parametrize("source, names", [
    ("def keep(found_rows): pass", ["1: found_rows"]), ("x.whole = 1", ["1: whole"]),
    ("class AskedRows: pass", ["1: AskedRows"]), ("owner, knowns, handmade = 1, 2, 3", []), ("f(found=1)", []),
    ("def test_what_is_found(): pass", []),
    ("import a as told\ntry: pass\nexcept E as said: pass", ["1: told", "3: said"]),
])  # fmt: skip
def test_forbidden_names(source, names):
    assert forbidden_names(ast.parse(source)) == names


@pytest.mark.parametrize("text, clean", [
    ("Return the length.", True), ("Return the length.\n\n    More.", True), ("Return the length", False),
    ("What is read.", False), ("of one run.", False), ("Return the length\n    of a run.", False),
])  # fmt: skip
def test_fragments(text, clean):
    assert (fragments(ast.parse(f'def f():\n    """{text}"""')) == []) == clean
