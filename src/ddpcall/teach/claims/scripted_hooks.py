"""Claims about hooks and TorchScript; deprecated as in `scripting`, recorded and skipped in the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.teach.claims.claim import Claim, Ruling, Verdict, times

TRACE = ("jit.trace",)
SCRIPT = ("jit.script",)


@dataclass(frozen=True)
class LateHooks:
    """What a compiled module answers to `register_forward_hook`: the error, or "" and how often it then fired."""

    scripted_error: str
    scripted_fired: int
    traced_error: str
    traced_fired: int


def register_on_compiled() -> LateHooks:
    """Register a forward hook on a scripted and on a traced module, and call both."""

    def try_to_register(module: Any) -> tuple[str, int]:
        fired = []
        try:
            module.register_forward_hook(lambda *_: fired.append("hook"))
        except Exception as error:
            return f"{type(error).__name__}: {error}", 0
        module(torch.ones(1, 2))
        return "", len(fired)

    scripted = try_to_register(torch.jit.script(nn.Linear(2, 2)))
    traced = try_to_register(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    return LateHooks(*scripted, *traced)


def judge_can_register(seen: LateHooks) -> Ruling:
    """True if a scripted module takes the hook and fires it."""
    holds = not seen.scripted_error and seen.scripted_fired > 0
    traced = seen.traced_error or f"takes one, which fired {times(seen.traced_fired)} in one call"
    return Ruling(
        Verdict.TRUE if holds else Verdict.FALSE,
        f"the scripted module answers “{seen.scripted_error or f'fired {times(seen.scripted_fired)}'}”; a "
        "traced one "
        f"{traced}",
    )


@dataclass(frozen=True)
class ForwardInHook:
    """What a hook on a traced module met in `module.forward`: the error, or "" and how far off its result was."""

    hook_runs: int
    error: str
    difference: float | None


def reach_forward_in_hook(attribute: str = "forward") -> ForwardInHook:
    """Run `module.forward` inside a hook on a traced module: a scripted one takes no hooks at all."""
    entered, errors, differences = [], [], []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        entered.append("hook")
        try:
            again = getattr(module, attribute)(*inputs)
            differences.append((again - output).abs().max().item())
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    traced: Any = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    traced.register_forward_hook(hook)
    traced(torch.ones(1, 2))
    return ForwardInHook(len(entered), "".join(errors), differences[0] if differences else None)


def judge_attribute_error(seen: ForwardInHook) -> Ruling:
    """True if the hook ran and met an AttributeError."""
    outcome = seen.error or f"gave a result {seen.difference:.3g} away from the output"
    return Ruling(
        Verdict.TRUE if seen.hook_runs and seen.error.startswith("AttributeError") else Verdict.FALSE,
        f"the hook on a traced module ran {times(seen.hook_runs)}, and module.forward in it {outcome}",
    )


@dataclass(frozen=True)
class TracedHook:
    """What tracing made of a hook that triples the output.

    Attributes:
        runs_while_tracing: How often its Python ran during `trace`.
        runs_afterwards: How often in two calls of the trace.
        multiplications: `aten::mul` nodes in the graph.
        scale: The trace's output against that of the module without the hook.
    """

    runs_while_tracing: int
    runs_afterwards: int
    multiplications: int
    scale: float


def trace_with_hook(registered: str = "before") -> TracedHook:
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
    multiplications = str(trace.inlined_graph).count("aten::mul(")
    return TracedHook(while_tracing, len(ran) - while_tracing, multiplications, scale)


def judge_baked_in(seen: TracedHook) -> Ruling:
    """True if the hook ran while tracing and its tensor work is in the graph and in the output."""
    baked = seen.multiplications > 0 and abs(seen.scale - 3) < 1e-4
    return Ruling(
        Verdict.TRUE if seen.runs_while_tracing > 0 and baked else Verdict.FALSE,
        f"the hook's Python ran {times(seen.runs_while_tracing)} while tracing and "
        f"{times(seen.runs_afterwards)} in two "
        f"calls afterwards; the graph holds {seen.multiplications} aten::mul and the output is ×{seen.scale:.3g}",
    )


def typed_hook(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
    """Triple the output, in the Python and with the types that TorchScript takes."""
    return output * 3


def untyped_hook(self: Any, input, output):
    """Triple the output; without types TorchScript takes the inputs for a single tensor."""
    return output * 3


def catching_hook(self: Any, input: tuple[Tensor], output: Tensor) -> Tensor:
    """Triple the output, in Python that TorchScript does not know."""
    try:
        return output * 3
    except ValueError:
        return output


@dataclass(frozen=True)
class ScriptedHooks:
    """What scripting made of hooks that triple the output, by hook.

    Attributes:
        errors: The error, or "".
        scale_by_call: `scripted(x)` against the module without hooks; None if it did not compile.
        scale_by_forward: The same for `scripted.forward(x)`.
    """

    errors: dict[str, str]
    scale_by_call: dict[str, float | None]
    scale_by_forward: dict[str, float | None]


def script_with_hooks(
    hooks: tuple[Callable[..., Any], ...] = (typed_hook, untyped_hook, catching_hook),
) -> ScriptedHooks:
    """Script a module that carries a hook, and compare what comes out."""
    x, errors = torch.ones(1, 2), {}
    by_call: dict[str, float | None] = {}
    by_forward: dict[str, float | None] = {}
    for hook in hooks:
        name, linear = hook.__name__, nn.Linear(2, 2)
        plain = linear(x)
        linear.register_forward_hook(hook)
        try:
            scripted: Any = torch.jit.script(linear)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
            by_call[name] = by_forward[name] = None
            continue
        errors[name] = ""
        by_call[name] = (scripted(x) / plain).mean().item()
        by_forward[name] = (scripted.forward(x) / plain).mean().item()
    return ScriptedHooks(errors, by_call, by_forward)


def judge_must_be_compatible(seen: ScriptedHooks) -> Ruling:
    """True if some hook survives, as a call shows, and another is refused."""
    survived = [name for name, scale in seen.scale_by_call.items() if scale is not None and abs(scale - 3) < 1e-4]
    refused = [name for name, error in seen.errors.items() if error]
    scales = [
        f"{name} makes scripted(x) ×{seen.scale_by_call[name]:.3g} and scripted.forward(x) "
        f"×{seen.scale_by_forward[name]:.3g}"
        for name in survived
    ]
    return Ruling(
        Verdict.TRUE if survived and refused else Verdict.FALSE,
        f"{len(refused)} of {len(seen.errors)} hooks that eager runs are refused "
        f"({', '.join(refused) or 'none'}); "
        f"{'; '.join(scales) or 'none survives'}",
    )


CLAIMS = (
    Claim(
        id="TS-1",
        text="`register_forward_hook` puts a hook on a scripted module",
        first_look=Verdict.FALSE,
        experiment=register_on_compiled,
        judge=judge_can_register,
        needs=TRACE + SCRIPT,
    ),
    Claim(
        id="TS-2",
        text="in such a hook `module.forward` raises an AttributeError",
        first_look=Verdict.FALSE,
        experiment=reach_forward_in_hook,
        judge=judge_attribute_error,
        needs=TRACE,
    ),
    Claim(
        id="TS-3",
        text="tracing runs the hooks, and their work on tensors becomes part of the graph",
        first_look=Verdict.TRUE,
        experiment=trace_with_hook,
        judge=judge_baked_in,
        needs=TRACE,
    ),
    Claim(
        id="TS-5",
        text="a hook must be written in TorchScript's Python to survive scripting",
        first_look=Verdict.TRUE,
        experiment=script_with_hooks,
        judge=judge_must_be_compatible,
        needs=SCRIPT,
    ),
)
