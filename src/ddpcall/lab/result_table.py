"""The results of an experiment as the terminal shows them: a table of cells, or a matrix of wrapper × path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ddpcall.evidence import AXES, Consequence, Evidence
from ddpcall.lab.columns import is_interesting
from ddpcall.lab.report.words import find_tone
from ddpcall.paths import CallPath
from ddpcall.verdicts import NO_DATA_PARALLELISM, Verdicts

if TYPE_CHECKING:
    from ddpcall.lab.experiment import TrialResult

MOST_ROWS = 40  # what one can look over; more cells of wrapper × path are shown as a matrix
COLORS = {"good": "green", "lost": "bold red", "crash": "bold magenta", "part": "yellow", "other": "cyan"}
MATRIX_LEGEND = (
    f"the verdict on gradients; -: {NO_DATA_PARALLELISM}; *: not all hooks of wrapped or inner fired; "
    "!: not as expected; blank: not run"
)
_SPACING = 3  # a border, and a blank on either side of the text
_MATRIX_COLUMN = 8  # `sharded*`
# Shown where any cell has something to say: verdict to column title.
_OPTIONAL = {
    "mixing": "mixing",
    "compiled": "compiled",
    "modes": "mode",
    "dropout": "dropout\nmasks",
    "statistics": "running\nstats",
    "evaluation_inner": "eval of\ninner",
    "evaluation_wrapped": "eval of\nwrapped",
    "precision": "precision",
}


def split_columns(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str | Text]], num_labels: int
) -> Iterator[list[int]]:
    """Deal a table's columns out to as many tables as the console's width asks for.

    A table that is too wide breaks words and drops columns. Each part repeats the columns that name the row.

    Args:
        console: Where the table is to be shown.
        header: The columns' titles.
        rows: The cells; strings with markup, or styled text.
        num_labels: How many of the first columns name the row.

    Yields:
        The columns of each part, by position.
    """
    columns = [[title, *(row[index] for row in rows)] for index, title in enumerate(header)]
    widths = [max(_width(console, cell) for cell in column) + _SPACING for column in columns]
    labels = list(range(num_labels))
    part, room = [], console.width - 1 - sum(widths[:num_labels])
    for index in range(num_labels, len(header)):
        if part and sum(widths[one] for one in part) + widths[index] > room:
            yield labels + part
            part = []
        part.append(index)
    yield labels + part


def fit_tables(
    console: Console, header: Sequence[str], rows: Sequence[Sequence[str | Text]], num_labels: int, **style: Any
) -> Iterator[Table]:
    """Yield a table in as many parts as `split_columns` asks for; the first has the title."""
    for part in split_columns(console, header, rows, num_labels):
        table = Table(title_justify="left", **style)
        style.pop("title", None)
        for index in part:
            table.add_column(header[index], overflow="fold")
        for row in rows:
            table.add_row(*(row[index] for index in part))
        yield table


def _width(console: Console, cell: str | Text) -> int:
    return Measurement.get(console, console.options.update(width=10_000), cell).maximum


def build_tables(console: Console, title: str, results: Sequence[TrialResult]) -> Iterator[Table]:
    """Return one table of all cells, or where the console is narrow several, with some of the columns each."""
    several_models = len({result.evidence.cell.model for result in results}) > 1
    shown = [
        name for name in _OPTIONAL if is_interesting(name, [getattr(result.verdicts, name) for result in results])
    ]
    header = ["model"] if several_models else []
    header += ["wrapper × path", "gradients", "gradients\ndiffer by", "hooks\nwrapped", "inner", "below"]
    header += [_OPTIONAL[name] for name in shown]
    header += ["test accuracy\nby rank", "distance from\nsynced run", "as\nexpected"]
    rows = [_row(result, several_models, shown) for result in results]
    return fit_tables(console, header, rows, 1 + several_models, title=title)


def _row(result: TrialResult, several_models: bool, shown: Sequence[str]) -> list[str]:
    evidence, verdicts = result.evidence, result.verdicts
    row = [evidence.cell.model.rsplit(".", 1)[-1]] if several_models else []
    row += [evidence.cell.label(), _colored(verdicts, "gradients"), _gradient_difference(evidence)]
    row += [_colored(verdicts, name) for name in ("hooks_wrapped", "hooks_inner", "hooks_submodules", *shown)]
    row += [_quality(evidence.consequence), _distance(evidence.consequence)]
    met = "[bold red]NO[/]" if result.unmet else ("yes" if result.expected else "[dim]-[/]")
    return [*row, met]


def _colored(verdicts: Verdicts, name: str) -> str:
    word = getattr(verdicts, name)
    return color_word(name, word)


def color_word(name: str, word: str) -> str:
    """Return a verdict's word with markup for its tone."""
    return f"[{COLORS.get(find_tone(name, word), 'dim')}]{word}[/]"


def _gradient_difference(evidence: Evidence) -> str:
    gradients = evidence.gradients
    if gradients is None or not gradients.max_difference:
        return "-"
    return f"{max(gradients.max_difference):.3g}"


def _quality(consequence: Consequence | None) -> str:
    if consequence is None:
        return "-"
    if consequence.test_accuracy is None:
        return " ".join(f"loss {loss:.4f}" for loss in consequence.test_loss[:4])
    return " ".join(f"{accuracy:.1%}" for accuracy in consequence.test_accuracy[:4])


def _distance(consequence: Consequence | None) -> str:
    if consequence is None or consequence.distance is None:
        return "-"
    return f"{max(consequence.distance):.2g}"


def is_matrix(results: Sequence[TrialResult]) -> bool:
    """Say whether the cells are too many for a table, and wrapper and path tell them all apart."""
    cells = [result.evidence.cell for result in results]
    varying = {axis for axis in AXES if len({getattr(cell, axis) for cell in cells}) > 1}
    return len(cells) > MOST_ROWS and varying == {"wrapper", "path"}


def build_matrix(title: str, results: Sequence[TrialResult], width: int) -> Text:
    """Return one line a wrapper and one column a path; 80 columns hold seven paths, and more give them room.

    Every second path's name stands a line lower, so that names are longer than their columns are wide.
    """
    words = {(result.evidence.cell.wrapper, result.evidence.cell.path): _word(result) for result in results}
    wrappers = list(dict.fromkeys(wrapper for wrapper, _ in words))
    paths = [path.value for path in CallPath if any(path == known for _, known in words)]
    margin = max(map(len, wrappers)) + 1
    column = min(max((width - margin) // len(paths), _MATRIX_COLUMN), _MATRIX_COLUMN + 2)
    lines = [Text(title, style="italic")]
    for names, indent in ((paths[::2], 0), (paths[1::2], column)):
        heading = "".join(name.ljust(2 * column) for name in names)
        lines.append(Text(" " * (margin + indent) + heading.rstrip(), style="bold"))
    for wrapper in wrappers:
        line = Text(wrapper.ljust(margin))
        for path in paths:
            word = words.get((wrapper, path), Text())
            line.append_text(word).append(" " * (column - len(word)))
        line.rstrip()
        lines.append(line)
    return Text("\n").join(lines)


def _word(result: TrialResult) -> Text:
    verdicts = result.verdicts
    word = "-" if verdicts.gradients == NO_DATA_PARALLELISM else verdicts.gradients
    style = COLORS.get(find_tone("gradients", word), "dim")
    skipped = "*" * ("skipped" in (verdicts.hooks_wrapped, verdicts.hooks_inner) and word != "crashed")
    cell = (
        Text(word, style=style).append(skipped, style="yellow").append("!" * bool(result.unmet), style="bold red")
    )
    cell.pad_right(_MATRIX_COLUMN - len(cell))
    return cell
