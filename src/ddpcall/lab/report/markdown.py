"""The view as Markdown, for a pull request or a log: sentences and tables, nothing to open."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from ddpcall.lab.report.compare import Comparison
from ddpcall.lab.report.final_models import FinalModels
from ddpcall.lab.report.mixing import MixingPicture
from ddpcall.lab.report.truth import TruthTable, VerdictCell
from ddpcall.lab.report.view import ComparisonRow, ReportView, RunView
from ddpcall.lab.report.watched import FindingView, WatchView
from ddpcall.lab.report.words import format_number, format_share, plural

_ALARMING = {"lost", "crash", "part"}


def render_markdown(view: ReportView) -> str:
    """Return the view as Markdown."""
    parts = [_problems("What could not be shown", view.problems)]
    parts += [_comparison(view.comparison)] if view.comparison else []
    parts += [_run(run) for run in view.runs]
    parts += [_watch(watch) for watch in view.watches]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(text: str) -> str:
    """Return a text that Markdown and the HTML in it leave alone; what is marked as code stays so."""
    one_line = html.escape(re.sub(r"\s+", " ", text), quote=False)
    # An underscore inside a word marks nothing.
    return re.sub(r"[\\`*\[\]|]|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", one_line)


def _prose(text: str) -> str:
    parts = text.split("`")
    return "".join(_code(part) if number % 2 else _text(part) for number, part in enumerate(parts))


def _code(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _problems(title: str, problems: Sequence[str]) -> str:
    return "\n".join([f"**{title}.**", "", *(f"* {_text(problem)}" for problem in problems)]) if problems else ""


def write_word(cell: VerdictCell) -> str:
    """Return a verdict, bold where something is lost."""
    word = f"**{_text(cell.word)}**" if cell.tone in _ALARMING else _text(cell.word)
    return f"{word} (expected {_text(cell.expected)})" if cell.expected else word


def _comparison(comparison: Comparison) -> str:
    rows = [
        [_text(d.label), d.title, *(write_word(cell) if cell else "–" for cell in d.cells)]
        for d in comparison.differences
    ]
    parts = [f"# {_text(' and '.join(comparison.runs))}", comparison.sentence]
    parts += [write_table(["cell", "verdict", *map(_text, comparison.runs)], rows)] if rows else []
    parts += [
        f"Not in every run, but in {_text(name)}: {_text(', '.join(cells))}."
        for name, cells in zip(comparison.runs, comparison.alone, strict=True)
        if cells
    ]
    return "\n\n".join(parts)


def _run(run: RunView) -> str:
    parts = [f"## {_text(run.name)}: {_text(run.question)}", _prose(run.answer), _text(run.status[1])]
    parts += [_text(run.reason)] if run.reason else []
    parts.append(_problems("What could not be read", run.problems))
    parts += ["\n".join(_failures(run))] if run.failures else []
    parts += [_comparisons(run.comparisons)] if run.comparisons else []
    parts += [write_truth(run.table)] if run.table else []
    parts += ["\n\n".join(_mixing(picture) for picture in run.mixing.pictures)] if run.mixing else []
    parts += [_final_models(run.final_models)] if run.final_models else []
    facts = dict(run.environment)
    if facts:
        parts.append(
            f"Measured with torch {_text(facts['torch'])}, Python {_text(facts['Python'])}, "
            f"{_text(facts['backend'])} on {_text(facts['device'])}, world size {facts['world size']}."
        )
    parts += [f"```console\n$ {run.command}\n```"] if run.command else []
    return "\n\n".join(part for part in parts if part)


def _failures(run: RunView) -> Iterator[str]:
    yield "**Not as expected:**"
    yield ""
    for failure in run.failures:
        words = "; ".join(f"{title} is {_text(is_)}, expected {_text(want)}" for title, want, is_ in failure.unmet)
        error = f" (raised on {_text(failure.error)})" if failure.error else ""
        yield f"* {_text(failure.label)}, {_code(failure.spelling)}: {words}{error}"


def _comparisons(rows: Sequence[ComparisonRow]) -> str:
    cells = [
        [f"{_code(row.label)} {_text(row.about)}", _text(row.expected), write_word(row.found), _text(row.message)]
        for row in rows
    ]
    return write_table(["training step", "expected", "found", "what the comparison says"], cells)


def write_truth(table: TruthTable, *, spell: bool = True) -> str:
    """Return the truth table.

    Args:
        table: The table.
        spell: Whether to say how a script writes each call path.
    """
    rows = []
    for row in table.rows:
        coordinates = [
            f"{_text(value)}: {_code(row.spelling)}" if axis == "path" and spell else _text(value)
            for axis, value in zip(table.axes, row.coordinates, strict=True)
        ]
        rows.append([*coordinates, *map(write_word, row.cells)])
    return write_table([*table.axes, *(title for _, title in table.columns)], rows)


def _mixing(picture: MixingPicture) -> str:
    """Return a matrix as a table, a row a rank; backwards that are mixed differently stand side by side."""
    rows = [
        [f"rank {name}", *(entry.text for entry in entries)]
        for name, entries in zip(picture.rows, picture.entries, strict=True)
    ]
    title = f"**{_text(picture.word)}** ({_text(picture.name)}): {_text(picture.explanation)}"
    return f"{title}\n\n{write_table(['uses of', *(f'rank {name}' for name in picture.columns)], rows)}"


def _final_models(all_models: Sequence[FinalModels]) -> str:
    rows = []
    for models in all_models:
        values = [format_share(a) for a in models.accuracy] if models.accuracy else map(format_number, models.loss)
        distance = " ".join(map(format_number, models.distance)) if models.distance else "–"
        rows.append(
            [_text(models.name), _text(models.gradients), " ".join(values), distance, format_number(models.spread)]
        )
    quality = "test accuracy by rank" if all_models[0].accuracy else "test loss by rank"
    return write_table(
        ["trials that ended alike", "gradients", quality, "from the synchronized run", "apart"], rows
    )


def _watch(watch: WatchView) -> str:
    coverage = f"**{_text(watch.coverage.title)}.** {_prose(watch.coverage.text)}"
    parts = [f"## Watch: {_text(watch.name)}", coverage, _prose(watch.answer)]
    parts.append(_problems("What could not be read", watch.problems))
    if watch.findings:
        rows = [
            [
                *map(_text, (f.finding.severity, f"{f.finding.code} {f.finding.name}")),
                _code(f.place),
                _text(f.where),
            ]
            for f in watch.findings
        ]
        parts.append(write_table(["severity", "finding", "where", "when"], rows))
    parts += ["\n\n".join(_finding(found)) for found in watch.findings]
    return "\n\n".join(part for part in parts if part)


def _finding(found: FindingView) -> Iterator[str]:
    finding = found.finding
    yield f"### {_text(finding.code)} at {_code(found.place)}"
    yield _prose(finding.message)
    if found.excerpt.lines:
        lines = [f"{'>' if line.marked else ' '} {line.number:4} {line.text}" for line in found.excerpt.lines]
        yield "\n".join(["````text", *(line.replace("````", "```` ") for line in lines), "````"])
    if found.excerpt.note:
        yield _text(found.excerpt.note)
    yield f"**Write instead.** {_prose(finding.fix)}"
    if finding.parameters:
        yield f"{plural(len(finding.parameters), 'parameter')}: {_code(', '.join(finding.parameters))}"
