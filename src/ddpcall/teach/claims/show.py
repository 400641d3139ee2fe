"""The code of one claim, cut out of its module: what runs, and nothing else, as a script that runs by itself."""

from __future__ import annotations

import ast
import inspect
import textwrap

from ddpcall.teach.claims.claim import Claim

_Definition = ast.FunctionDef | ast.ClassDef | ast.Assign


def show_code(claim: Claim) -> str:
    """Return the claim's experiment and judge with all they use, in the order of their module.

    Args:
        claim: Any claim of the catalogue.

    Returns:
        A Python script: the claim as its docstring, the imports that are needed, the definitions that
        `claim.experiment` and `claim.judge` reach, and a last line that runs them.
    """
    module = inspect.getmodule(claim.experiment)
    assert module is not None
    source = inspect.getsource(module)
    body = ast.parse(source).body
    definitions = {name: node for node in body for name in _defined_names(node)}
    wanted = _reach({claim.experiment.__name__, claim.judge.__name__}, definitions)
    used = set().union(*(_names_in(definitions[name]) for name in wanted))
    pieces = [f'"""{claim.id}: {claim.text}\n\nSource: {claim.source}\n"""\n']
    pieces += ["\n".join(line for node in body for line in _imports(node, used)) + "\n"]
    nodes = dict.fromkeys(node for node in body for name in _defined_names(node) if name in wanted)
    pieces += [_cut(source, node) for node in nodes]
    return "\n\n".join(piece.rstrip("\n") + "\n" for piece in [*pieces, _last_line(claim)])


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _names_in(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def _reach(names: set[str], definitions: dict[str, ast.stmt]) -> set[str]:
    """Close a set of names under "is used by", within one module."""
    reached: set[str] = set()
    while names:
        reached |= names
        names = {used for name in names for used in _names_in(definitions[name]) if used in definitions} - reached
    return reached


def _imports(node: ast.stmt, used: set[str]) -> list[str]:
    """Spell an import of the module with only those names that are used."""
    if isinstance(node, ast.ImportFrom) and node.module == "__future__":
        return [ast.unparse(node)]
    if isinstance(node, ast.Import):
        return [
            f"import {a.name}" + (f" as {a.asname}" if a.asname else "") for a in node.names if _binds(a) in used
        ]
    if isinstance(node, ast.ImportFrom):
        names = [alias.name for alias in node.names if _binds(alias) in used]
        return [f"from {node.module} import {', '.join(names)}"] if names else []
    return []


def _binds(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def _cut(source: str, node: ast.stmt) -> str:
    lines = source.splitlines()
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    return "\n".join(lines[first - 1 : node.end_lineno])


def _last_line(claim: Claim) -> str:
    run = f"{claim.experiment.__name__}()"
    imports = ""
    if claim.num_ranks > 1:
        imports = "from ddpcall.ranks import run_on_ranks\n\n    "
        run = f"run_on_ranks({claim.experiment.__name__}, {claim.num_ranks})[0]"
    return textwrap.dedent(f'if __name__ == "__main__":\n    {imports}print({claim.judge.__name__}({run}))\n')
