"""The trace that Perfetto reads: valid, whole, and with what was skipped."""

import json

from ddpcall.lab.perfetto import write_trace

CELL = {"wrapper": "ddp", "path": "call", "window": "plain", "hooks": "early", "mode": "train", "model": "a.Net"}


def make_event(kind, name, start_us, end_us, owner=None, detail=None):
    return {
        "kind": kind,
        "name": name,
        "owner": owner,
        "start_us": start_us,
        "end_us": end_us,
        "detail": detail,
    }


def make_record(rank=0, events=(), skipped=(), collectives=(), **cell):
    return {
        **CELL,
        **cell,
        "rank": rank,
        "step": 2,
        "raised": False,
        "events": list(events),
        "collectives": list(collectives),
        "skipped": list(skipped),
        "untimed": [],
    }


def read_trace(records, path):
    write_trace(records, path)
    trace = json.loads(path.read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    return trace["traceEvents"]


def test_every_event_of_a_record_stands_in_the_trace_in_its_phase(tmp_path):
    events = [
        make_event("forward", "Net", 1.0, 5.0, "wrapped"),
        make_event("bucket", "all_reduce", 6.0, 8.5, detail="12 bytes"),
    ]
    skipped = [{"kind": "pre_hook", "name": "forward_pre of Net", "owner": "wrapped", "detail": "1 registered"}]
    collectives = [make_event("collective", "broadcast", 0.5, 0.75)]
    trace = read_trace([make_record(events=events, skipped=skipped, collectives=collectives)], tmp_path / "t.json")
    place = {"pid": 0, "tid": 1}
    assert trace == [
        {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "rank 0"}},
        {"ph": "M", "name": "thread_name", **place, "args": {"name": "ddp × call (Net, step 2)"}},
        {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": 1}},
        {"ph": "X", "name": "Net", "cat": "forward", **place, "ts": 1.0, "dur": 4.0, "args": {"owner": "wrapped"}},
        {
            "ph": "b",
            "id": "0.1.0",
            "name": "all_reduce",
            "cat": "bucket",
            **place,
            "ts": 6.0,
            "args": {"detail": "12 bytes"},
        },
        {
            "ph": "e",
            "id": "0.1.0",
            "name": "all_reduce",
            "cat": "bucket",
            **place,
            "ts": 8.5,
            "args": {"detail": "12 bytes"},
        },
        {"ph": "b", "id": "0.1.1", "name": "broadcast", "cat": "collective", **place, "ts": 0.5, "args": {}},
        {"ph": "e", "id": "0.1.1", "name": "broadcast", "cat": "collective", **place, "ts": 0.75, "args": {}},
        {
            "ph": "i",
            "s": "t",
            "name": "skipped: forward_pre of Net",
            "cat": "pre_hook",
            **place,
            "ts": 8.5,
            "args": {"owner": "wrapped", "detail": "1 registered"},
        },
    ]


def test_a_rank_is_a_process_and_a_trial_the_same_thread_on_every_rank(tmp_path):
    records = [make_record(rank, path=path) for path in ("call", "inner_call") for rank in (0, 1)]
    trace = read_trace(records, tmp_path / "t.json")
    names = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in trace if event["name"] == "thread_name"
    }
    assert names == {
        (0, 1): "ddp × call (Net, step 2)",
        (1, 1): "ddp × call (Net, step 2)",
        (0, 2): "ddp × inner_call (Net, step 2)",
        (1, 2): "ddp × inner_call (Net, step 2)",
    }


def test_no_records_make_an_empty_trace(tmp_path):
    assert read_trace([], tmp_path / "t.json") == []
