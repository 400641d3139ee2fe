"""What to write instead of a line that went past a wrapper, made from the line itself. Where in doubt, nothing.

The names are read where the line runs (`read_names`), by identity with the wrapper and its modules. The rest is
syntax: the one call of the statement that enters the wrapped module is written anew, with the wrapper.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import FrameType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall import torch_internals as internals

IN_A_HOOK = (
    "Compute this in the method that the trainer calls through the wrapper (`training_step` in Lightning), as "
    "part of the loss that it returns; the trainer calls its other hooks past the wrapper."
)
_MAX_LENGTH = 100
_MAX_NAMES = 2000
_COMPREHENSIONS = (
    "<listcomp>",
    "<setcomp>",
    "<dictcomp>",
    "<genexpr>",
)  # have frames of their own up to Python 3.11
_WRAPPERS_OF_WRAPPERS = ("torch", "lightning", "lightning_fabric")  # torch.compile's module, Fabric's
_OF_EVERY_MODULE = frozenset(dir(DistributedDataParallel)) - {"forward", "__call__"}


class Role(StrEnum):
    """What a name stands for: the wrapper, the module inside it, or one of that module's own modules."""

    WRAPPER = "wrapper"
    INNER = "inner"
    PART = "part"


@dataclass(frozen=True)
class Names:
    """What a line can call the parts of a wrapped model.

    Attributes:
        roles: (expression, role) for names in scope, as `ddp` or `self.model`; the nearest scope first.
        children: Names of the inner module's direct children.
        file: The line's file.
        line: Its number, from 1.
        function: The function it stands in.
        is_caller: Whether the line does not enter the model itself, but calls the library that does.
        outer: The same for the nearest calling line that knows the wrapper, where this one does not.
    """

    roles: tuple[tuple[str, Role], ...] = ()
    children: frozenset[str] = frozenset()
    file: str = ""
    line: int = 0
    function: str = ""
    outer: Names | None = None
    is_caller: bool = False

    @property
    def wrapper(self) -> str:
        """The wrapper's name, empty where the line has none."""
        return next((name for name, role in self.roles if role is Role.WRAPPER), "")


NO_NAMES = Names()


@dataclass(frozen=True)
class Advice:
    """What a line shows.

    Attributes:
        fix: What to write instead; empty where the line does not tell.
        called: The expression that is called, as `ddp.module.compute_loss`; empty where it is not exactly one.
        wrapper: The wrapper's name; empty where none is in scope.
        is_part: Whether `called` is one of the module's own modules.
        is_handed_over: Whether the line does not call it itself, but hands it to what does.
    """

    fix: str = ""
    called: str = ""
    wrapper: str = ""
    is_part: bool = False
    is_handed_over: bool = False


# ---- names: read where the line runs ------------------------------------------------------------------------


def read_names(frame: FrameType, wrapper: nn.Module | None, inner: nn.Module) -> Names:
    """Return what the code of a frame can call a wrapped model.

    Args:
        frame: Where the line runs.
        wrapper: The wrapper; the module itself where that is what a script calls (`replicate`); None where it is
            gone.
        inner: The module inside.

    Blind to: names in containers; attributes of attributes.
    """
    names = _read_frame(frame, wrapper, inner)
    outward = frame.f_back
    while not names.wrapper and outward is not None:
        outer = _read_frame(outward, wrapper, inner)
        if outer.wrapper:
            return replace(names, outer=outer)
        outward = outward.f_back
    return names


def _read_frame(frame: FrameType, wrapper: nn.Module | None, inner: nn.Module) -> Names:
    parts = {id(module) for module in inner.modules()}
    found: dict[str, Role] = {}

    def note(names: Iterable[tuple[str, Any]]) -> None:
        for name, value in itertools.islice(names, _MAX_NAMES):
            role = _role_of(value, wrapper, inner, parts)
            if role is not None:
                found.setdefault(name, role)

    code, scope = frame.f_code, dict(frame.f_locals)
    if code.co_name in _COMPREHENSIONS and frame.f_back is not None:
        scope = {**frame.f_back.f_locals, **scope}
    note(scope.items())
    for name, holder in itertools.islice(scope.items(), _MAX_NAMES):
        if name not in found:
            note((f"{name}.{attribute}", value) for attribute, value in _attributes_of(holder))
    note(frame.f_globals.items())
    children = frozenset(name for name, _ in inner.named_children())
    return Names(tuple(found.items()), children, code.co_filename, frame.f_lineno, code.co_name)


def _role_of(value: Any, wrapper: nn.Module | None, inner: nn.Module, parts: set[int]) -> Role | None:
    if not isinstance(value, nn.Module):
        return None
    if value is wrapper:
        return Role.WRAPPER
    if value is inner:
        return Role.INNER
    if id(value) in parts:
        return Role.PART
    is_librarys = type(value).__module__.partition(".")[0] in _WRAPPERS_OF_WRAPPERS
    is_around = wrapper is not None and any(child is wrapper for child in value.children())
    return Role.WRAPPER if is_librarys and is_around else None


def _attributes_of(holder: Any) -> list[tuple[str, Any]]:
    """Return what an object of the script's holds, as a trainer holds its model."""
    if isinstance(holder, type | ModuleType | str | int | float | Tensor):
        return []
    is_module = isinstance(holder, nn.Module)
    attributes = dict(holder.named_children()) if is_module else getattr(holder, "__dict__", None)
    return list(attributes.items()) if isinstance(attributes, dict) else []


# ---- advice: syntax alone -----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def advise(names: Names) -> Advice:
    """Return what to write instead of a line that entered a wrapped module past its wrapper.

    Args:
        names: The line, and what it can call the model.
    """
    if dict(names.roles).get("self") in (Role.INNER, Role.PART):
        return Advice(IN_A_HOOK)
    reading = _read_statement(names)
    if names.is_caller and reading is not None and hands_over(names):
        return _advise_handing_over(reading)
    if reading is None or reading.is_wrapper_called or len(reading.entries) + bool(reading.parts) != 1:
        return Advice(wrapper=names.wrapper)
    if reading.parts:
        return _advise_parts(reading)
    (call,) = reading.entries
    called, method = call.func, ""
    if reading.is_class_call(call):
        called = call.args[0]
    elif isinstance(called, ast.Attribute) and reading.role_of(called) is None:
        called, method = called.value, called.attr
    dispatch = "" if method in ("", "forward", "__call__") else f", and let `forward` dispatch to `{method}`"
    wrapper, inside = reading.wrapper_within(called), ast.unparse(called)
    if not wrapper:
        return Advice(_advise_without_wrapper(names, inside, dispatch), ast.unparse(call.func))
    is_alias = isinstance(called, ast.Name) and inside != wrapper
    hint = f" (`{inside}` is the module inside `{wrapper}`)" if is_alias else ""
    return Advice(f"`{reading.rewrite(call, wrapper)}`{dispatch}{hint}.", ast.unparse(call.func), wrapper)


def hands_over(names: Names) -> bool:
    """Say whether a line hands the inner module, and not the wrapper, to one call."""
    reading = _read_statement(names)
    return reading is not None and len(reading.handed_over) == 1 and not reading.entries and not reading.parts


def _advise_handing_over(reading: Reading) -> Advice:
    ((call, argument),) = reading.handed_over
    wrapper, inside = reading.wrapper_within(argument), ast.unparse(argument)
    fix = f"`{_shorten(_replace_argument(call, argument, wrapper))}`." if wrapper else ""
    return Advice(fix, inside, wrapper, is_handed_over=True)


def _replace_argument(call: ast.Call, argument: ast.expr, wrapper: str) -> ast.Call:
    arguments = [ast.Name(wrapper) if other is argument else other for other in call.args]
    keywords = [ast.keyword(k.arg, ast.Name(wrapper)) if k.value is argument else k for k in call.keywords]
    return ast.Call(call.func, arguments, keywords)


def _advise_parts(reading: Reading) -> Advice:
    wrapper, parts = reading.names.wrapper, list(dict.fromkeys(ast.unparse(call.func) for call in reading.parts))
    called = parts[0] if len(parts) == 1 else ""
    if not wrapper:
        return Advice(called=called, is_part=True)
    listed = " and ".join(f"`{part}`" for part in parts)
    fix = f"Let `forward` do what this line does with {listed}, and call the wrapper: `{wrapper}(...)`."
    return Advice(fix, called, wrapper, is_part=True)


def _advise_without_wrapper(names: Names, inside: str, dispatch: str) -> str:
    """Return where the module was taken out of its wrapper, or was handed over in the wrapper's place."""
    line = _find_unwrapping(names, inside)
    if line:
        return f"Line {line} takes the module out of its wrapper: keep the wrapper, and call that here{dispatch}."
    reading = None if names.outer is None else _read_statement(names.outer)
    if names.outer is None or reading is None:
        return ""
    where = f"{os.path.basename(names.outer.file)}:{names.outer.line} in {names.outer.function}"
    if len(reading.handed_over) != 1:
        return f"Call the wrapper in place of `{inside}`: {where} has it as `{names.outer.wrapper}`{dispatch}."
    call, argument = reading.handed_over[0]
    changed = _shorten(_replace_argument(call, argument, reading.wrapper_within(argument)))
    return f"Hand over the wrapper in {where}: `{changed}`{dispatch}."


@dataclass
class Reading:
    """A statement, read with the names of its scope.

    Attributes:
        statement: The whole of it; of one with a body only the head is read.
        names: The names.
        entries: Calls of the inner module, its `forward` or another of its methods.
        parts: Calls of the inner module's own modules.
        handed_over: Calls that are given the inner module, with that argument.
        is_wrapper_called: Whether the wrapper itself is called, too.
    """

    statement: ast.stmt
    names: Names
    entries: list[ast.Call] = field(default_factory=list)
    parts: list[ast.Call] = field(default_factory=list)
    handed_over: list[tuple[ast.Call, ast.expr]] = field(default_factory=list)
    is_wrapper_called: bool = False

    def __post_init__(self) -> None:
        """Look at every call."""
        bodies = (ast.stmt, ast.excepthandler, ast.match_case)
        heads = [part for part in ast.iter_child_nodes(self.statement) if not isinstance(part, bodies)]
        for node in itertools.chain.from_iterable(map(ast.walk, heads)):
            if isinstance(node, ast.Call):
                self._look_at(node)

    def _look_at(self, call: ast.Call) -> None:
        role, called = self.role_of(call.func), call.func
        if role is Role.PART:
            self.parts.append(call)
        elif role is Role.WRAPPER:
            self.is_wrapper_called = True
        elif role is Role.INNER or self._is_method(called) or self.is_class_call(call):
            self.entries.append(call)
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        inner = [argument for argument in given if self.role_of(argument) is Role.INNER]
        if not any(self.role_of(argument) is Role.WRAPPER for argument in given):
            sure = [one for one in inner if _takes_out(one) or not isinstance(one, ast.Call)]
            self.handed_over += [(call, argument) for argument in sure]

    def is_class_call(self, call: ast.Call) -> bool:
        """Say whether a call is `Net.forward(model, x)`."""
        is_forward = isinstance(call.func, ast.Attribute) and call.func.attr == "forward"
        return is_forward and bool(call.args) and self.role_of(call.args[0]) is Role.INNER

    def _is_method(self, called: ast.expr) -> bool:
        if not isinstance(called, ast.Attribute) or called.attr in _OF_EVERY_MODULE:
            return False
        return self.role_of(called.value) in (Role.INNER, Role.WRAPPER)

    def role_of(self, node: ast.expr) -> Role | None:
        """Return what an expression stands for; None for anything else, a method of the model included."""
        if isinstance(node, ast.Name | ast.Attribute):
            known = dict(self.names.roles).get(ast.unparse(node))
            if known is not None:
                return known
        match node:
            case ast.Attribute(value=value, attr=attribute):
                return self._role_of_attribute(self.role_of(value), attribute)
            case ast.Call(func=function, args=[argument]) if self.role_of(argument) is Role.WRAPPER:
                # unwrap_model(model): what a function makes of the wrapper, and is called, is the module inside.
                return Role.INNER if self.role_of(function) is None else None
            case ast.Subscript(value=value):
                return Role.PART if self.role_of(value) is Role.PART else None
            case _:
                return None

    def _role_of_attribute(self, holder: Role | None, attribute: str) -> Role | None:
        if holder is Role.WRAPPER and attribute == "module":
            return Role.INNER
        if holder in (Role.WRAPPER, Role.INNER) and attribute == internals.ORIG_MOD.name:
            return holder
        if holder in (Role.WRAPPER, Role.INNER) and attribute in self.names.children:
            return Role.PART
        return Role.PART if holder is Role.PART and attribute not in _OF_EVERY_MODULE else None

    def wrapper_within(self, node: ast.expr) -> str:
        """Return the wrapper's name as an expression has it, else as the scope has it; empty where none does."""
        expressions = [child for child in ast.walk(node) if isinstance(child, ast.expr)]
        named = [child for child in expressions if isinstance(child, ast.Name | ast.Attribute)]
        within = [ast.unparse(child) for child in named if self.role_of(child) is Role.WRAPPER]
        return within[-1] if within else self.names.wrapper  # ast.walk goes inward

    def rewrite(self, call: ast.Call, wrapper: str) -> str:
        """Return the statement with the wrapper called instead; of one that is long or has a body, the call."""
        arguments = call.args[self.is_class_call(call) :]
        changed = _shorten(ast.Call(ast.Name(wrapper), arguments, call.keywords))
        if not isinstance(self.statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr):
            return changed
        text = ast.unparse(self.statement).replace(ast.unparse(call), changed)
        return text if len(text) <= _MAX_LENGTH and "\n" not in text else changed


def _shorten(call: ast.Call) -> str:
    text = ast.unparse(call)
    return text if len(text) <= _MAX_LENGTH and "\n" not in text else f"{ast.unparse(call.func)}(...)"


def _read_statement(names: Names) -> Reading | None:
    """Return the statement that a line belongs to, None where its source is not there."""
    around = [
        node
        for node in ast.walk(_parse(names.file))
        if isinstance(node, ast.stmt) and node.lineno <= names.line <= (node.end_lineno or node.lineno)
    ]
    return Reading(around[-1], names) if around else None  # ast.walk goes inward


@functools.lru_cache(maxsize=16)
def _parse(file: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):  # a notebook's magic, or no Python at all
        return ast.Module([], [])


def _find_unwrapping(names: Names, inside: str) -> int:
    """Return the one line of this scope that took `inside` out of something; 0 where there is none, or several."""
    scope: ast.AST = _parse(names.file)
    if inside.isidentifier() and names.function != "<module>":
        functions = [node for node in ast.walk(scope) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        around = [f for f in functions if f.lineno <= names.line <= (f.end_lineno or 0)]
        scope = around[-1] if around else scope
    lines = [
        node.lineno
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and inside in map(ast.unparse, node.targets) and _takes_out(node.value)
    ]
    return lines[0] if len(lines) == 1 else 0


def _takes_out(value: ast.expr) -> bool:
    match value:
        case ast.Attribute(attr="module"):
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return "unwrap" in name
        case _:
            return False
