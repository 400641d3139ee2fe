"""What the runs of claims look like: a table for people, JSON for programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddpcall.teach.claims.claim import Claim, Result, Verdict

SCHEMA = 1
_COLOURS = {
    Verdict.TRUE: "green",
    Verdict.FALSE: "bold red",
    Verdict.DEPENDS: "yellow",
    Verdict.SKIPPED: "dim",
}


def to_json(results: Iterable[Result]) -> dict[str, Any]:
    """Return the results in the form that `--json` writes."""
    claims = [
        {
            "id": result.claim.id,
            "verdict": str(result.ruling.verdict),
            "evidence": result.ruling.sentence,
            "torch": result.torch,
        }
        for result in results
    ]
    return {"schema": SCHEMA, "claims": claims}


def write_json(path: Path, results: Iterable[Result]) -> None:
    """Write the results to a file."""
    path.write_text(json.dumps(to_json(results), indent=1, ensure_ascii=False) + "\n")


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Print the table, what torch warned of, and which verdicts contradict the first look."""
    caption = f"torch {results[0].torch}, Python {platform.python_version()}, gloo on cpu where ranks are needed"
    table = Table(title="The folklore on trial", title_justify="left", caption=caption)
    for column, width, ratio in (("id", 4, None), ("claim", 20, 2), ("verdict", 7, None), ("evidence", 20, 3)):
        table.add_column(column, min_width=width, ratio=ratio, overflow="fold")
    for result in results:
        verdict = result.ruling.verdict
        cells = [result.claim.id, escape(result.claim.text), f"[{_COLOURS[verdict]}]{verdict}[/]"]
        table.add_row(*cells, escape(result.ruling.sentence))
    console.print(table)
    for line in [*list_disagreements(results), *list_warnings(results), count_verdicts(results)]:
        console.print(escape(line), highlight=False)


def list_disagreements(results: Iterable[Result]) -> list[str]:
    """Name the claims whose experiment contradicts what a first look suggested."""
    return [
        f"{result.claim.id} is {result.ruling.verdict}, where a first look said {result.claim.first_look}"
        for result in results
        if result.disagrees
    ]


def list_warnings(results: Iterable[Result]) -> list[str]:
    """Name what torch warned of while experiments ran, with the claims that met it."""
    met_by: dict[str, list[str]] = {}
    for result in results:
        for warning in result.warnings:
            met_by.setdefault(warning, []).append(result.claim.id)
    return [f"torch warns: {warning} ({', '.join(ids)})" for warning, ids in met_by.items()]


def count_verdicts(results: Sequence[Result]) -> str:
    """Count the verdicts by kind."""
    counts = {verdict: sum(result.ruling.verdict is verdict for result in results) for verdict in Verdict}
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)


def print_list(console: Console, claims: Iterable[Claim]) -> None:
    """Print the claims without running any."""
    table = Table(title="Claims people make about forward", title_justify="left")
    for column in ("id", "claim", "source"):
        table.add_column(column, overflow="fold")
    for claim in claims:
        table.add_row(claim.id, escape(claim.text), claim.source)
    console.print(table)
