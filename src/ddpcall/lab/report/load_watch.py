"""The findings of a watched run, and the source lines they name, into a record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ddpcall.files import is_below, parse_json, read_text
from ddpcall.findings import Finding
from ddpcall.lab.typed import Misfit, NothingToShow, describe_error, read_record
from ddpcall.watch.output.watched import Watched, read_watched

FINDINGS_SCHEMA = 1
CONTEXT_LINES = 3
MAX_BYTES = 64 * 2**20
MAX_SOURCE_BYTES = 2 * 2**20
MAX_FINDINGS = 1_000


@dataclass(frozen=True)
class SourceLine:
    """One line of a source file.

    Attributes:
        number: From 1.
        text: Without its line break.
        marked: Whether the finding is about it.
    """

    number: int
    text: str
    marked: bool


@dataclass(frozen=True)
class Excerpt:
    """The lines around a finding.

    Attributes:
        lines: The lines; empty where the file cannot be read.
        note: What to know about them: the file is missing, or younger than the findings.
    """

    lines: tuple[SourceLine, ...] = ()
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class WatchRecord:
    """A watched run: the findings that `ddpcall watch --json` wrote, with the source lines as they are now.

    Attributes:
        path: The JSON file.
        findings: Each with its excerpt.
        problems: What could not be read, a sentence each.
        watched: What the watch saw; None in a file of an earlier version.
    """

    path: Path
    findings: tuple[tuple[Finding, Excerpt], ...] = ()
    problems: tuple[str, ...] = ()
    watched: Watched | None = None


def load_watch(path: Path) -> WatchRecord:
    """Read the findings of a watched run, and the source lines they name as they stand now.

    Raises:
        NothingToShow: The file is not one that `ddpcall watch --json` writes.
    """
    try:
        content = parse_json(read_text(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise NothingToShow(f"{path} cannot be read: {describe_error(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("findings"), list):
        raise NothingToShow(
            f"{path} holds no findings. Write a run directory, or a file that `ddpcall watch --json FILE` wrote"
        )
    problems = []
    if content.get("schema") != FINDINGS_SCHEMA:
        problems.append(
            f"{path.name} has schema {content.get('schema')!r}, and this version of ddpcall knows "
            f"{FINDINGS_SCHEMA}: what it does not know is left out"
        )
    findings = []
    if len(content["findings"]) > MAX_FINDINGS:
        problems.append(f"{path.name}: the first {MAX_FINDINGS} of {len(content['findings'])} findings are shown")
    for number, item in enumerate(content["findings"][:MAX_FINDINGS]):
        try:
            findings.append(read_record(Finding, item, f"finding {number}"))
        except Misfit as error:
            problems.append(f"{path.name}: {error}")
    written = path.stat().st_mtime
    return WatchRecord(
        path=path,
        findings=tuple((finding, read_excerpt(finding, written, path.parent)) for finding in findings),
        problems=tuple(problems),
        watched=_read_watched(content.get("watched")),
    )


def _read_watched(record: object) -> Watched | None:
    if not isinstance(record, dict):
        return None
    try:
        return read_watched(record)
    except (TypeError, ValueError, AttributeError):  # not as the watch writes it
        return None


def read_excerpt(finding: Finding, written: float, beside: Path) -> Excerpt:
    """Return the lines around a finding, if they are Python below the working directory or beside the findings.

    The file may be somebody else's, and name whatever it likes: what it names must not get into a page by that.

    Args:
        finding: Names file and line.
        written: When the findings were written, in seconds since the epoch.
        beside: Where relative names are looked up too, besides the working directory.
    """
    if not finding.file or finding.line < 1:
        return Excerpt(note="No line can be told.")
    roots = (Path.cwd(), beside)
    try:
        file = next((p for p in (Path(finding.file), beside / finding.file) if p.is_file()), None)
        if file is None:
            return Excerpt(note=f"{finding.file} is not on this machine, so its lines cannot be shown.")
        file = file.resolve()
        if file.suffix != ".py" or not is_below(file, roots):
            return Excerpt(
                note=f"{finding.file} is no Python file below the working directory or beside the findings: "
                "its lines are not shown."
            )
        lines = read_text(file, MAX_SOURCE_BYTES).splitlines()
        younger = file.stat().st_mtime > written
    except (OSError, ValueError, RuntimeError) as error:
        return Excerpt(note=f"{finding.file} cannot be read: {describe_error(error)}.")
    if finding.line > len(lines):
        return Excerpt(note=f"{finding.file} has only {len(lines)} lines now: it has changed since the run.")
    first = max(1, finding.line - CONTEXT_LINES)
    shown = lines[first - 1 : finding.line + CONTEXT_LINES]
    return Excerpt(
        tuple(SourceLine(first + i, text, first + i == finding.line) for i, text in enumerate(shown)),
        "The file has changed since the run: these are its lines now." if younger else None,
    )
