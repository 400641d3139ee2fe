"""The reducer probe: was DDP's reducer armed, and did gradients arrive while it was?"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from ddpcall import torch_internals as internals
from ddpcall.evidence import ReducerEvidence
from ddpcall.probes.kept import Kept
from ddpcall.taps import ReducerLog, tap_gradient_arrivals, tap_lazy_reducer, tap_reducer
from ddpcall.wrappers import Subject, find_reducers, replicate_state


class ReducerObserver(Kept):
    """Counts by step; call `end_step()` after every backward."""

    kept = ("_steps",)

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._steps: list[tuple[int, int, int]] = []
        self._logged: dict[str, Any] = {}
        self._num_reducers = 0
        self.log = ReducerLog()

    def end_step(self) -> None:
        """Close the step: what was counted since the last call belongs to it."""
        self._steps.append(self.log.take())

    def arrivals(self, step: int) -> tuple[int, int] | None:
        """Return how many gradients arrived armed and unarmed in a closed step; None before it was closed."""
        return self._steps[step][1:] if step < len(self._steps) else None

    def read_logger(self) -> None:
        """Read DDP's own counters, while its instances are alive."""
        reducers = find_reducers(self._subject)
        self._num_reducers = len(reducers)
        for ddp in reducers:
            self._logged = internals.DDP_LOGGING_DATA.of(ddp, dict)()

    def evidence(self) -> ReducerEvidence:
        """Return what was counted, one entry a step."""
        armings, armed, unarmed = zip(*self._steps, strict=True) if self._steps else ((), (), ())
        return ReducerEvidence(
            reducers=self._num_reducers,
            armings=armings,
            arrivals_armed=armed,
            arrivals_unarmed=unarmed,
            logged_iteration=self._logged.get("iteration"),
            logged_buckets=self._logged.get("num_buckets_reduced"),
        )


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
        try:
            yield observer
        finally:
            observer.read_logger()
