"""The timeline probe: what happened when in one step of a trial, on this rank."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ddpcall import torch_internals as internals
from ddpcall.evidence import HookCount, HooksOfStep, StepTimeline, TimelineEvent
from ddpcall.probes.collectives import TimedCollective, time_collectives
from ddpcall.probes.compiled import CompiledObserver
from ddpcall.probes.gradients import GradientsObserver
from ddpcall.probes.hooks import HooksObserver, list_roles, place_of
from ddpcall.probes.probe import Observer, Probe, Setting
from ddpcall.probes.reducer import ReducerObserver
from ddpcall.taps import HOOK_DICTS, Span, SpanLog, SpanPlace, count_forwards, name_hooks, time_hooks
from ddpcall.wrappers import Subject, find_reducers, replicate_state

WARM_UP_STEPS = 2  # before the step whose timeline is kept: they build buckets, compile and allocate
REDUCTIONS = frozenset({"all_reduce", "allreduce", "reduce", "reduce_scatter", internals.REDUCE_SCATTER_BASE.name})


@dataclass(frozen=True)
class Counters:
    """The other probes, whose counts tell what a step went past."""

    hooks: HooksObserver
    gradients: GradientsObserver
    compiled: CompiledObserver
    reducer: ReducerObserver | None


@dataclass(frozen=True)
class _Watched:
    """A module, its first role, its qualified name below the inner one, and what its spans are called."""

    module: nn.Module
    role: str
    path: str
    place: SpanPlace

    def place_of_hooks(self, kind: str) -> SpanPlace:
        return replace(self.place, name=f"{kind} of {self.place.name}", detail=None)


class TimelineObserver(Observer):
    """Records the steps up to the measured one, and keeps the last of them."""

    outlives_failure = True

    def __init__(self, subject: Subject, counters: Counters, log: SpanLog, measured_step: int) -> None:
        self._subject = subject
        self._counters = counters
        self._log = log
        self._measured_step = measured_step
        self._watched = [
            _Watched(module, roles[0], path, place_of(module, roles, path, log))
            for module, roles, path in list_roles(subject.wrapped, subject.inner)
        ]
        self._taps = ExitStack()
        self._began_ns = self._epoch_ns = 0
        self.latest: StepTimeline | None = None

    def evidence(self) -> StepTimeline | None:
        """Return the last step that was recorded."""
        return self.latest

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded."""
        return {"latest": None if self.latest is None else asdict(self.latest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what another process recorded."""
        if (packed := state["latest"]) is not None:
            events = tuple(TimelineEvent(**event) for event in packed["events"])
            hooks = tuple(HooksOfStep(**each) for each in packed["hooks"])
            self.latest = StepTimeline(**dict[str, Any](packed, events=events, hooks=hooks))

    def span(self, kind: str) -> AbstractContextManager[None]:
        """Return a context that times a part of the script's step, while a step is being recorded."""
        return self._log.span(kind, kind) if self._log.recording else nullcontext()

    def time_step(self, step: int) -> AbstractContextManager[None]:
        """Return the context of one step: it records up to the measured step, and does nothing after it."""
        return self._observe(step) if step <= self._measured_step else nullcontext()

    def tap_hooks(self) -> None:
        """Put taps on the hooks that are there now and have none yet."""
        for watched in self._watched:
            for kind in HOOK_DICTS:
                self._taps.callback(time_hooks(watched.module, kind, watched.place_of_hooks(kind)))

    def close(self) -> None:
        """Take all taps off the subject."""
        self._taps.close()

    @contextmanager
    def _observe(self, step: int) -> Generator[None]:
        # Dynamo compiles hooks apart and would compile again, so a compiling wrapper's are left alone until a
        # whole step has shown that this path runs none of its compiled code.
        compiles = self._subject.spec.compiles
        if not compiles or (step > 0 and self._counters.compiled.graph_runs == 0):
            self.tap_hooks()
        before, runs_before = self._counters.hooks.evidence(), self._counters.compiled.graph_runs
        raised, collectives = True, []
        try:
            with self._observe_collectives(step) as collectives, self._recording():
                yield
            raised = False
        finally:
            hooks = self._hooks_of_step(before)
            self.latest = self._describe(step, collectives, hooks, runs_before, raised)
            if raised or step == self._measured_step:
                self.close()

    def _observe_collectives(self, step: int) -> AbstractContextManager[list[TimedCollective]]:
        return time_collectives() if step == self._measured_step else nullcontext([])

    @contextmanager
    def _recording(self) -> Generator[None]:
        self._log.spans.clear()
        self._log.recording = True
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self._began_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self._log.recording = False

    def _hooks_of_step(self, before: Sequence[HookCount]) -> tuple[HooksOfStep, ...]:
        after = self._counters.hooks.evidence()
        by_place = {(watched.role, watched.path): watched for watched in self._watched}
        found = []
        for index, count in enumerate(after):
            watched = by_place.get((count.role, count.module))
            if watched is None or count.kind not in HOOK_DICTS:
                continue
            fired, forwards = (before[index].fired, before[index].forwards) if before else (0, 0)
            found.append(
                HooksOfStep(
                    kind=count.kind,
                    name=watched.place_of_hooks(count.kind).name,
                    module=watched.place.name,
                    owner=watched.place.owner,
                    functions=name_hooks(watched.module, count.kind),
                    fired=count.fired - fired,
                    forwards=count.forwards - forwards,
                )
            )
        return tuple(found)

    def _describe(
        self,
        step: int,
        collectives: Sequence[TimedCollective],
        hooks: tuple[HooksOfStep, ...],
        runs_before: int,
        raised: bool,
    ) -> StepTimeline:
        backward = [span for span in self._log.spans if span.kind == "backward"]
        events = [self._event_of_span(span) for span in self._log.spans]
        events += [self._event_of_collective(seen, backward) for seen in collectives]
        counters = self._counters
        reducer = counters.reducer if self._has_reducer() else None
        compiled = counters.compiled
        return StepTimeline(
            step=step,
            events=tuple(sorted(events, key=lambda event: (event.start_us, -event.end_us))),
            hooks=hooks,
            raised=raised,
            arrivals=None if reducer is None else reducer.arrivals(step),
            compiled_runs=compiled.graph_runs - runs_before if compiled.requested else None,
            with_gradient=counters.gradients.with_gradient() if backward and not raised else None,
        )

    def _has_reducer(self) -> bool:
        return bool(find_reducers(self._subject)) or replicate_state(self._subject) is not None

    def _event_of_span(self, span: Span) -> TimelineEvent:
        detail = span.detail
        if span.raised is not None:
            detail = f"raised {span.raised}" if detail is None else f"{detail}, raised {span.raised}"
        return TimelineEvent(
            kind=span.kind,
            name=span.name,
            owner=span.owner,
            start_us=self._since_start_us(span.begin_ns),
            end_us=self._since_start_us(span.end_ns),
            detail=detail,
        )

    def _event_of_collective(self, seen: TimedCollective, backward: Sequence[Span]) -> TimelineEvent:
        begin_ns, end_ns = seen.begin_ns - self._epoch_ns, seen.end_ns - self._epoch_ns
        around = [span for span in backward if span.begin_ns <= begin_ns <= span.end_ns]
        is_bucket = bool(around) and seen.operation in REDUCTIONS
        if is_bucket:
            # The backward waits for it, but gloo's thread may be late to tell the profiler of its end.
            end_ns = min(end_ns, around[0].end_ns)
        return TimelineEvent(
            kind="bucket" if is_bucket else "collective",
            name=seen.operation,
            owner=None,
            start_us=self._since_start_us(begin_ns),
            end_us=self._since_start_us(end_ns),
            detail=seen.describe(),
        )

    def _since_start_us(self, moment_ns: int) -> float:
        return (moment_ns - self._began_ns) / 1000


@contextmanager
def observe_timeline(
    subject: Subject, counters: Counters, *, log: SpanLog, measured_step: int
) -> Generator[TimelineObserver]:
    """Time the forwards, hooks, backward, collectives and optimizer of one step on this rank.

    Enter it after the hooks probe, and leave it before. The steps before the measured one are recorded too, as
    a warm-up of the taps and so that a trial that raises in one of them still shows how far it came; of these
    the collectives are not seen. Models that are compiled carry the taps from the first to the last step,
    since putting them on in between would recompile; others until the measured step is over.

    Args:
        subject: The wrapped model.
        counters: The probes whose counts tell what a step went past.
        log: Where the spans go; the compiled probe logs its graphs there.
        measured_step: The step to keep, from 0.

    Yields:
        The observer; put `time_step(index)` around every step, and `span(…)` around the script's parts of it.

    Blind to: modules and hooks inside compiled code, which is one span for each graph; scripted and exported
    code below its root; modules between the wrapped and the inner one; global hooks; kernels that still run on
    an accelerator when the host's call has returned. Between backward and optimizer the probes themselves take
    time, which shows as a gap. While the profiler runs, everything takes longer than in other steps.

    Source: `torch/nn/modules/module.py`, `_call_impl`.
    """
    observer = TimelineObserver(subject, counters, log, measured_step)
    with ExitStack() as stack:
        stack.callback(observer.close)
        if isinstance(subject.wrapped, torch.jit.ScriptModule):  # it takes no hooks, but it has a forward
            place, unread = place_of(subject.wrapped, ("wrapped",), "", log), torch.zeros(())
            stack.callback(count_forwards(subject.wrapped, unread, unread, place))
        yield observer


def _observe(setting: Setting) -> AbstractContextManager[TimelineObserver]:
    others: dict[str, Any] = setting.observers
    counters = Counters(others["hooks"], others["gradients"], others["compiled"], others.get("reducer"))
    observed = min(setting.steps, counters.hooks.leave_after or setting.steps)
    measured = min(WARM_UP_STEPS, observed - 1)
    return observe_timeline(setting.subject, counters, log=setting.log, measured_step=measured)


PROBE = Probe(name="timeline", observe=_observe)
