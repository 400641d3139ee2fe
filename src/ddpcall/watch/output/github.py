"""Findings for GitHub Actions: annotations on the lines, and a table in the job's summary.

Source: the toolkit's `packages/core/src/command.ts`, for what is escaped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from ddpcall.findings import Finding, Place
from ddpcall.watch.output.streams import write_text
from ddpcall.watch.output.text import describe_place

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def annotate(findings: list[Finding], stream: TextIO) -> None:
    """Print one workflow command a finding; the runner reads both streams."""
    write_text(stream, "".join(render_annotation(finding) + "\n" for finding in findings))


def render_annotation(finding: Finding) -> str:
    """Return the workflow command that puts a finding on its line."""
    properties = {"title": f"{finding.code} {finding.name}"}
    place: Finding | Place = finding
    root = Path(os.environ.get("GITHUB_WORKSPACE", "") or os.getcwd())
    if finding.called_from is not None and not Path(finding.file).is_relative_to(root):
        place = finding.called_from  # no annotation is shown on a file that is not in the checkout
    if place.line:
        path = Path(place.file)  # the runner compares it with paths from the checkout's root
        file = path.relative_to(root) if path.is_relative_to(root) else path
        properties = {"file": file.as_posix(), "line": str(place.line), **properties}
    escaped = {name: _escape(value).replace(":", "%3A").replace(",", "%2C") for name, value in properties.items()}
    written = ",".join(f"{name}={value}" for name, value in escaped.items())
    message = f"{finding.message}\nWrite instead: {finding.fix}"
    if finding.called_from is not None:
        message += f"\nAt {describe_place(finding)}"
    return f"::{_COMMANDS[finding.severity]} {written}::{_escape(message)}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def append_summary(findings: list[Finding], conclusion: str) -> None:
    """Append a table of the findings to the job's summary, where the runner has one.

    Args:
        findings: What was found.
        conclusion: The last line of the terminal's answer.

    Raises:
        OSError: The runner's file cannot be written.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(render_summary(findings, conclusion))


def render_summary(findings: list[Finding], conclusion: str) -> str:
    """Return the findings as a Markdown table under a heading."""
    lines = ["### ddpcall watch", "", _cell(conclusion), ""]
    if findings:
        lines += ["| finding | where | ranks | first step | what happened |", "| --- | --- | --- | --- | --- |"]
    for finding in findings:
        cells = [
            f"{finding.code} {finding.name} ({finding.severity})",
            describe_place(finding),
            ", ".join(map(str, finding.ranks)),
            str(finding.step),
            f"{finding.message} **Write instead:** {finding.fix}",
        ]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n\n"


def _cell(text: str) -> str:
    """Return text that stays in its cell and is no HTML."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())
