"""The reducer probe: was DDP's reducer armed, and did gradients arrive while it was?"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ddpcall import torch_internals as internals
from ddpcall.evidence import ReducerEvidence
from ddpcall.paths import Batch
from ddpcall.probes.probe import Observer, Probe, Setting
from ddpcall.taps import ReducerLog, tap_gradient_arrivals, tap_lazy_reducer, tap_reducer
from ddpcall.wrappers import Subject, find_reducers, replicate_state


class ReducerObserver(Observer):
    """Counts by step."""

    kept = ("_steps",)

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._steps: list[tuple[int, int, int]] = []
        self.log = ReducerLog()

    def end_backward(self, batch: Batch | None) -> None:
        """Close the step: what was counted since the last call belongs to it."""
        self._steps.append(self.log.take())

    def arrivals(self, step: int) -> tuple[int, int] | None:
        """Return how many gradients arrived armed and unarmed in a closed step; None before it was closed."""
        return self._steps[step][1:] if step < len(self._steps) else None

    def evidence(self) -> ReducerEvidence:
        """Return what was counted, one entry a step, and DDP's own counters, while its instances are alive."""
        armings, armed, unarmed = zip(*self._steps, strict=True) if self._steps else ((), (), ())
        reducers, logged = find_reducers(self._subject), {}
        for ddp in reducers:
            logged = internals.DDP_LOGGING_DATA.of(ddp, dict)()
        return ReducerEvidence(
            reducers=len(reducers),
            armings=armings,
            arrivals_armed=armed,
            arrivals_unarmed=unarmed,
            logged_iteration=logged.get("iteration"),
            logged_buckets=logged.get("num_buckets_reduced"),
        )

    def columns(self, evidence: ReducerEvidence) -> dict[str, Sequence[float | None]]:
        """Return armings and arrivals by step."""
        return {name: getattr(evidence, name) for name in ("armings", "arrivals_armed", "arrivals_unarmed")}


@contextmanager
def observe_reducer(subject: Subject) -> Generator[ReducerObserver]:
    """Watch DDP's reducer being armed and gradients arriving.

    Yields:
        The observer.

    Blind to: DDP's python reducer and delayed all-reduce; FSDP, which has no such reducer.

    Source: `torch/nn/parallel/distributed.py` (`_post_forward`), `torch/csrc/distributed/c10d/reducer.cpp`
    (`prepare_for_backward`), `_get_ddp_logging_data`.
    """
    observer = ReducerObserver(subject)
    with ExitStack() as stack:
        for ddp in find_reducers(subject):
            stack.callback(tap_reducer(ddp, observer.log))
        state = replicate_state(subject)
        if state is not None:
            stack.callback(tap_lazy_reducer(state, observer.log))
        stack.callback(tap_gradient_arrivals(list(subject.inner.parameters()), observer.log))
        yield observer


def _observe(setting: Setting) -> AbstractContextManager[ReducerObserver] | None:
    return None if setting.spec.own_reducer else observe_reducer(setting.subject)


PROBE = Probe(name="reducer", observe=_observe)
