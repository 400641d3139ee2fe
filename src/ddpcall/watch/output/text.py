"""Findings as text."""

from __future__ import annotations

import os

from ddpcall.findings import Finding, Place
from ddpcall.watch.output.watched import Answer

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
    """Return `file:line in function`, and from where that was called if it is not the user's line itself.

    A file is shown relative to the working directory, an installed library's relative to where it is installed.
    """
    if not finding.line:
        return "(no line can be told)"
    place = _describe(Place(finding.file, finding.line, finding.function))
    return place if finding.called_from is None else f"{place}, called from {_describe(finding.called_from)}"


def _describe(place: Place) -> str:
    path = place.file
    for directory in (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", os.getcwd() + os.sep):
        path = path.rpartition(directory)[2]
    return f"{path}:{place.line} in {place.function}"


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


def render_line(finding: Finding) -> str:
    """Return a finding as one line, for the moment it happens; the list at the end says the rest."""
    ranks = ", ".join(map(str, finding.ranks))
    where = f"at {describe_place(finding)}, rank{'s' * (len(finding.ranks) != 1)} {ranks}, step {finding.step}"
    return f"ddpcall: {finding.code} {finding.name} ({finding.severity}) {where}"


def conclude(findings: list[Finding], answer: Answer) -> str:
    """Return the answer's last line: what was found, and what was watched or why too little was."""
    if not findings:
        return f"ddpcall watch: {answer.start}{answer.text}"
    counts = [(sum(f.severity == name for f in findings), name) for name in ("error", "warning", "note")]
    total = ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts if count)
    return f"ddpcall watch: {total}; `ddpcall explain {findings[0].code}` says more; {answer.text}"
