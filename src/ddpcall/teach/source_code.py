"""Code for people to read: where torch does something, and parts of our own as scripts that run by themselves."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A function or class in somebody's source.

    Attributes:
        module: Import path of the module it is defined in.
        name: Qualified name within the module.
        says: What is to be seen there.
    """

    module: str
    name: str
    says: str

    @property
    def file(self) -> str:
        """The file, as a path from the directory packages are installed in."""
        return self.module.replace(".", "/") + ".py"


def locate(source: Source) -> tuple[Path, int]:
    """Find a source in the installed package: its file on this machine and the line, from 1.

    Raises:
        ImportError: The package is not installed, or has no such module in this version.
        AttributeError: The module has no such name in this version.
        OSError: Its source is not there to be read.
    """
    found: object = importlib.import_module(source.module)
    for part in source.name.split("."):
        found = getattr(found, part)
    found = inspect.unwrap(found)  # pyright: ignore[reportArgumentType] (a class is fine, too)
    file = inspect.getsourcefile(found)  # pyright: ignore[reportArgumentType]
    if file is None:
        raise OSError(f"no source file for {source.name}")
    return Path(file), inspect.getsourcelines(found)[1]  # pyright: ignore[reportArgumentType]


def cut_out(sources: Iterable[str], wanted: Iterable[str], ignored_module: str = " ") -> str:
    """Return the imports and definitions that some names reach, as code that runs by itself.

    Args:
        sources: Texts of modules. A definition in a later one takes the place of that of the same name in an
            earlier one; what a later one adds stands before `main`.
        wanted: The names to begin with.
        ignored_module: Imports from it are left out, because its own text is among the sources.
    """
    nodes: list[ast.stmt] = []
    text_of: dict[ast.stmt, str] = {}
    definitions: dict[str, ast.stmt] = {}
    order: list[str] = []
    for source in sources:
        for node in ast.parse(source).body:
            nodes.append(node)
            text_of[node] = _cut(source, node)
            for name in _names_defined(node):
                if name not in definitions:
                    is_helper = "main" in order and name != "__main__"
                    order.insert(order.index("main") if is_helper else len(order), name)
                definitions[name] = node
    reached, names = set[str](), set(wanted)
    while names:
        reached |= names
        used = {one for name in names for one in _names_in(definitions[name])}
        names = (used & set(definitions)) - reached
    kept = dict.fromkeys(definitions[name] for name in order if name in reached)
    used = {name for node in kept for name in _names_in(node)}
    imports = dict.fromkeys(
        line
        for node in nodes
        if getattr(node, "module", "") != ignored_module
        for line in _spell_import(node, used)
    )
    groups: dict[bool, list[str]] = {}
    for line in imports:
        groups.setdefault(line.split()[1].partition(".")[0] in sys.stdlib_module_names, []).append(line)
    heads = ["\n".join(group) for group in groups.values()]
    return "\n\n\n".join(["\n\n".join(heads), *(text_of[node] for node in kept)]) + "\n"


def _cut(source: str, node: ast.stmt) -> str:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def _names_defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.If):
        return ["__main__"]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _names_in(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def _spell_import(node: ast.stmt, used: set[str]) -> Iterator[str]:
    """Spell an import with only those names that are used."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        yield ast.unparse(node)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        names = [one for one in node.names if (one.asname or one.name.partition(".")[0]) in used]
        if names:
            yield ast.unparse(
                ast.Import(names) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, names, 0)
            )
