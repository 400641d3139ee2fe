"""A run as the terminal shows it: a table of cells, or a matrix of wrapper × path, and what needs words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ddpcall.evidence import Environment, Evidence
from ddpcall.lab.console import UNLIMITED, open_console, say, shorten_path
from ddpcall.lab.records import ComparisonRecord, TrialRecord
from ddpcall.lab.report.truth import Overview, VerdictCell, build_table, judge_comparison
from ddpcall.lab.report.words import plural
from ddpcall.lab.run_directory import writing
from ddpcall.verdicts import NO_DATA_PARALLELISM, VERDICTS, skipped_kinds

if TYPE_CHECKING:
    from ddpcall.lab.schema import TrainConfig

TABLE = "table.txt"
MOST_ROWS = 40  # what one can look over; more cells of wrapper × path are shown as a matrix
STYLES = {"good": "green", "lost": "bold red", "crash": "bold magenta", "part": "yellow", "other": "cyan"}
MATRIX_LEGEND = (
    f"the verdict on gradients; -: {NO_DATA_PARALLELISM}; *: not all hooks of wrapped or inner fired; "
    "!: not as expected; blank: not run"
)
_SPACING = 3  # a border, and a blank on either side of the text
_MATRIX_COLUMN = 8  # `sharded*`


def _gradient_difference(trial: TrialRecord) -> str:
    gradients = trial.evidence.gradients if trial.evidence is not None else None
    return f"{max(gradients.max_difference):.3g}" if gradients is not None and gradients.max_difference else "-"


def _quality(trial: TrialRecord) -> str:
    consequence = trial.consequence
    if consequence is None:
        return "-"
    if consequence.test_accuracy is None:
        return " ".join(f"loss {loss:.4f}" for loss in consequence.test_loss[:4])
    return " ".join(f"{accuracy:.1%}" for accuracy in consequence.test_accuracy[:4])


def _distance(trial: TrialRecord) -> str:
    distance = trial.consequence.distance if trial.consequence is not None else None
    return f"{max(distance):.2g}" if distance else "-"


# Columns beside the verdicts': name to title and text.
NUMBERS: dict[str, tuple[str, Callable[[TrialRecord], str]]] = {
    "difference": ("gradients\ndiffer by", _gradient_difference),
    "accuracy": ("test accuracy\nby rank", _quality),
    "distance": ("distance from\nsynced run", _distance),
}


def lay_out(
    trials: Sequence[TrialRecord], columns: Sequence[str] | None = None
) -> tuple[list[str], list[list[Text]]]:
    """Return header and rows of a run's truth table; the first column names the trial.

    Args:
        trials: In order.
        columns: Names of verdicts and of `NUMBERS`; None: the verdicts that tell something, and all numbers.
    """
    verdicts = None if columns is None else [name for name in columns if name in VERDICTS]
    table = build_table(trials, verdicts)
    columns = columns or [*(name for name, _ in table.columns), *NUMBERS]
    header = [" × ".join(table.axes)]
    header += [NUMBERS[name][0] if name in NUMBERS else break_title(VERDICTS[name].title) for name in columns]
    rows = []
    for trial, row in zip(trials, table.rows, strict=True):
        words = {cell.name: style_word(cell) for cell in row.cells}
        texts = [Text(NUMBERS[name][1](trial)) if name in NUMBERS else words[name] for name in columns]
        rows.append([Text(row.label), *texts])
    return header, rows


def break_title(title: str) -> str:
    """Put a title's last word on a line of its own."""
    return "\n".join(part for part in title.rpartition(" ") if part.strip())


def style_word(cell: VerdictCell) -> Text:
    """Return a verdict in the color of its tone."""
    return Text(cell.word, style=STYLES.get(cell.tone, "dim"))


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


def build_matrix(title: str, overview: Overview, trials: Sequence[TrialRecord], width: int) -> Text:
    """Return one line a wrapper and one column a path; 80 columns hold seven paths, and more give them room.

    Every second path's name stands a line lower, so that names are longer than their columns are wide.
    """
    paths = overview.paths
    margin = max(map(len, overview.wrappers)) + 1
    column = min(max((width - margin) // len(paths), _MATRIX_COLUMN), _MATRIX_COLUMN + 2)
    lines = [Text(title, style="italic")]
    for names, indent in ((paths[::2], 0), (paths[1::2], column)):
        heading = "".join(name.ljust(2 * column) for name in names)
        lines.append(Text(" " * (margin + indent) + heading.rstrip(), style="bold"))
    for wrapper, cells in zip(overview.wrappers, overview.cells, strict=True):
        line = Text(wrapper.ljust(margin))
        for cell in cells:
            word = Text()
            if cell is not None:
                word.append_text(style_word(cell.gradients))
                if cell.gradients.word == NO_DATA_PARALLELISM:
                    word = Text("-", style="dim")
                skips = "skipped" in [hook.word for hook in cell.hooks[:2]] and cell.gradients.word != "crashed"
                word.append("*" * skips, style="yellow")
                word.append("!" * bool(trials[cell.number].unmet), style="bold red")
            line.append_text(word).append(" " * (column - len(word)))
        line.rstrip()
        lines.append(line)
    return Text("\n").join(lines)


def print_result(
    config: TrainConfig, environment: Environment, trials: Sequence[TrialRecord], directory: Path
) -> None:
    """Print the cells, what did not hold, and where the evidence lies; all cells stand in table.txt too."""
    with writing(directory / TABLE), (directory / TABLE).open("w", encoding="utf-8") as file:
        _show(Console(file=file, width=UNLIMITED), config, environment, trials)
    console = open_console()
    overview = build_table(trials).overview if len(trials) > MOST_ROWS else None
    if overview is None:
        _show(console, config, environment, trials)
    else:
        matrix = build_matrix(_title(config), overview, trials, console.width)
        console.print(matrix, no_wrap=True, soft_wrap=True)
        console.print(MATRIX_LEGEND, style="dim", highlight=False)
        console.print(_measured_on(config, environment), style="italic dim", highlight=False)
        _explain_all(console, [trial for trial in trials if trial.unmet])
        console.print(_conclusion(trials), highlight=False)
        console.print(f"every cell: {escape(shorten_path(directory / TABLE))}", highlight=False, soft_wrap=True)
    console.print(f"evidence: {escape(shorten_path(directory))}", highlight=False, soft_wrap=True)


def _show(console: Console, config: TrainConfig, environment: Environment, trials: Sequence[TrialRecord]) -> None:
    header, rows = lay_out(trials)
    header.append("as\nexpected")
    for trial, row in zip(trials, rows, strict=True):
        word = {True: "yes", False: "[bold red]NO[/]", None: "[dim]-[/]"}[trial.expectation_met]
        row.append(Text.from_markup(word))
    *_, last = tables = list(fit_tables(console, header, rows, 1, title=_title(config)))
    last.caption = _measured_on(config, environment)
    for table in tables:
        console.print(table)
    _explain_all(console, trials)
    console.print(_conclusion(trials), highlight=False)


def _explain_all(console: Console, trials: Sequence[TrialRecord]) -> None:
    for trial in trials:
        for line in _explain(trial):
            console.print(line, highlight=False)


def _title(config: TrainConfig) -> str:
    return escape(f"{config.name}: {config.question}")


def _measured_on(config: TrainConfig, environment: Environment) -> str:
    return (
        f"{plural(environment.world_size, 'rank')}, {environment.backend} on {environment.device}, "
        f"torch {environment.torch}, {config.steps} steps, seed {config.seed}"
    )


def say_left_out(reasons: Sequence[str]) -> None:
    """Say in one line which cells of the grid make no sense."""
    if len(reasons) > 1:
        pair, _ = reasons[0].split(" makes", 1)
        say(f"left out: {len(reasons)} pairs that make no sense, such as {pair}")
    elif reasons:
        say(f"left out: {reasons[0]}")


def _explain(trial: TrialRecord) -> Iterator[str]:
    """Yield lines on what needs words: a crash, an expectation that failed, a flight recorder that disagrees."""
    evidence = trial.evidence
    label = escape(f"{trial.cell.model.rsplit('.', 1)[-1]}: {trial.cell.label()}")
    if trial.error:
        cause = f"\n  cause: {trial.cause}" if trial.cause else ""
        yield f"[magenta]crashed[/] {label}: {escape(trial.error)}{cause}"
    if evidence is not None and evidence.gradients is not None and evidence.gradients.without_gradient:
        yield f"[yellow]no gradient[/] {label}: {', '.join(evidence.gradients.without_gradient)}"
    for name, words in trial.unmet.items():
        told = f"{name} is {words['measured']}, expected {words['expected']}"
        missing = _missing_hooks(evidence, name) if evidence is not None else ""
        yield f"[bold red]not as expected[/] {label}: {told}{missing}"
    if trial.flight_recorder_agrees is False:
        yield f"[bold red]flight recorder disagrees[/] {label}: other all-reduces than the reducer probe saw"


def _missing_hooks(evidence: Evidence, verdict: str) -> str:
    if not verdict.startswith("hooks_"):
        return ""
    kinds = skipped_kinds(evidence, verdict.removeprefix("hooks_"))
    return f" (did not fire: {', '.join(kinds)})" if kinds else ""


def _conclusion(results: Sequence[TrialRecord]) -> str:
    failed = sum(bool(result.unmet) for result in results)
    stated = sum(bool(result.expected) for result in results)
    if failed:
        return f"[bold red]{failed} of {len(results)} cells are not as expected[/]"
    if not stated:
        return "[dim]no cell has an expectation[/]"
    return f"[green]{stated} of {len(results)} cells have expectations, and all hold[/]"


def print_comparisons(
    config: TrainConfig, environment: Environment, results: Sequence[ComparisonRecord], directory: Path
) -> None:
    """Print the comparisons with one process and what each says; keep a copy as table.txt."""
    with writing(directory / TABLE), (directory / TABLE).open("w", encoding="utf-8") as file:
        show_comparisons(Console(file=file, width=UNLIMITED), config, environment, results)
    console = open_console()
    show_comparisons(console, config, environment, results)
    console.print(f"evidence: {escape(shorten_path(directory))}", highlight=False, soft_wrap=True)


def show_comparisons(
    console: Console, config: TrainConfig, environment: Environment, results: Sequence[ComparisonRecord]
) -> None:
    """Show a table of comparisons, and below it what each says that found a difference."""
    table = Table(title=_title(config), caption=_measured_on(config, environment), title_justify="left")
    table.box, table.pad_edge, table.show_edge = SIMPLE_HEAD, False, False
    for column in ("case × wrapper", "expected", "found", "as expected"):
        table.add_column(column, overflow="fold")
    for result in results:
        table.add_row(
            f"{result.case} × {result.wrapper}",
            result.expected,
            style_word(judge_comparison(result)),
            "yes" if result.is_met else "[bold red]NO[/]",
        )
    console.print(table)
    for result in results:
        if result.found != "same" or not result.is_met:
            said, _, _ = result.message.partition("\n")  # a matrix may follow
            mark = "" if result.is_met else f"[bold red]not as expected[/] ({result.expected}) "
            label = f"[bold]{result.case} × {result.wrapper}[/], {result.about}"
            console.print(f"{mark}{label}: {escape(said)}", highlight=False)
    failed = [result for result in results if not result.is_met]
    told = f"{len(failed)} of {plural(len(results), 'comparison')} not as expected"
    conclusion = f"all {plural(len(results), 'comparison')} are as expected"
    console.print(f"[bold red]{told}[/]" if failed else f"[green]{conclusion}[/]", highlight=False)
