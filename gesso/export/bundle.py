"""Bundle definitions of gesso and all that they need into the text of one module that does not import gesso.

The text has the top-level definitions as they are written, in an order in which they can be executed. So an exported
pipeline runs the same code as gesso. Settings become plain namespaces, which need no pydantic.
"""

import ast
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import gesso

PACKAGE = Path(gesso.__file__).parent
SETTINGS_PACKAGE = "gesso.config"
STAND_IN = '''class {name}(types.SimpleNamespace):
    """Settings as attributes."""
'''


class Symbol(NamedTuple):
    """A top-level name of a module of gesso."""

    module: str
    name: str


@dataclass
class Module:
    """The source of a module: its lines, its top-level definitions, and its imports by the name that they bind.

    `modules` are imported modules of gesso, `symbols` names imported from them, `external` the other import statements.
    """

    lines: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, Symbol] = field(default_factory=dict)
    external: dict[str, str] = field(default_factory=dict)


def is_module(name: str) -> bool:
    """Return True if gesso has a module of this dotted name."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@functools.cache
def read_module(name: str) -> Module:
    """Return the definitions and imports of a module of gesso, without importing it."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    module = Module(text.splitlines())
    for node in ast.parse(text).body:
        match node:
            case ast.FunctionDef(name=bound) | ast.ClassDef(name=bound):
                module.definitions[bound] = node
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
                module.definitions |= dict.fromkeys(names, node)
            case ast.Import(names=names):
                for alias in names:
                    bound = alias.asname or alias.name.split(".")[0]
                    module.external[bound] = ast.unparse(ast.Import([alias]))
            case ast.ImportFrom(module=str(source), names=names):
                for alias in names:
                    _add_import(module, source, alias)
    return module


def _add_import(module: Module, source: str, alias: ast.alias) -> None:
    bound = alias.asname or alias.name
    if source.split(".")[0] != "gesso":
        module.external[bound] = ast.unparse(ast.ImportFrom(source, [alias], 0))
    elif is_module(f"{source}.{alias.name}"):
        module.modules[bound] = f"{source}.{alias.name}"
    else:
        module.symbols[bound] = Symbol(source, alias.name)


class Bundler:
    """Collect definitions and their dependencies, depth first.

    Args:
        constants: Values, as source code, that replace top-level assignments of these names.
    """

    def __init__(self, constants: Mapping[str, Symbol]):
        self.constants = constants
        self.parts: dict[Symbol, str] = {}
        self.origins: dict[str, Symbol | str] = {}
        self.imports: set[str] = set()

    def add(self, symbol: Symbol) -> None:
        """Add a definition after everything that it needs."""
        module = read_module(symbol.module)
        if symbol.name in module.symbols:
            return self.add(module.symbols[symbol.name])
        node = module.definitions[symbol.name]
        self._claim(symbol.name, symbol)
        if isinstance(node, ast.Assign):  # one statement may define several names
            symbol = symbol._replace(name=next(name for name, other in module.definitions.items() if other is node))
        if symbol in self.parts:
            return None
        self.parts[symbol] = ""  # reserves the symbol, as functions may call each other
        if symbol.name in self.constants and isinstance(node, ast.Assign | ast.AnnAssign):
            self.add(self.constants[symbol.name])
            text = f"{symbol.name} = {self.constants[symbol.name].name}\n"
        elif symbol.module.startswith(SETTINGS_PACKAGE) and _is_settings(node):
            self._add_import("types", "import types")
            text = STAND_IN.format(name=symbol.name)
        else:
            text = self._source(module, symbol.module, node)
        del self.parts[symbol]
        self.parts[symbol] = text
        return None

    def _source(self, module: Module, module_name: str, node: ast.stmt) -> str:
        """Return the lines of a definition with `module.name` replaced by `name`; add what it needs."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        lines = module.lines[first - 1 : node.end_lineno]
        cuts = []
        for reference in _references(node):
            if isinstance(reference, ast.Attribute):
                assert isinstance(reference.value, ast.Name)
                if reference.value.id in module.modules:
                    self.add(Symbol(module.modules[reference.value.id], reference.attr))
                    cuts.append((reference.value, len(reference.value.id) + 1))
            elif reference.id in module.definitions and module.definitions[reference.id] is not node:
                self.add(Symbol(module_name, reference.id))
            elif reference.id in module.symbols:
                self.add(module.symbols[reference.id])
            elif reference.id in module.external:
                self._add_import(reference.id, module.external[reference.id])
        # From the end, so that the positions of earlier cuts remain valid. Columns of ast count bytes.
        for name, length in sorted(cuts, key=lambda cut: (cut[0].lineno, cut[0].col_offset), reverse=True):
            row, column = name.lineno - first, name.col_offset
            line = lines[row].encode()
            lines[row] = (line[:column] + line[column + length :]).decode()
        return "\n".join(lines) + "\n"

    def _add_import(self, bound: str, statement: str) -> None:
        self._claim(bound, statement)
        self.imports.add(statement)

    def _claim(self, name: str, origin: "Symbol | str") -> None:
        """Reserve a name of the bundle; two definitions cannot share one."""
        other = self.origins.setdefault(name, origin)
        assert other == origin, f"{name} is both {other} and {origin}; rename one of them"


def _is_settings(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and not any(ast.unparse(base) == "NamedTuple" for base in node.bases)


def _references(node: ast.AST) -> Iterator[ast.Name | ast.Attribute]:
    """Yield the names that code and annotations refer to, and attributes of names."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) or (isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)):
            yield part


def bundle(docstring: str, roots: Sequence[Symbol], constants: Mapping[str, Symbol] | None = None) -> str:
    """Return the text of a module with these definitions and everything that they need of gesso.

    Equal sources give equal text.

    Args:
        docstring: Text of the module's docstring.
        roots: Definitions to include.
        constants: By the name of a top-level assignment, the definition that it names instead.
    """
    bundler = Bundler(constants or {})
    for root in roots:
        bundler.add(root)
    imports = sorted(bundler.imports, key=lambda statement: (statement.startswith("from"), statement))
    header = [f'"""{docstring}"""', "from __future__ import annotations", "\n".join(imports)]
    return "\n\n".join(header) + "\n\n\n" + "\n\n".join(bundler.parts.values())
