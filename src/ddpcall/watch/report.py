"""Findings for people and tools: terminal, and SARIF 2.1.0 for code-scanning upload."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ddpcall.findings import CATALOGUE, Finding

if TYPE_CHECKING:
    from rich.panel import Panel

_COLORS = {"error": "red", "warning": "yellow", "note": "blue"}
_MOST_PARAMETERS = 6


class WatchError(RuntimeError):
    """A finding, raised where the harm is done (`on_finding="raise"`).

    Attributes:
        finding: The finding.
    """

    def __init__(self, finding: Finding) -> None:
        """Take the finding; the message is its text."""
        super().__init__(render_text(finding))
        self.finding = finding


def describe_place(finding: Finding) -> str:
    """Return `file:line in function`, the file relative to the working directory where it lies below it."""
    if not finding.line:
        return "(no line can be told)"
    path = os.path.relpath(finding.file) if finding.file.startswith(os.getcwd() + os.sep) else finding.file
    return f"{path}:{finding.line} in {finding.function}"


def describe_parameters(finding: Finding) -> str:
    """Return the first few names and the number of the others."""
    shown = ", ".join(finding.parameters[:_MOST_PARAMETERS])
    more = len(finding.parameters) - _MOST_PARAMETERS
    return f"{shown} and {more} more" if more > 0 else shown


def render_text(finding: Finding) -> str:
    """Return a finding as a few lines of plain text."""
    lines = [
        f"ddpcall: {finding.code} {finding.name} ({finding.severity}) at {describe_place(finding)}",
        f"  {finding.message}",
    ]
    if finding.parameters:
        lines.append(f"  parameters: {describe_parameters(finding)}")
    lines.append(f"  write instead: {finding.fix}")
    return "\n".join(lines)


def print_findings(findings: list[Finding], stream: TextIO) -> None:
    """Print all findings, or that there are none."""
    from rich.console import Console  # at the end of the script, which may do without it

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
    from rich.panel import Panel
    from rich.text import Text

    text = Text(finding.message + "\n")
    ranks = ", ".join(map(str, finding.ranks))
    text.append(f"\nranks {ranks} · first in step {finding.step} · seen {finding.count}×\n", style="dim")
    if finding.parameters:
        text.append(f"parameters: {describe_parameters(finding)}\n", style="dim")
    text.append("write instead: ", style="bold")
    text.append(finding.fix)
    title = Text(f"{finding.code} {finding.name} · {describe_place(finding)}")
    return Panel(text, title=title, title_align="left", border_style=_COLORS[finding.severity])


def to_sarif(findings: Iterable[Finding]) -> dict[str, Any]:
    """Return the findings as a SARIF 2.1.0 log, every rule of the catalogue included."""
    codes = list(CATALOGUE)
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "ddpcall", "rules": [_sarif_rule(code) for code in codes]}},
                "results": [_sarif_result(finding, codes.index(finding.code)) for finding in findings],
            }
        ],
    }


def _sarif_rule(code: str) -> dict[str, Any]:
    rule = CATALOGUE[code]
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.fix},
        "defaultConfiguration": {"level": rule.severity.value},
    }


def _sarif_result(finding: Finding, rule_index: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": rule_index,
        "level": finding.severity,
        "message": {"text": f"{finding.message} Write instead: {finding.fix}"},
        "properties": {"ranks": list(finding.ranks), "step": finding.step, "parameters": list(finding.parameters)},
    }
    if finding.line:
        path = Path(finding.file)
        inside = path.is_relative_to(Path.cwd())
        uri = path.relative_to(Path.cwd()).as_posix() if inside else path.absolute().as_uri()
        result["locations"] = [
            {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": finding.line}}}
        ]
    return result


def write_sarif(findings: Iterable[Finding], path: Path) -> None:
    """Write the SARIF log."""
    path.write_text(json.dumps(to_sarif(findings), indent=2) + "\n")
