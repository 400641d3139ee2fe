"""The collectives probe: torch's flight recorder as a witness that knows nothing of our taps."""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ddpcall.evidence import CollectiveEvidence, ReducerEvidence


class CollectivesObserver:
    """Marks the step boundaries in time, and counts the recorded all-reduces between them at the end."""

    def __init__(self) -> None:
        self._marks_ns = [time.time_ns()]
        self._entries: list[dict[str, Any]] | None = None

    def end_step(self) -> None:
        """Close the step; call it after the backward, before any probe talks."""
        self._marks_ns.append(time.time_ns())

    def begin_steps(self) -> None:
        """Forget what was recorded so far, such as the collectives of the DDP constructor."""
        self._marks_ns = [time.time_ns()]

    def read_recorder(self) -> None:
        """Read the flight recorder, while the process group is alive."""
        self._entries = _recorded_entries()

    def evidence(self, reducer: ReducerEvidence | None) -> CollectiveEvidence | None:
        """Compare the recorder with the reducer probe; None where this torch has no recorder for the group.

        Args:
            reducer: What that probe saw; None where it is blind to how the wrapper reduces.
        """
        if self._entries is None or not self._entries:
            return None
        counts = count_all_reduces(self._entries, self._marks_ns)
        if reducer is None:
            return CollectiveEvidence(all_reduces=tuple(counts), agrees=None)
        pairs = zip(counts, reducer.arrivals_armed, strict=True)
        agrees = all(count is None or bool(count) == bool(armed) for count, armed in pairs)
        return CollectiveEvidence(all_reduces=tuple(counts), agrees=agrees)


@contextmanager
def observe_collectives() -> Iterator[CollectivesObserver]:
    """Count the all-reduces on the default process group, step by step.

    Yields:
        The observer.

    Blind to: other process groups; steps older than the recorder's ring buffer (2,000 collectives by
    default); all-reduces that the script issues itself, which it cannot tell from the reducer's.

    Source: `torch/csrc/distributed/c10d/FlightRecorder.hpp`.
    """
    observer = CollectivesObserver()
    try:
        yield observer
    finally:
        observer.read_recorder()


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
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return None
    entries = json.loads(_dump_fr_trace_json()).get("entries", [])
    ours = [entry for entry in entries if entry["process_group"][1] == "default_pg"]
    return sorted(ours, key=lambda entry: entry["record_id"])
