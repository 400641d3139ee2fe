"""The measured steps as a trace for ui.perfetto.dev and chrome://tracing: a rank is a process, a trial a thread.

Format: the JSON object form of the Trace Event Format (Google's document of that name). Times are microseconds,
and every step begins at 0, so that trials stand below one another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ddpcall.evidence import AXES, Cell
from ddpcall.files import replace_text


def write_trace(timeline_records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the records of a timeline.jsonl as one trace.

    Args:
        timeline_records: The records, as read from JSON.
        path: The file to write.

    Raises:
        KeyError: A record lacks one of the fields that docs/run_directory.md promises.
    """
    trace = {"traceEvents": list(_trace_events(timeline_records)), "displayTimeUnit": "ms"}
    replace_text(path, json.dumps(trace) + "\n")


def _trace_events(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    threads: dict[tuple[str, ...], int] = {}
    for rank in sorted({record["rank"] for record in records}):
        yield _metadata("process_name", f"rank {rank}", rank)
    for record in records:
        cell = tuple(record[key] for key in AXES)
        place = {"pid": record["rank"], "tid": threads.setdefault(cell, len(threads) + 1)}
        yield _metadata("thread_name", _label(record), **place)
        yield _metadata("thread_sort_index", place["tid"], **place)
        yield from _events_of(record, place)


def _metadata(name: str, value: str | int, pid: int, tid: int = 0) -> dict[str, Any]:
    key = "sort_index" if name.endswith("sort_index") else "name"
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": {key: value}}


def _label(record: dict[str, Any]) -> str:
    label = Cell(**{key: record[key] for key in AXES}).label()
    return f"{label} ({record['model'].rpartition('.')[2]}, step {record['step']})"


def _events_of(record: dict[str, Any], place: dict[str, int]) -> Iterator[dict[str, Any]]:
    for event in record["events"]:
        if event["kind"] == "bucket":
            continue
        duration_us = event["end_us"] - event["start_us"]
        yield {**_named(event), **place, "ph": "X", "ts": event["start_us"], "dur": duration_us}
    # Collectives run beside the thread's own work, and a thread's complete events must nest.
    beside = [event for event in record["events"] if event["kind"] == "bucket"]
    beside += record.get("collectives", [])
    for index, event in enumerate(beside):
        identity = f"{place['pid']}.{place['tid']}.{index}"
        yield {**_named(event), **place, "ph": "b", "id": identity, "ts": event["start_us"]}
        yield {**_named(event), **place, "ph": "e", "id": identity, "ts": event["end_us"]}
    end_us = max((event["end_us"] for event in record["events"]), default=0.0)
    for skipped in record["skipped"]:
        yield {**_named(skipped, "skipped: "), **place, "ph": "i", "s": "t", "ts": end_us}


def _named(event: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    details = {key: event[key] for key in ("owner", "detail") if event.get(key) is not None}
    return {"name": prefix + event["name"], "cat": event["kind"], "args": details}
