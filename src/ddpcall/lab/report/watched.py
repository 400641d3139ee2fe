"""A watched run, as it is to be shown: the worst finding in one sentence, then all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpcall.findings import CATALOGUE, Finding, Rule, Severity
from ddpcall.lab.report.load_watch import Excerpt, WatchRecord
from ddpcall.lab.report.mixing import MixingPicture, picture_watched
from ddpcall.lab.report.words import code, plural
from ddpcall.watch.output.watched import Watched, weigh


@dataclass(frozen=True)
class FindingView:
    """One finding.

    Attributes:
        finding: As it was written.
        place: file:line in function.
        where: Ranks, step and count in words.
        excerpt: The source lines.
        rule: Its page; None for a code that this version does not know.
    """

    finding: Finding
    place: str
    where: str
    excerpt: Excerpt
    rule: Rule | None


@dataclass(frozen=True)
class Coverage:
    """What was watched, for the head of the page.

    Attributes:
        title: Whether that was enough.
        text: What it was, or why too little.
        tone: The name of its color.
    """

    title: str
    text: str
    tone: str


@dataclass(frozen=True)
class WatchView:
    """A watched run.

    Attributes:
        name: The file's name.
        coverage: What was watched.
        answer: One sentence.
        counts: Severity and number, worst first; those that occur.
        findings: Worst first.
        problems: What could not be read.
        mixing: Who learned from whom in the last measured step.
    """

    name: str
    coverage: Coverage
    answer: str
    counts: tuple[tuple[str, int], ...]
    findings: tuple[FindingView, ...]
    problems: tuple[str, ...]
    mixing: MixingPicture | None = None


def view_watch(record: WatchRecord) -> WatchView:
    """Return what is to be shown of a watched run."""
    ordered = sorted(record.findings, key=lambda pair: (-_rank(pair[0].severity), pair[0].step))
    findings = tuple(_view(finding, excerpt) for finding, excerpt in ordered)
    counts = [(str(s), sum(f.finding.severity == s for f in findings)) for s in reversed(list(Severity))]
    shown = tuple((severity, number) for severity, number in sorted(counts, key=lambda c: -_rank(c[0])) if number)
    coverage = _view_coverage(record.watched, bool(findings))
    answer = _answer(findings, shown, coverage)
    mixing = picture_watched(record.watched.mixing) if record.watched is not None else None
    return WatchView(str(record.path), coverage, answer, shown, findings, record.problems, mixing)


def _view_coverage(watched: Watched | None, has_findings: bool) -> Coverage:
    """Say what was watched, in the color of a warning where that was too little: no findings mean nothing then."""
    if watched is None:
        return Coverage("Too little is known", "The file does not say what was watched.", "part")
    answer = weigh(watched)
    text = f"{answer.text[:1].upper()}{answer.text[1:]}."
    if not answer.is_evidence:
        return Coverage("Too little was watched", text, "part")
    return Coverage("Watched", text, "other" if has_findings else "good")


def _rank(severity: str) -> int:
    try:
        return Severity(severity).rank
    except ValueError:
        return -1


def _view(finding: Finding, excerpt: Excerpt) -> FindingView:
    place = (
        f"{_shorten(finding.file)}:{finding.line} in {finding.function}" if finding.line else "no line can be told"
    )
    ranks = ", ".join(map(str, finding.ranks))
    where = (
        f"rank{'s' if len(finding.ranks) != 1 else ''} {ranks or 'unknown'}, from optimizer step {finding.step}"
    )
    where = f"{where}, seen {plural(finding.count, 'time')}"
    return FindingView(finding, place, where, excerpt, CATALOGUE.get(finding.code))


def _shorten(file: str) -> str:
    """Return a file's name relative to the working directory where it lies below it."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def _answer(findings: Sequence[FindingView], counts: Sequence[tuple[str, int]], coverage: Coverage) -> str:
    if not findings and coverage.tone == "part":
        return "No answer: nothing was found, but too little was watched to tell."
    if not findings:
        return "The watch found nothing."
    number = ", ".join(plural(count, severity) for severity, count in counts) or plural(len(findings), "finding")
    worst = findings[0]
    title = worst.rule.title if worst.rule else worst.finding.name
    link = ": " if len(findings) == 1 else "; the worst: "
    return f"{number}{link}{title[:1].lower()}{title[1:]}, at {code(worst.place)}."
