"""Claims as Markdown: the table of docs/claims.md is written by this from a run.

python -m ddpcall.teach.claims.document docs/claims.md

A table stands between `<!-- claims all -->`, or `<!-- claims CF-1 CF-3 -->` for some, and `<!-- end claims -->`.
"""

from __future__ import annotations

import datetime
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpcall.teach.claims.catalogue import find_claims
from ddpcall.teach.claims.claim import Result
from ddpcall.teach.claims.command import run_all
from ddpcall.teach.claims.report import list_disagreements, list_warnings

_BLOCK = re.compile(r"<!-- claims (?P<ids>[^>]+?) -->\n.*?<!-- end claims -->", re.DOTALL)


def replace_blocks(text: str, results: Sequence[Result], measured: str) -> str:
    """Write every block of a Markdown text anew.

    Args:
        text: Markdown with at least one block.
        results: One for every claim.
        measured: Goes under each table: when and with what it was measured.

    Raises:
        ValueError: The text has no block.
        StopIteration: A block names a claim without a result.
    """
    if not _BLOCK.search(text):
        raise ValueError("no <!-- claims … --> … <!-- end claims --> in the text")

    def write(block: re.Match[str]) -> str:
        ids = block["ids"].split()
        everything = ids == ["all"]
        chosen = results if everything else [_find(results, one) for one in ids]
        lines = [*_table(chosen), "", measured]
        if everything:
            lines += ["", *(f"* {line}" for line in [*list_disagreements(results), *list_warnings(results)])]
        return "\n".join([f"<!-- claims {block['ids']} -->", *lines, "<!-- end claims -->"])

    return _BLOCK.sub(write, text)


def read_verdicts(text: str) -> dict[str, str]:
    """Return the verdict by claim that the tables of a text state."""
    return dict(re.findall(r"^\| (\w\w-\d+) \| .*? \| \**(\w+)\** \| ", text, re.MULTILINE))


def _find(results: Sequence[Result], one: str) -> Result:
    return next(result for result in results if result.claim.id == one)


def _table(results: Sequence[Result]) -> list[str]:
    rows = [["id", "claim", "verdict", "evidence"], ["---"] * 4]
    for result in results:
        verdict = f"**{result.ruling.verdict}**"
        rows.append([result.claim.id, result.claim.text, verdict, _escape(result.ruling.sentence)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _escape(text: str) -> str:
    """Keep Markdown from reading underscores, stars and bars of code as its own."""
    return re.sub(r"([_*|])", r"\\\1", text)


def describe_measurement(results: Sequence[Result]) -> str:
    """Say when, and with which versions."""
    today = datetime.date.today().isoformat()
    return f"Measured on {today} with torch {results[0].torch}, Python {platform.python_version()}, gloo on cpu."


def main() -> None:
    """Run all claims and rewrite the blocks of the files given."""
    results = run_all(find_claims([]))
    for path in map(Path, sys.argv[1:]):
        path.write_text(replace_blocks(path.read_text(), results, describe_measurement(results)))


if __name__ == "__main__":
    main()
