"""The compiled probe: did compiled code run, or did the call slip past it into eager Python?"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from ddpcall import torch_internals as internals
from ddpcall.evidence import CompiledEvidence
from ddpcall.paths import Batch
from ddpcall.probes.probe import Observer, Probe, Setting
from ddpcall.taps import SpanLog
from ddpcall.wrappers import CompileBackend


class CompiledObserver(Observer):
    """Hands out a compile backend that counts the graphs it made and each time one ran."""

    kept = ("_calls_compiled", "_calls_eager")  # a trial that compiles is not resumed: its frames are counted anew

    def __init__(self, requested: bool, backend: CompileBackend, log: SpanLog) -> None:
        self.requested = requested
        self.graph_runs = 0
        self._backend = backend
        self._log = log
        self._graphs = 0
        self._runs_before_step = 0
        self.count_frames: Callable[[], int] = lambda: 0
        self._calls_compiled = 0
        self._calls_eager = 0

    def backend(self, graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        """Compile with the named backend; the result counts its runs. To be given to torch.compile."""
        compiled = internals.LOOKUP_BACKEND.get()(self._backend)(graph_module, example_inputs)
        name = f"compiled graph {self._graphs}"
        self._graphs += 1

        def run(*args: Any) -> Any:
            self.graph_runs += 1
            with self._log.span("forward", name, None, str(self._backend)):
                return compiled(*args)

        return run

    def end_backward(self, batch: Batch | None) -> None:
        """Close the step: it ran compiled if any compiled graph ran since the last call."""
        if self.graph_runs > self._runs_before_step:
            self._calls_compiled += 1
        else:
            self._calls_eager += 1
        self._runs_before_step = self.graph_runs

    def evidence(self) -> CompiledEvidence:
        """Return what was counted."""
        return CompiledEvidence(
            requested=self.requested,
            frames=self.count_frames(),
            calls_compiled=self._calls_compiled,
            calls_eager=self._calls_eager,
        )


@contextmanager
def observe_compiled(
    requested: bool, backend: CompileBackend, log: SpanLog | None = None
) -> Generator[CompiledObserver]:
    """Count compiled frames, and the steps that ran compiled code. Enter it before the model is wrapped.

    Args:
        requested: Whether the wrapper compiles at all; if not, dynamo is not even imported.
        backend: The name of the backend that does the work: eager, aot_eager, inductor …
        log: Gets a span for each run of a graph, while it records.

    Yields:
        The observer; give its `backend` to the wrapper. Dynamo's caches are emptied on entry and exit.

    Blind to: how much of a step was compiled; one graph is enough to call the step compiled.

    Source: `torch/_dynamo/utils.py` (`counters["frames"]`).
    """
    observer = CompiledObserver(requested, backend, log or SpanLog())
    if not requested:
        yield observer
        return
    counters = internals.COUNTERS.get()
    torch.compiler.reset()
    before = counters["frames"]["ok"]
    observer.count_frames = lambda: counters["frames"]["ok"] - before
    try:
        yield observer
    finally:
        frames = observer.count_frames()
        observer.count_frames = lambda: frames
        torch.compiler.reset()


@contextmanager
def _observe(setting: Setting) -> Generator[CompiledObserver]:
    with observe_compiled(setting.spec.compiles, setting.compile_backend, setting.log) as observer:
        setting.compile_backend = observer.backend
        yield observer


PROBE = Probe(name="compiled", observe=_observe, before_wrapping=True)
