"""What rank 0 shows in the terminal: a progress bar, the table, and errors in one message."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich import progress as rich_progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddpcall.evidence import Environment, Evidence
from ddpcall.lab.report.words import find_tone
from ddpcall.lab.result_table import COLORS, MATRIX_LEGEND, build_matrix, build_tables, is_matrix
from ddpcall.verdicts import explain_crash, skipped_kinds

if TYPE_CHECKING:
    from ddpcall.lab.comparisons import ComparisonResult
    from ddpcall.lab.experiment import TrialResult
    from ddpcall.lab.schema import TrainConfig

TABLE = "table.txt"
UNLIMITED = 10_000  # columns: a table then takes what it needs


def say(message: str) -> None:
    """Print one line for people, to stdout; a path that is longer than the terminal is wide stays whole."""
    console = open_console()
    lines = textwrap.wrap(message, console.width, break_long_words=False, break_on_hyphens=False)
    console.print(escape("\n".join(lines)), highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print an error message to stderr."""
    Console(stderr=True, soft_wrap=True).print(f"ddpcall: {escape(message)}", highlight=False)


class _Terminal(Console):
    """A console whose reader may leave (`| head`): what was measured stands, so nothing is raised."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_console() -> Console:
    """Return a console on stdout: as wide as the terminal or COLUMNS say, and without a limit when piped."""
    console = _Terminal()
    return console if console.is_terminal or "COLUMNS" in os.environ else _Terminal(width=UNLIMITED)


def shorten_path(path: Path) -> str:
    """Return a path as one types it here: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_absolute() and path.is_relative_to(Path.cwd()) else path)


class Progress:
    """A bar over the trials, on a terminal; nothing when piped or on other ranks."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self._bar = rich_progress.Progress(
            rich_progress.SpinnerColumn(),
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, label: str) -> None:
        """Show which trial runs."""
        self._bar.update(self._task, description=escape(label))

    def finish(self) -> None:
        """Count one trial as done."""
        self._bar.advance(self._task)


def print_result(
    config: TrainConfig, environment: Environment, results: list[TrialResult], directory: Path
) -> None:
    """Print the cells, what did not hold, and where the evidence lies; all cells stand in table.txt too."""
    with (directory / TABLE).open("w") as file:
        _show(Console(file=file, width=UNLIMITED), config, environment, results)
    console = open_console()
    if is_matrix(results):
        _show_matrix(console, config, environment, results)
        console.print(f"every cell: {escape(shorten_path(directory / TABLE))}", highlight=False, soft_wrap=True)
    else:
        _show(console, config, environment, results)
    console.print(f"evidence: {escape(shorten_path(directory))}", highlight=False, soft_wrap=True)


def _show(console: Console, config: TrainConfig, environment: Environment, results: list[TrialResult]) -> None:
    *_, last = tables = list(build_tables(console, _title(config), results))
    last.caption = _measured_on(config, environment)
    for table in tables:
        console.print(table)
    for result in results:
        for line in _explain(result):
            console.print(line, highlight=False)
    console.print(_conclusion(results), highlight=False)


def _show_matrix(
    console: Console, config: TrainConfig, environment: Environment, results: list[TrialResult]
) -> None:
    """Show the matrix, and of single cells only those that are not as expected."""
    console.print(build_matrix(_title(config), results, console.width), no_wrap=True, soft_wrap=True)
    console.print(MATRIX_LEGEND, style="dim", highlight=False)
    console.print(_measured_on(config, environment), style="italic dim", highlight=False)
    for result in results:
        for line in _explain(result) if result.unmet else []:
            console.print(line, highlight=False)
    console.print(_conclusion(results), highlight=False)


def _title(config: TrainConfig) -> str:
    return f"{config.name}: {config.question}"


def _measured_on(config: TrainConfig, environment: Environment) -> str:
    return (
        f"{_plural(environment.world_size, 'rank')}, {environment.backend} on {environment.device}, "
        f"torch {environment.torch}, {config.steps} steps, seed {config.seed}"
    )


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def say_left_out(reasons: Sequence[str]) -> None:
    """Say in one line which cells of the grid make no sense."""
    if len(reasons) > 1:
        pair, _ = reasons[0].split(" makes", 1)
        say(f"left out: {len(reasons)} pairs that make no sense, such as {pair}")
    elif reasons:
        say(f"left out: {reasons[0]}")


def _explain(result: TrialResult) -> list[str]:
    """Return lines on what needs words: a crash, an expectation that failed, a witness that disagrees."""
    cell = result.evidence.cell
    label = escape(f"{cell.model.rsplit('.', 1)[-1]}: {cell.label()}")
    lines = []
    for failure in result.evidence.failures[:1]:
        first_line = failure.message.strip().splitlines()[0] if failure.message.strip() else ""
        cause = explain_crash(result.evidence)
        lines.append(
            f"[magenta]crashed[/] {label}: rank {failure.rank}, step {failure.step}: "
            f"{failure.kind}: {escape(first_line)}" + (f"\n  cause: {cause}" if cause else "")
        )
    gradients = result.evidence.gradients
    if gradients is not None and gradients.without_gradient:
        lines.append(f"[yellow]no gradient[/] {label}: {', '.join(gradients.without_gradient)}")
    for name, words in result.unmet.items():
        lines.append(
            f"[bold red]not as expected[/] {label}: {name} is {words['measured']}, expected {words['expected']}"
            + _missing_hooks(result.evidence, name)
        )
    collectives = result.evidence.collectives
    if collectives is not None and collectives.agrees is False:
        lines.append(
            f"[bold red]witness disagrees[/] {label}: the flight recorder saw other all-reduces than armed"
        )
    return lines


def _missing_hooks(evidence: Evidence, verdict: str) -> str:
    if not verdict.startswith("hooks_"):
        return ""
    kinds = skipped_kinds(evidence, verdict.removeprefix("hooks_"))
    return f" (did not fire: {', '.join(kinds)})" if kinds else ""


def _conclusion(results: list[TrialResult]) -> str:
    failed = sum(bool(result.unmet) for result in results)
    stated = sum(bool(result.expected) for result in results)
    if failed:
        return f"[bold red]{failed} of {len(results)} cells are not as expected[/]"
    if not stated:
        return "[dim]no cell has an expectation[/]"
    return f"[green]{stated} of {len(results)} cells have expectations, and all hold[/]"


def print_comparisons(
    config: TrainConfig, environment: Environment, results: list[ComparisonResult], directory: Path
) -> None:
    """Print the comparisons with one process and what each says; keep a copy as table.txt."""
    with (directory / TABLE).open("w") as file:
        show_comparisons(Console(file=file, width=UNLIMITED), config, environment, results)
    console = open_console()
    show_comparisons(console, config, environment, results)
    console.print(f"evidence: {escape(shorten_path(directory))}", highlight=False, soft_wrap=True)


def show_comparisons(
    console: Console, config: TrainConfig, environment: Environment, results: list[ComparisonResult]
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
            f"[{COLORS.get(find_tone('one_process', result.found), 'dim')}]{result.found}[/]",
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
    told = f"{len(failed)} of {_plural(len(results), 'comparison')} not as expected"
    conclusion = f"all {_plural(len(results), 'comparison')} are as expected"
    console.print(f"[bold red]{told}[/]" if failed else f"[green]{conclusion}[/]", highlight=False)
