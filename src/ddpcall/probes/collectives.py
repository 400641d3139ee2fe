"""The collectives probe: torch's flight recorder, which knows nothing of our taps."""

from __future__ import annotations

import json
import math
import os
import time
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ddpcall import torch_internals as internals
from ddpcall.accelerator import BACKENDS
from ddpcall.evidence import CollectiveEvidence, ReducerEvidence
from ddpcall.paths import Batch
from ddpcall.probes.probe import Observer, Probe

LATE_SECONDS = 2.0
POLL_SECONDS = 0.001


class CollectivesObserver(Observer):
    """Marks the step boundaries in time, and counts the recorded all-reduces between them at the end."""

    kept = ("_counts",)

    def __init__(self, observers: Mapping[str, Observer]) -> None:
        self._observers = observers
        self._begun = False
        self._counts: list[int | None] = []
        self._marks_ns = [time.time_ns()]

    def begin_step(self, step: int) -> None:
        """Forget, at the first, what was recorded before: the collectives of the DDP constructor."""
        if not self._begun:
            self._marks_ns = [time.time_ns()]
        self._begun = True

    def end_backward(self, batch: Batch | None) -> None:
        """Close the step; to be called before any probe talks."""
        self._marks_ns.append(time.time_ns())

    def flush(self) -> None:
        """Count the steps closed so far: another process cannot ask this one's recorder."""
        entries = _recorded_entries()
        if entries:
            self._counts += count_all_reduces(entries, self._marks_ns)
            self._marks_ns = self._marks_ns[-1:]

    def evidence(self) -> CollectiveEvidence | None:
        """Read the flight recorder, while the process group is alive, and compare it with the reducer probe."""
        reducer = self._observers.get("reducer")
        return self.compare(_recorded_entries(), reducer and reducer.evidence())

    def compare(
        self, entries: list[dict[str, Any]] | None, reducer: ReducerEvidence | None
    ) -> CollectiveEvidence | None:
        """Compare the recorder with the reducer probe; None where this torch has no recorder for the group.

        Args:
            entries: What the recorder has of the default group.
            reducer: What that probe saw; None where it is blind to how the wrapper reduces.
        """
        if not entries:
            return None
        counts = self._counts + count_all_reduces(entries, self._marks_ns)
        if reducer is None:
            return CollectiveEvidence(all_reduces=tuple(counts), agrees=None)
        pairs = zip(counts, reducer.arrivals_armed, strict=True)
        agrees = all(count is None or bool(count) == bool(armed) for count, armed in pairs)
        return CollectiveEvidence(all_reduces=tuple(counts), agrees=agrees)


@contextmanager
def observe_collectives(observers: Mapping[str, Observer]) -> Generator[CollectivesObserver]:
    """Count the all-reduces on the default process group, step by step.

    Args:
        observers: Those of the trial, by name; at the end the reducer's is among them, where there is any.

    Yields:
        The observer.

    Blind to: other process groups; steps older than the recorder's ring buffer (2,000 collectives by
    default); all-reduces that the script issues itself, which it cannot tell from the reducer's.

    Source: `torch/csrc/distributed/c10d/FlightRecorder.hpp`.
    """
    yield CollectivesObserver(observers)


PROBE = Probe(name="collectives", observe=lambda setting: observe_collectives(setting.observers))


@dataclass(frozen=True)
class TimedCollective:
    """One collective as torch's profiler saw it, in nanoseconds since the epoch.

    Attributes:
        operation: all_reduce, broadcast, all_gather …
        shapes: Shapes of its inputs.
        dtype: Dtype of its inputs, as the profiler calls it; empty where it does not say.
    """

    operation: str
    begin_ns: int
    end_ns: int
    shapes: tuple[tuple[int, ...], ...]
    dtype: str

    def describe(self) -> str:
        """Return how many bytes went in; the shapes where the dtype's size is not known."""
        size = _ITEM_BYTES.get(self.dtype)
        if size is None:
            return " ".join(map(str, self.shapes))
        return f"{size * sum(math.prod(shape) for shape in self.shapes)} bytes"


_ITEM_BYTES = {"float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2, "int": 4, "long int": 8, "long": 8}


@contextmanager
def time_collectives() -> Generator[list[TimedCollective]]:
    """Time the collectives of the process group's backend while the body runs.

    Yields:
        A list, filled when the body has ended, in the order in which they began; it stays empty where another
        profile is running, since torch allows one at a time, and where a collective has not ended within
        `LATE_SECONDS` after the body: then the profile goes on running.

    Blind to: which process group a collective ran on; gloo's device beneath it. On CUDA the times are those of
    the host's call, not of the kernels.

    Changes: torch's profiler records every operator meanwhile, which makes the body slower (measured: 2 to 10 ms
    for starting and stopping). No number that is computed changes.

    Source: `torch/csrc/distributed/c10d/ProcessGroupGloo.cpp` (`AsyncWork::recordAsyncWorkProfilingInfo`).
    """
    found: list[TimedCollective] = []
    if internals.IS_PROFILER_ENABLED.get(True):
        yield found
        return
    began_ns = time.time_ns()
    with _quiet_kineto():
        profiling = torch.autograd.profiler.profile(record_shapes=True)
        profiling.__enter__()
    try:
        yield found
    finally:
        if _wait_for_gloo(began_ns):
            profiling.__exit__(None, None, None)
            results: Any = profiling.kineto_results
            found += sorted(_timed_collectives(results.events()), key=lambda collective: collective.begin_ns)


def _wait_for_gloo(began_ns: int) -> bool:
    """Wait until gloo's threads have told the profiler of the end of each collective since then; say whether.

    A backward goes on as soon as a bucket's future is complete; only then does gloo's thread write the end into
    the profile. Stopping the profile in between frees that memory: a write into it is a crash later on, in any
    place. The flight recorder retires a collective after the write.

    Source: `ProcessGroupGloo::runLoop`, `AsyncWork::finishWorkGloo`, `Work::finish`; `KinetoThreadLocalState`,
    whose `onFunctionExit` writes to an event that `RecordQueue::getRecords` freed.
    """
    deadline = time.monotonic() + LATE_SECONDS
    while any(
        entry["profiling_name"].startswith("gloo:") and not (entry["retired"] or entry["is_p2p"])
        for entry in _all_entries() or ()
        if entry["time_created_ns"] >= began_ns
    ):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _timed_collectives(events: Iterable[Any]) -> Iterator[TimedCollective]:
    for event in events:
        backend, _, operation = event.name().partition(":")
        if backend not in BACKENDS or not operation:
            continue
        begin_ns = event.start_ns()
        shapes = tuple(tuple(shape) for shape in event.shapes())
        dtype = next(iter(event.dtypes()), "")
        yield TimedCollective(operation, begin_ns, begin_ns + max(0, event.duration_ns()), shapes, dtype)


@contextmanager
def _quiet_kineto() -> Generator[None]:
    """Keep the profiler from writing "USDT: … profiler_start" to stderr, which CPU builds of torch 2.13 do.

    The level is read once in a process, when its first profile starts.
    """
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]


def count_all_reduces(entries: list[dict[str, Any]], marks_ns: list[int]) -> list[int | None]:
    """Count all-reduces between consecutive marks.

    Args:
        entries: Flight recorder entries of one process group, oldest first.
        marks_ns: Step boundaries, nanoseconds since the epoch; one more than there are steps.

    Returns:
        One count a step; None for steps that began before the oldest entry kept, if any was dropped.
    """
    counts: list[int | None] = [0] * (len(marks_ns) - 1)
    dropped = bool(entries) and entries[0]["record_id"] > 0
    for entry in entries:
        step = bisect_right(marks_ns, entry["time_created_ns"]) - 1
        if "all_reduce" in entry["profiling_name"] and 0 <= step < len(counts):
            counts[step] = (counts[step] or 0) + 1
    if dropped:
        oldest = bisect_right(marks_ns, entries[0]["time_created_ns"])
        counts[:oldest] = [None] * min(oldest, len(counts))
    return counts


def _recorded_entries() -> list[dict[str, Any]] | None:
    """Read the entries of the default group (name "0" or description "default_pg") from torch's private dump."""
    entries = _all_entries()
    if entries is None:
        return None
    ours = [entry for entry in entries if entry["process_group"][1] == "default_pg"]
    return sorted(ours, key=lambda entry: entry["record_id"])


def _all_entries() -> list[dict[str, Any]] | None:
    dump = internals.DUMP_FLIGHT_RECORDER.get(None)
    return None if dump is None else json.loads(dump()).get("entries", [])
