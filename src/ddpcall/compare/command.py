"""`ddpcall compare A B`: the ladder in the terminal, and the exit code."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ddpcall.compare.files import NotARecord, Run, open_run
from ddpcall.compare.two_runs import Rung, TwoRuns, compare_runs

SAME, DIFFERS, NOT_COMPARABLE = 0, 1, 2
_STATUS = {"same": "same", "differs": "DIFFERS", "unknown": "?"}


def main(
    a: Path, b: Path, noise: Path | None, json_path: Path | None, page: tuple[Path, Callable[..., str]] | None
) -> int:
    """Compare two records and print what differs first.

    Args:
        a: The record that is taken for right.
        b: The record that is asked about.
        noise: A second record of A.
        json_path: Where to write everything that was compared.
        page: Where to write a page, and what makes it of the result and of what A and B are.

    Returns:
        0: the same; 1: something differs; 2: they cannot be compared.
    """
    try:
        runs = open_run(a), open_run(b)
        result = compare_runs(*runs, open_run(noise) if noise else None)
    except NotARecord as error:
        print(f"ddpcall compare: not comparable: {error}", file=sys.stderr)
        if json_path:
            json_path.write_text(json.dumps({"schema": 1, "same": None, "message": str(error)}, indent=1))
        return NOT_COMPARABLE
    names = [_describe_run(run) for run in runs]
    print("\n".join([f"A: {names[0]}", f"B: {names[1]}", "", *_describe(result)]))
    if json_path:
        json_path.write_text(json.dumps(result.to_json(), indent=1))
    if page:
        page[0].write_text(page[1](result, *names))
    return SAME if result.same else DIFFERS


def _describe_run(run: Run) -> str:
    first, ranks = run.meta[0], len(run.meta)
    model = f"{first.get('model', '?')} in {first.get('wrapper', '?')}"
    return f"{ranks} rank{'s' * (ranks > 1)}, {model}, torch {first['torch']}: {run.directory}"


def _describe(result: TwoRuns) -> Iterator[str]:
    step = None
    for rung in result.rungs:
        yield f"{f'step {rung.step}' if rung.step != step else '':10}{rung.what:12}{_describe_rung(rung)}"
        step = rung.step
    yield from ("", result.message, *[f"Note: {note}" for note in result.notes])


def _describe_rung(rung: Rung) -> str:
    size = "" if math.isnan(rung.difference) else f"{rung.difference:.1e}"
    floor = "" if math.isnan(rung.floor) else f"(floor {rung.floor:.1e})"
    note = "" if rung.what == "modules" else rung.note
    return f"{_STATUS[rung.status]:9}{size:9}{floor:17}{note}".rstrip()
