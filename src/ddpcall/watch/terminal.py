"""Findings in the terminal. Imported where they are printed: rich takes as much memory as all of the watch."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from ddpcall.findings import Finding
from ddpcall.watch.report import describe_parameters, describe_place

_COLORS = {"error": "red", "warning": "yellow", "note": "blue"}


def print_findings(findings: list[Finding], stream: TextIO) -> None:
    """Print all findings, or that there are none."""
    console = Console(file=stream, soft_wrap=False, highlight=False)
    if not findings:
        console.print("ddpcall watch: no findings")
        return
    for finding in findings:
        console.print(_render_panel(finding))
    counts = [(sum(f.severity == name for f in findings), name) for name in _COLORS]
    total = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts if count)
    console.print(f"ddpcall watch: {total}; `ddpcall explain {findings[0].code}` says more")


def _render_panel(finding: Finding) -> Panel:
    text = Text(finding.message + "\n")
    ranks = ", ".join(map(str, finding.ranks))
    text.append(f"\nranks {ranks} · first in step {finding.step} · seen {finding.count}×\n", style="dim")
    if finding.parameters:
        text.append(f"parameters: {describe_parameters(finding)}\n", style="dim")
    text.append("write instead: ", style="bold")
    text.append(finding.fix)
    title = Text(f"{finding.code} {finding.name} · {describe_place(finding)}")
    return Panel(text, title=title, title_align="left", border_style=_COLORS[finding.severity])
