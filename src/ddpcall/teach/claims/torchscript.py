"""Claims about TorchScript: `torch.jit.script` and `torch.jit.trace`, deprecated but still met.

torch warns when they run, and the run records it. A torch without them skips these claims.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.teach.claims.claim import claim, require, times, true_if, true_in_parts
from ddpcall.teach.question import DEPENDS, FALSE, TRUE, Answer

TRACE, SCRIPT = ("jit.trace",), ("jit.script",)


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


def catch(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, str]:
    """Return what a function gives, and the error that it raised instead, or ""."""
    try:
        return function(*args, **kwargs), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def trace_around_forward_impl(traced: str = "forward") -> dict[str, Any]:
    """Trace a module whose forward doubles what `_forward_impl` gives."""
    model, x = Branches().requires_grad_(False), torch.ones(1, 2)
    impl = model._forward_impl(x, False)  # pyright: ignore[reportPrivateUsage]
    function = model if traced == "forward" else lambda x: model._forward_impl(x, False)  # pyright: ignore[reportPrivateUsage]
    trace: Any = torch.jit.trace(function, x)
    doublings = list_operators(trace.inlined_graph).count("aten::mul")
    return {"doublings": doublings, "against_impl": (trace(x) / impl).mean().item()}


@claim(
    "FI-3",
    "`torch.jit.trace` does not see what `forward` does around `_forward_impl`, such as a doubling",
    FALSE,
    trace_around_forward_impl,
    needs=TRACE,
)
def judge_trace_ignores_doubling(doublings: int, against_impl: float) -> Answer:
    """True if the multiplication is neither in the graph nor in the output."""
    return Answer(
        true_if(doublings == 0 and abs(against_impl - 1) < 1e-6),
        f"the trace holds {doublings} aten::mul, and its output is {against_impl:.3g} times that of _forward_impl",
    )


def trace_with_keyword(keyword: str = "use_linear2") -> dict[str, Any]:
    """Trace with an argument of the model's as a keyword of `trace`, and then as it is meant to be given."""
    model, x, trace = Branches().eval(), torch.ones(1, 2), torch.jit.trace
    _, keyword_error = catch(trace, model, x, **{keyword: False})
    example = {"x": x, "use_linear2": torch.tensor(False)}
    accepted, accepted_error = catch(trace, model, example_kwarg_inputs=example)
    asked_for_second = accepted and accepted(x=x, use_linear2=torch.tensor(True))
    frozen = None if accepted is None else torch.equal(asked_for_second, model(x, False))
    return {"keyword_error": keyword_error, "accepted_error": accepted_error, "frozen_branch": frozen}


@claim(
    "FI-4",
    "`torch.jit.trace(model, x, use_linear2=False)` fails because the branches give two graphs",
    FALSE,
    trace_with_keyword,
    needs=TRACE,
)
def judge_fails_because_of_graphs(keyword_error: str, accepted_error: str, frozen_branch: bool | None) -> Answer:
    """True if it fails over the model's branches: not at the signature of `trace`, and however it is spelled."""
    is_about_branches = bool(keyword_error) and "unexpected keyword" not in keyword_error
    kept = f"works and keeps {'one branch for good' if frozen_branch else 'both branches'}"
    return Answer(
        true_if(is_about_branches and bool(accepted_error)),
        f"the keyword gives “{keyword_error or 'no error'}”, while example_kwarg_inputs "
        f"{f'fails too ({accepted_error})' if accepted_error else kept}",
    )


def script_conditional(how: str = "script") -> dict[str, Any]:
    """Script a module with a branch (or trace it), and compare both branches with eager."""
    model, x = Branches().eval(), torch.ones(1, 2)
    no, yes = (False, True) if how == "script" else (torch.tensor(False), torch.tensor(True))
    compiled: Any = torch.jit.script(model) if how == "script" else torch.jit.trace(model, (x, no))
    errors = [(compiled(x, which) - model(x, bool(which))).abs().max().item() for which in (no, yes)]
    return {"ifs": list_operators(compiled.inlined_graph).count("prim::If"), "errors": errors}


@claim(
    "FI-5",
    "`torch.jit.script` keeps a conditional as an `if` in its graph",
    TRUE,
    script_conditional,
    needs=SCRIPT,
)
def judge_keeps_if(ifs: int, errors: list[float]) -> Answer:
    """True if the graph has the branch and both sides of it are right."""
    return Answer(
        true_if(ifs > 0 and max(errors) < 1e-6),
        f"the graph holds {ifs} prim::If; against eager the first branch is off by {errors[0]:.3g}, the second by "
        f"{errors[1]:.3g}",
    )


def serialize_both(whole_class: type[nn.Module] = OneForward) -> dict[str, Any]:
    """Trace, script and save a model in two pieces and one in a single piece; list what is in each archive."""

    def computing(graph: Any) -> tuple[str, ...]:
        names = list_operators(graph)
        return tuple(sorted(name for name in names if name.startswith("aten::") or name == "prim::If"))

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
        methods = saved_methods(scripted, type(model).__name__)
        graphs = computing(traced.inlined_graph), computing(scripted.inlined_graph)
        pieces.append((*graphs, tuple(scripted.state_dict()), methods))
    return dict(zip(("traced", "scripted", "state", "methods"), zip(*pieces, strict=True), strict=True))


@claim(
    "FI-6",
    "moving logic from `forward` to `_forward_impl` changes what is serialized",
    FALSE,
    serialize_both,
    needs=TRACE + SCRIPT,
)
def judge_changes_serialized(traced: Any, scripted: Any, state: Any, methods: Any) -> Answer:
    """True if every form of saving differs between the two models, false if none does."""
    pairs = {
        "operators of the traced graph": traced,
        "operators of the scripted graph": scripted,
        "names of the tensors": state,
        "methods in the scripted code": methods,
    }
    differ = [f"{name} ({len(split)}, {len(whole)})" for name, (split, whole) in pairs.items() if split != whole]
    same = [f"{name} ({len(split)})" for name, (split, whole) in pairs.items() if split == whole]
    only_split = [name for name in methods[0] if name not in methods[1]]
    return Answer(
        true_in_parts(split != whole for split, whole in pairs.values()),
        f"the same in both: {', '.join(same) or 'nothing'}; different: {', '.join(differ) or 'nothing'}; only the "
        f"split model's code holds {', '.join(only_split) or 'nothing'}",
    )


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
) -> dict[str, Any]:
    """Run each module in eager, and then script it; returns errors by class, "" where it compiles."""
    errors = {}
    for module_class in modules:
        module_class()(torch.ones(2, 2))  # raises here if eager cannot run it either
        _, errors[module_class.__name__] = catch(torch.jit.script, module_class())
    return {"errors": errors}


@claim("FM-6", "`torch.jit.script` limits the Python that `forward` may use", TRUE, script_python, needs=SCRIPT)
def judge_restricts(errors: dict[str, str]) -> Answer:
    """True if something that eager runs cannot be scripted."""
    refused = [name for name, error in errors.items() if error]
    return Answer(
        true_if(bool(refused)),
        f"of {len(errors)} forwards that eager runs, scripting refuses {len(refused)}: "
        f"{', '.join(refused) or 'none'}",
    )


def trace_child(spelling: Callable[..., Tensor] = nn.Linear.forward) -> dict[str, Any]:
    """Trace two parents: one calls its child, one reaches it by `spelling`; list what each trace has."""

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
    return {"calls": calls, "scopes": scopes, "operators": operators}


@claim("CF-7", "tracing for TorchScript relies on `__call__`", DEPENDS, trace_child, needs=TRACE)
def judge_tracing_relies_on_call(calls: list[int], scopes: list[int], operators: list[tuple[str, ...]]) -> Answer:
    """Depends if structure is lost and operators are not; true if operators are lost; false if nothing is."""
    require(calls[0] > 0 and scopes[0] > 0, "by call the child shows in the trace")
    loses_structure = calls[1] < calls[0] or scopes[1] < scopes[0]
    return Answer(
        TRUE if operators[0] != operators[1] else true_in_parts((False, loses_structure)),
        f"child(x) and child.forward(x) are traced to {', '.join(operators[0])} and {', '.join(operators[1])}; "
        f"the trace shows a submodule's call {times(calls[0])} and {times(calls[1])}, its scope "
        f"{times(scopes[0])} and {times(scopes[1])}",
    )


def register_on_compiled() -> dict[str, Any]:
    """Register a forward hook on a scripted and on a traced module, and call both."""
    errors, fired = {}, {}
    for how, compiled in (
        ("scripted", torch.jit.script(nn.Linear(2, 2))),
        ("traced", torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))),
    ):
        log: list[str] = []
        module: Any = compiled
        _, errors[how] = catch(module.register_forward_hook, lambda *_, log=log: log.append("hook"))
        module(torch.ones(1, 2))
        fired[how] = len(log)
    return {"errors": errors, "fired": fired}


@claim(
    "TS-1",
    "`register_forward_hook` puts a hook on a scripted module",
    FALSE,
    register_on_compiled,
    needs=TRACE + SCRIPT,
)
def judge_can_register(errors: dict[str, str], fired: dict[str, int]) -> Answer:
    """True if a scripted module takes the hook and fires it."""
    scripted = errors["scripted"] or f"fired {times(fired['scripted'])}"
    traced = errors["traced"] or f"takes one, which fired {times(fired['traced'])} in one call"
    return Answer(
        true_if(not errors["scripted"] and fired["scripted"] > 0),
        f"the scripted module answers “{scripted}”; a traced one {traced}",
    )


def reach_forward_in_hook(attribute: str = "forward") -> dict[str, Any]:
    """Run `module.forward` inside a hook on a traced module: a scripted one takes no hooks at all."""
    met = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        again, error = catch(lambda: getattr(module, attribute)(*inputs))
        met.append((error, None if error else (again - output).abs().max().item()))

    traced: Any = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    traced.register_forward_hook(hook)
    traced(torch.ones(1, 2))
    error, difference = met[0] if met else ("", None)
    return {"hook_runs": len(met), "error": error, "difference": difference}


@claim(
    "TS-2", "in such a hook `module.forward` raises an AttributeError", FALSE, reach_forward_in_hook, needs=TRACE
)
def judge_attribute_error(hook_runs: int, error: str, difference: float | None) -> Answer:
    """True if the hook ran and met an AttributeError."""
    require(hook_runs > 0, "the hook on a traced module runs")
    outcome = error or f"gave a result {difference:.3g} away from the output"
    return Answer(
        true_if(error.startswith("AttributeError")),
        f"the hook on a traced module ran {times(hook_runs)}, and module.forward in it {outcome}",
    )


def trace_with_hook(registered: str = "before") -> dict[str, Any]:
    """Trace a module with a hook that triples its output; with registered="after", the hook comes too late."""
    linear, x, ran = nn.Linear(2, 2), torch.ones(1, 2), []
    plain = linear(x)

    def triple(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ran.append("hook")
        return output * 3

    if registered == "before":
        linear.register_forward_hook(triple)
    trace: Any = torch.jit.trace(linear, x)
    if registered == "after":
        linear.register_forward_hook(triple)
    while_tracing = len(ran)
    trace(x)
    scale = (trace(x) / plain).mean().item()
    triplings = str(trace.inlined_graph).count("aten::mul(")
    later = len(ran) - while_tracing
    return {"while_tracing": while_tracing, "afterwards": later, "triplings": triplings, "scale": scale}


@claim(
    "TS-3",
    "tracing runs the hooks, and their work on tensors becomes part of the graph",
    TRUE,
    trace_with_hook,
    needs=TRACE,
)
def judge_baked_in(while_tracing: int, afterwards: int, triplings: int, scale: float) -> Answer:
    """True if the hook ran while tracing and its tensor work is in the graph and in the output."""
    return Answer(
        true_if(while_tracing > 0 and triplings > 0 and abs(scale - 3) < 1e-4),
        f"the hook's Python ran {times(while_tracing)} while tracing and {times(afterwards)} in two calls "
        f"afterwards; the graph holds {triplings} aten::mul and the output is ×{scale:.3g}",
    )


def typed_hook(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
    """Triple the output, in the Python and with the types that TorchScript takes."""
    return output * 3


def untyped_hook(self: Any, input, output):  # pyright: ignore[reportMissingParameterType]
    """Triple the output; without types TorchScript takes the inputs for a single tensor."""
    return output * 3


def catching_hook(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
    """Triple the output, in Python that TorchScript does not know."""
    try:
        return output * 3
    except ValueError:
        return output


def script_with_hooks(
    hooks: tuple[Callable[..., Any], ...] = (typed_hook, untyped_hook, catching_hook),
) -> dict[str, Any]:
    """Script a module that carries a hook, and compare its output with the module without one."""
    x, errors, scales = torch.ones(1, 2), {}, {}
    for hook in hooks:
        linear = nn.Linear(2, 2)
        plain = linear(x)
        linear.register_forward_hook(hook)
        scripted, errors[hook.__name__] = catch(torch.jit.script, linear)
        if scripted is not None:
            outputs = scripted(x), scripted.forward(x)
            scales[hook.__name__] = tuple((output / plain).mean().item() for output in outputs)
    return {"errors": errors, "scales": scales}


@claim(
    "TS-5",
    "a hook must be written in TorchScript's Python to survive scripting",
    TRUE,
    script_with_hooks,
    needs=SCRIPT,
)
def judge_must_be_compatible(errors: dict[str, str], scales: dict[str, tuple[float, float]]) -> Answer:
    """True if some hook survives, as a call shows, and another is refused."""
    survived = [name for name, (by_call, _) in scales.items() if abs(by_call - 3) < 1e-4]
    refused = [name for name, error in errors.items() if error]
    kept = [
        f"{name} makes scripted(x) ×{scales[name][0]:.3g} and scripted.forward(x) ×{scales[name][1]:.3g}"
        for name in survived
    ]
    return Answer(
        true_if(bool(survived and refused)),
        f"{len(refused)} of {len(errors)} hooks that eager runs are refused ({', '.join(refused) or 'none'}); "
        f"{'; '.join(kept) or 'none survives'}",
    )
