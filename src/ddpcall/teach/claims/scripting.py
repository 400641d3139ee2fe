"""Claims about TorchScript: `torch.jit.script` and `torch.jit.trace`, deprecated but still met.

torch warns when they run (`DeprecationWarning`, and `TracerWarning` where a trace freezes a branch), and the run
records it. A torch without them skips these claims.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.teach.claims.claim import Claim, Ruling, Verdict, require, times

TRACE = ("jit.trace",)
SCRIPT = ("jit.script",)


class Branches(nn.Module):
    """A `forward` that doubles what `_forward_impl` gives, which takes one of two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(2, 2)
        self.linear2 = nn.Linear(2, 2)

    def forward(self, x: Tensor, use_linear2: bool = False) -> Tensor:
        return self._forward_impl(x, use_linear2) * 2

    def _forward_impl(self, x: Tensor, use_linear2: bool) -> Tensor:
        if use_linear2:
            return self.linear2(x)
        return self.linear1(x)


class OneForward(nn.Module):
    """The same computation, all of it in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(2, 2)
        self.linear2 = nn.Linear(2, 2)

    def forward(self, x: Tensor, use_linear2: bool = False) -> Tensor:
        x = self.linear2(x) if use_linear2 else self.linear1(x)
        return x * 2


def list_operators(graph: Any) -> list[str]:
    """Name the operators of a TorchScript graph, blocks of branches included, in order."""
    names = []
    for node in graph.nodes():
        names.append(node.kind())
        for block in node.blocks():
            names += list_operators(block)
    return names


@dataclass(frozen=True)
class TracedDoubling:
    """What a trace kept of the doubling around `_forward_impl`.

    Attributes:
        multiplications: `aten::mul` nodes in the trace.
        traced_against_impl: Output of the trace divided by that of `_forward_impl`; 2 if the doubling is there.
    """

    multiplications: int
    traced_against_impl: float


def trace_around_forward_impl(traced: str = "forward") -> TracedDoubling:
    """Trace a module whose forward doubles what `_forward_impl` gives."""
    model, x = Branches().requires_grad_(False), torch.ones(1, 2)
    impl = model._forward_impl(x, False)
    if traced == "forward":
        trace: Any = torch.jit.trace(model, x)
    else:
        trace = torch.jit.trace(lambda x: model._forward_impl(x, False), x)
    operators = list_operators(trace.inlined_graph)
    return TracedDoubling(operators.count("aten::mul"), (trace(x) / impl).mean().item())


def judge_trace_ignores_doubling(seen: TracedDoubling) -> Ruling:
    """True if the multiplication is neither in the graph nor in the output."""
    lost = seen.multiplications == 0 and abs(seen.traced_against_impl - 1) < 1e-6
    return Ruling(
        Verdict.TRUE if lost else Verdict.FALSE,
        f"the trace holds {seen.multiplications} aten::mul, and its output is {seen.traced_against_impl:.3g} "
        "times that "
        "of _forward_impl",
    )


@dataclass(frozen=True)
class TraceArguments:
    """How tracing answers arguments that choose a branch.

    Attributes:
        keyword_error: What `trace(model, x, use_linear2=False)` raised, or "".
        accepted_error: What the supported spelling, `example_kwarg_inputs`, raised, or "".
        frozen_branch: Whether the accepted trace, asked for the second branch, gives the first; None without one.
    """

    keyword_error: str
    accepted_error: str
    frozen_branch: bool | None


def trace_with_keyword(keyword: str = "use_linear2") -> TraceArguments:
    """Trace with an argument of the model's as a keyword of `trace`, and then as it is meant to be given."""
    model, x = Branches().eval(), torch.ones(1, 2)
    errors, frozen_branch = ["", ""], None
    trace: Any = torch.jit.trace
    try:
        trace(model, x, **{keyword: False})
    except Exception as error:
        errors[0] = f"{type(error).__name__}: {error}"
    try:
        accepted = trace(model, example_kwarg_inputs={"x": x, "use_linear2": torch.tensor(False)})
        asked_for_second = accepted(x=x, use_linear2=torch.tensor(True))
        frozen_branch = torch.equal(asked_for_second, model(x, False))
    except Exception as error:
        errors[1] = f"{type(error).__name__}: {error}"
    return TraceArguments(errors[0], errors[1], frozen_branch)


def judge_fails_because_of_graphs(seen: TraceArguments) -> Ruling:
    """True if it fails over the model's branches: not at the signature of `trace`, and however it is spelled."""
    about_signature = "unexpected keyword" in seen.keyword_error
    holds = bool(seen.keyword_error) and not about_signature and bool(seen.accepted_error)
    kept = "one branch for good" if seen.frozen_branch else "both branches"
    accepted = f"fails too ({seen.accepted_error})" if seen.accepted_error else f"works and keeps {kept}"
    return Ruling(
        Verdict.TRUE if holds else Verdict.FALSE,
        f"the keyword gives “{seen.keyword_error or 'no error'}”, while example_kwarg_inputs {accepted}",
    )


@dataclass(frozen=True)
class ScriptedBranches:
    """What a compiled graph kept of an `if`: its `prim::If` nodes, and the error on each branch."""

    ifs: int
    error_first: float
    error_second: float


def script_conditional(how: str = "script") -> ScriptedBranches:
    """Script a module with a branch (or trace it), and compare both branches with eager."""
    model, x, yes = Branches().eval(), torch.ones(1, 2), torch.tensor(True)
    if how == "script":
        compiled: Any = torch.jit.script(model)
    else:
        compiled = torch.jit.trace(model, (x, ~yes))
    first, second = (False, True) if how == "script" else (~yes, yes)
    return ScriptedBranches(
        list_operators(compiled.inlined_graph).count("prim::If"),
        (compiled(x, first) - model(x, False)).abs().max().item(),
        (compiled(x, second) - model(x, True)).abs().max().item(),
    )


def judge_keeps_if(seen: ScriptedBranches) -> Ruling:
    """True if the graph has the branch and both sides of it are right."""
    holds = seen.ifs > 0 and seen.error_first < 1e-6 and seen.error_second < 1e-6
    return Ruling(
        Verdict.TRUE if holds else Verdict.FALSE,
        f"the graph holds {seen.ifs} prim::If; against eager the first branch is off by "
        f"{seen.error_first:.3g}, the "
        f"second by {seen.error_second:.3g}",
    )


@dataclass(frozen=True)
class Serialised:
    """What is saved of a model whose forward is split in two, and of one in a single piece: (split, whole).

    Attributes:
        traced: Operators in the traced graph.
        scripted: Operators in the scripted graph, with methods inlined.
        methods: Methods of the model in the source code inside the scripted archive.
        state: Names of the saved tensors.
    """

    traced: tuple[tuple[str, ...], tuple[str, ...]]
    scripted: tuple[tuple[str, ...], tuple[str, ...]]
    methods: tuple[tuple[str, ...], tuple[str, ...]]
    state: tuple[tuple[str, ...], tuple[str, ...]]


def serialise_both(whole_class: type[nn.Module] = OneForward) -> Serialised:
    """Trace, script and save both models, and list what is in each archive."""

    def computing(operators: list[str]) -> tuple[str, ...]:
        return tuple(sorted(name for name in operators if name.startswith("aten::") or name == "prim::If"))

    def saved_methods(scripted: Any, name: str) -> tuple[str, ...]:
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        archive = zipfile.ZipFile(buffer)
        code = "\n".join(archive.read(path).decode() for path in archive.namelist() if path.endswith(".py"))
        _, _, body = code.partition(f"class {name}(")
        return tuple(re.findall(r"def (\w+)", body.partition("\nclass ")[0]))

    pieces = []
    for model in (Branches(), whole_class()):
        traced: Any = torch.jit.trace(model, torch.ones(1, 2))
        scripted: Any = torch.jit.script(model)
        traced_operators = computing(list_operators(traced.inlined_graph))
        scripted_operators = computing(list_operators(scripted.inlined_graph))
        methods = saved_methods(scripted, type(model).__name__)
        pieces.append((traced_operators, scripted_operators, methods, tuple(scripted.state_dict())))
    split, whole = pieces
    return Serialised(*zip(split, whole, strict=True))


def judge_changes_serialised(seen: Serialised) -> Ruling:
    """True if every form of saving differs, false if none does."""
    pairs = {
        "operators of the traced graph": seen.traced,
        "operators of the scripted graph": seen.scripted,
        "names of the tensors": seen.state,
        "methods in the scripted code": seen.methods,
    }
    differ = [f"{name} ({len(split)}, {len(whole)})" for name, (split, whole) in pairs.items() if split != whole]
    same = [f"{name} ({len(split)})" for name, (split, whole) in pairs.items() if split == whole]
    verdict = Verdict.FALSE if not differ else Verdict.TRUE if not same else Verdict.DEPENDS
    only_split = [name for name in seen.methods[0] if name not in seen.methods[1]]
    return Ruling(
        verdict,
        f"the same in both: {', '.join(same) or 'nothing'}; different: {', '.join(differ) or 'nothing'}; only the "
        f"split model's code holds {', '.join(only_split) or 'nothing'}",
    )


@dataclass(frozen=True)
class ScriptedPython:
    """What scripting says to Python that eager runs: the error by construct, "" where it compiles."""

    errors: dict[str, str]


class PlainArithmetic(nn.Module):
    """A loop and a branch: what TorchScript takes."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            if x.dim() == 2:
                x = x + 1
        return x


class CatchesErrors(nn.Module):
    """A `forward` with try and except."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return x + 1
        except ValueError:
            return x


class TakesKeywords(nn.Module):
    """A `forward` with **kwargs."""

    def forward(self, x: Tensor, **kwargs: int) -> Tensor:
        return x + len(kwargs)


class Generates(nn.Module):
    """A `forward` with a generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(number for number in range(3))


class UsesNumPy(nn.Module):
    """A `forward` that goes through NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.numpy())


def script_python(
    modules: tuple[type[nn.Module], ...] = (PlainArithmetic, CatchesErrors, TakesKeywords, Generates, UsesNumPy),
) -> ScriptedPython:
    """Run each module in eager, and then script it."""
    errors = {}
    for module_class in modules:
        module_class()(torch.ones(2, 2))  # raises here if eager cannot run it either
        try:
            torch.jit.script(module_class())
            errors[module_class.__name__] = ""
        except Exception as error:
            errors[module_class.__name__] = f"{type(error).__name__}: {error}"
    return ScriptedPython(errors)


def judge_restricts(seen: ScriptedPython) -> Ruling:
    """True if something that eager runs cannot be scripted."""
    refused = [name for name, error in seen.errors.items() if error]
    return Ruling(
        Verdict.TRUE if refused else Verdict.FALSE,
        f"of {len(seen.errors)} forwards that eager runs, scripting refuses {len(refused)}: "
        f"{', '.join(refused) or 'none'}",
    )


@dataclass(frozen=True)
class TracedChild:
    """A trace of a module that reaches its child by a call, and of one that runs the child's forward.

    Attributes:
        calls: `prim::CallMethod` nodes, (by call, by forward).
        scopes: Operators that carry the child's scope, (by call, by forward).
        operators: `aten::` operators with calls inlined, (by call, by forward).
    """

    calls: tuple[int, int]
    scopes: tuple[int, int]
    operators: tuple[tuple[str, ...], tuple[str, ...]]


def trace_child(spelling: Callable[..., Tensor] = nn.Linear.forward) -> TracedChild:
    """Trace two parents: one calls its child, the other reaches it by `spelling`."""

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.child(x)

    class RunsForward(Calls):
        def forward(self, x: Tensor) -> Tensor:
            return spelling(self.child, x)

    calls, scopes, operators = [], [], []
    for parent in (Calls(), RunsForward()):
        trace: Any = torch.jit.trace(parent, torch.ones(1, 2))
        calls.append(list_operators(trace.graph).count("prim::CallMethod"))
        inlined = [node for node in trace.inlined_graph.nodes() if node.kind().startswith("aten::")]
        scopes.append(sum("child" in node.scopeName() for node in inlined))
        operators.append(tuple(node.kind() for node in inlined))
    return TracedChild(tuple(calls), tuple(scopes), tuple(operators))


def judge_tracing_relies_on_call(seen: TracedChild) -> Ruling:
    """Depends if structure is lost and operators are not; true if operators are lost; false if nothing is."""
    require(seen.calls[0] > 0 and seen.scopes[0] > 0, "by call the child shows in the trace")
    operators_lost = seen.operators[0] != seen.operators[1]
    structure_lost = seen.calls[1] < seen.calls[0] or seen.scopes[1] < seen.scopes[0]
    verdict = Verdict.TRUE if operators_lost else Verdict.DEPENDS if structure_lost else Verdict.FALSE
    return Ruling(
        verdict,
        f"child(x) and child.forward(x) are traced to {', '.join(seen.operators[0])} and "
        f"{', '.join(seen.operators[1])}; the trace shows a submodule's call {times(seen.calls[0])} and "
        f"{times(seen.calls[1])}, its scope {times(seen.scopes[0])} and {times(seen.scopes[1])}",
    )


CLAIMS = (
    Claim(
        id="FI-3",
        text="`torch.jit.trace` does not see what `forward` does around `_forward_impl`, such as a doubling",
        first_look=Verdict.FALSE,
        experiment=trace_around_forward_impl,
        judge=judge_trace_ignores_doubling,
        needs=TRACE,
    ),
    Claim(
        id="FI-4",
        text="`torch.jit.trace(model, x, use_linear2=False)` fails because the branches give two graphs",
        first_look=Verdict.FALSE,
        experiment=trace_with_keyword,
        judge=judge_fails_because_of_graphs,
        needs=TRACE,
    ),
    Claim(
        id="FI-5",
        text="`torch.jit.script` keeps a conditional as an `if` in its graph",
        first_look=Verdict.TRUE,
        experiment=script_conditional,
        judge=judge_keeps_if,
        needs=SCRIPT,
    ),
    Claim(
        id="FI-6",
        text="moving logic from `forward` to `_forward_impl` changes what is serialised",
        first_look=Verdict.FALSE,
        experiment=serialise_both,
        judge=judge_changes_serialised,
        needs=TRACE + SCRIPT,
    ),
    Claim(
        id="FM-6",
        text="`torch.jit.script` limits the Python that `forward` may use",
        first_look=Verdict.TRUE,
        experiment=script_python,
        judge=judge_restricts,
        needs=SCRIPT,
    ),
    Claim(
        id="CF-7",
        text="tracing for TorchScript relies on `__call__`",
        first_look=Verdict.DEPENDS,
        experiment=trace_child,
        judge=judge_tracing_relies_on_call,
        needs=TRACE,
    ),
)
