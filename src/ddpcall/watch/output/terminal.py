"""Findings in the terminal. Imported where they are printed: rich takes as much memory as all of the watch."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ddpcall.findings import Finding
from ddpcall.watch.output.source_line import read_source_line
from ddpcall.watch.output.streams import write_text
from ddpcall.watch.output.text import describe_parameters, describe_place

_COLORS = {"error": "red", "warning": "yellow", "note": "blue"}


def print_findings(findings: list[Finding], conclusion: str, stream: TextIO) -> None:
    """Print all findings, and the conclusion."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:  # rich ends the process where it writes to a pipe that nobody reads
        for finding in findings:
            _print_finding(console, finding)
        _print_lines(console, Text(conclusion))
    write_text(stream, capture.get())


def _print_finding(console: Console, finding: Finding) -> None:
    """Print a finding as compilers do: what it is, where, the line with a mark under it, and what to write."""
    color = _COLORS[finding.severity]
    source = read_source_line(finding.file, finding.line) if finding.line else None
    gutter = " " * (3 if source is None else len(str(finding.line)) + 1)
    heading = (f"{finding.severity}[{finding.code}]", f"bold {color}")
    _print_lines(console, Text.assemble(heading, (f" {finding.name}", "bold")))
    _print_lines(console, Text(f"{gutter[1:]}--> {describe_place(finding)}"))
    if source is not None:
        mark = " " * source.start + "^" * max(1, source.end - source.start)
        _print_lines(console, Text(f"{gutter}|", style="dim"))
        _print_lines(console, Text.assemble((f"{finding.line} | ", "dim"), source.text), crop=True)
        _print_lines(console, Text.assemble((f"{gutter}| ", "dim"), (mark, color)), crop=True)
        _print_lines(console, Text(f"{gutter}|", style="dim"))
    ranks = ", ".join(map(str, finding.ranks))
    _print_lines(console, Text(finding.message), indent=3)
    facts = f"ranks {ranks} · first in step {finding.step} · seen {finding.count}×"
    _print_lines(console, Text(facts, style="dim"), indent=3)
    if finding.parameters:
        _print_lines(console, Text(f"parameters: {describe_parameters(finding)}", style="dim"), indent=3)
    _print_lines(console, Text.assemble(("write instead: ", "bold"), finding.fix), indent=3)
    console.print()


def _print_lines(console: Console, text: Text, indent: int = 0, crop: bool = False) -> None:
    """Print a paragraph: wrapped between words in a terminal, one long line in a file or pipe."""
    if not console.is_terminal:
        console.print(Text(" " * indent).append_text(text), soft_wrap=True)
    elif crop:  # a source line and its mark must not be wrapped apart
        console.print(text, no_wrap=True, overflow="ellipsis", crop=True)
    else:
        console.print(Padding(text, (0, 0, 0, indent), expand=False))
