"""Count and time forwards and hooks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall import torch_internals as internals
from ddpcall.taps.undo import Undo, wrap_method

HOOK_DICTS = {kind: internals.HOOK_DICTS[kind].name for kind in ("forward_pre", "forward", "full_backward")}


TIMED = "_ddpcall_timed"


@dataclass(frozen=True)
class Span:
    """Something that began and ended, in nanoseconds of `time.perf_counter_ns`.

    Attributes:
        raised: The class of the exception it ended in; None where it returned.
    """

    kind: str
    name: str
    owner: str | None
    begin_ns: int
    end_ns: int
    detail: str | None = None
    raised: str | None = None


@dataclass
class SpanLog:
    """Collects spans while `recording` is set, and costs a test of that flag while it is not."""

    recording: bool = False
    spans: list[Span] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, kind: str, name: str, owner: str | None = None, detail: str | None = None) -> Generator[None]:
        """Note when the body began and ended, also when it raises."""
        if not self.recording:
            yield
            return
        raised = None
        began = time.perf_counter_ns()
        try:
            yield
        except BaseException as error:
            raised = type(error).__name__
            raise
        finally:
            self.spans.append(Span(kind, name, owner, began, time.perf_counter_ns(), detail, raised))


@dataclass(frozen=True)
class SpanPlace:
    """A log, and what the spans of one module are called in it."""

    log: SpanLog
    name: str
    owner: str
    detail: str | None = None

    def span(self, kind: str, detail: str | None = None) -> contextlib.AbstractContextManager[None]:
        """Return the context to log; `detail` wins over the place's own."""
        return self.log.span(kind, self.name, self.owner, detail or self.detail)


def count_forwards(
    module: nn.Module, counter: Tensor, differentiable: Tensor, place: SpanPlace | None = None
) -> Undo:
    """Count the runs of a module's forward, however it was reached, and those a gradient can flow back through.

    The counters are tensors, so that compiled code counts too: dynamo traces the addition into the graph
    instead of guarding on a Python number, and nothing is recompiled. Compiled code logs no spans: dynamo folds
    `is_compiling()` and never reads whether the log records, so that nothing is recompiled when it begins to.
    One wrapper does both, since a second one would make dynamo compile more frames where a graph breaks.

    Args:
        module: The module to observe.
        counter: Shape (), integer, on any device: one more for every run.
        differentiable: The same, for runs whose output requires a gradient: only those have a backward.
        place: Where and by what name a span is logged for each run, while that log records; None: nowhere.

    Blind to: `type(module).forward(module, x)` and the functional form on the module's weights.
    """

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or place is None or not place.log.recording:
                outputs = original(*args, **kwargs)
            else:
                with place.span("forward"):
                    outputs = original(*args, **kwargs)
            counter.add_(1)
            if requires_gradient(outputs):
                differentiable.add_(1)
            return outputs

        return forward

    return wrap_method(module, "forward", counting)


def requires_gradient(outputs: Any) -> bool:
    """Say whether any tensor in nested tuples, lists and dicts requires a gradient."""
    if isinstance(outputs, Tensor):
        return outputs.requires_grad
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    return isinstance(outputs, tuple | list) and any(requires_gradient(output) for output in outputs)


def count_hook(module: nn.Module, kind: str, counter: Tensor) -> Undo:
    """Register a counting hook that adds one to `counter` each time it fires.

    Args:
        module: Where to register.
        kind: forward_pre, forward or full_backward.
        counter: Shape (), integer.
    """

    def count(*_: Any) -> None:
        counter.add_(1)

    register = {
        "forward_pre": module.register_forward_pre_hook,
        "forward": module.register_forward_hook,
        "full_backward": module.register_full_backward_hook,
    }[kind]
    # A compiled module writes this flag through to the module it holds, and keeps its own.
    flag_owner = internals.ORIG_MOD.of(module, module)
    had_full = internals.IS_FULL_BACKWARD_HOOK.of(flag_owner)
    handle: Any = register(count)

    def undo() -> None:
        handle.remove()
        setattr(flag_owner, internals.IS_FULL_BACKWARD_HOOK.name, had_full)

    return undo


def count_global_hook(kind: str, counters: dict[int, Tensor]) -> Undo:
    """Register a counting hook for every module, counting those in `counters`, keyed by `id(module)`."""

    def count(module: nn.Module, *_: Any) -> None:
        counter = counters.get(id(module))
        if counter is not None:
            counter.add_(1)

    hooks = nn.modules.module
    register: Any = {
        "forward_pre": hooks.register_module_forward_pre_hook,
        "forward": hooks.register_module_forward_hook,
        "full_backward": hooks.register_module_full_backward_hook,
    }[kind]
    had_full = internals.GLOBAL_IS_FULL_BACKWARD_HOOK.of(hooks)
    handle = register(count)

    def undo() -> None:
        handle.remove()
        setattr(hooks, internals.GLOBAL_IS_FULL_BACKWARD_HOOK.name, had_full)

    return undo


def time_hooks(module: nn.Module, kind: str, place: SpanPlace) -> Undo:
    """Log a span for each run of the hooks of one kind that a module now carries, the script's among them.

    Hooks that are timed already are left alone, so it can be called again after more were registered.

    Args:
        module: The module; its hooks keep their places, keys and flags, and stay removable by their handles.
        kind: forward_pre, forward or full_backward.
        place: Where and by what name the spans are logged, while that log records.

    Blind to: hooks registered later, global ones, and hooks inside compiled code.
    """
    hooks = getattr(module, HOOK_DICTS[kind])
    originals = {key: hook for key, hook in hooks.items() if not hasattr(hook, TIMED)}
    timed = {key: _timed_hook(hook, kind, place) for key, hook in originals.items()}
    hooks.update(timed)

    def undo() -> None:
        for key, hook in originals.items():
            if hooks.get(key) is timed[key]:
                hooks[key] = hook

    return undo


def _timed_hook(hook: Callable[..., Any], kind: str, place: SpanPlace) -> Callable[..., Any]:
    span_kind, detail = ("pre_hook" if kind == "forward_pre" else "hook"), name_function(hook)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not place.log.recording:
            return hook(*args, **kwargs)
        with place.span(span_kind, detail):
            return hook(*args, **kwargs)

    setattr(timed, TIMED, hook)
    return timed


def name_hooks(module: nn.Module, kind: str) -> tuple[str, ...]:
    """Return the names of the functions that a module carries as hooks of one kind, in the order they run in."""
    return tuple(name_function(getattr(hook, TIMED, hook)) for hook in getattr(module, HOOK_DICTS[kind]).values())


def name_function(function: Callable[..., Any]) -> str:
    """Return a function's qualified name without its local scopes; of any other callable, its class."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return name.rpartition("<locals>.")[2]


def count_registered_hooks(module: nn.Module, kind: str) -> int:
    """Return how many hooks of one kind a module carries."""
    return len(getattr(module, HOOK_DICTS[kind]))
