"""What rank 0 shows in the terminal: a progress bar, the table, and errors in one message."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich import progress as rich_progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddpcall.evidence import Consequence, Environment, Evidence
from ddpcall.lab.columns import is_interesting
from ddpcall.lab.report.words import find_tone
from ddpcall.verdicts import Verdicts, explain_crash, skipped_kinds

if TYPE_CHECKING:
    from ddpcall.lab.experiment import TrialResult
    from ddpcall.lab.schema import TrainConfig

PIPED_WIDTH = 220
MAX_LABEL_WIDTH = 36  # wrapper × path stays on one line
_COLOURS = {"good": "green", "lost": "bold red", "crash": "bold magenta", "part": "yellow", "other": "cyan"}
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


def say(message: str) -> None:
    """Print one line for people, to stdout."""
    open_console().print(escape(message), highlight=False)


def warn(message: str) -> None:
    """Print an error message to stderr."""
    Console(stderr=True, soft_wrap=True).print(f"ddpcall: {escape(message)}", highlight=False)


class _Terminal(Console):
    """A console whose reader may leave (`| head`): what was measured stands, so nothing is raised."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_console() -> Console:
    """Return a console on stdout: as wide as the terminal, or of one fixed width when piped."""
    console = _Terminal()
    return console if console.is_terminal else _Terminal(width=PIPED_WIDTH)


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
    """Print the table of cells, what did not hold, and where the evidence lies; keep a copy as table.txt."""
    with (directory / "table.txt").open("w") as file:
        _show(Console(file=file, width=PIPED_WIDTH), config, environment, results)
    console = open_console()
    _show(console, config, environment, results)
    console.print(f"evidence: {escape(str(directory))}", highlight=False, soft_wrap=True)


def _show(console: Console, config: TrainConfig, environment: Environment, results: list[TrialResult]) -> None:
    console.print(_table(config, environment, results))
    for result in results:
        for line in _explain(result):
            console.print(line, highlight=False)
    console.print(_conclusion(results), highlight=False)


def _table(config: TrainConfig, environment: Environment, results: list[TrialResult]) -> Table:
    caption = (
        f"{_plural(environment.world_size, 'rank')}, {environment.backend} on {environment.device}, "
        f"torch {environment.torch}, {config.steps} steps, seed {config.seed}"
    )
    table = Table(title=f"{config.name}: {config.question}", caption=caption, title_justify="left")
    several_models = len({result.evidence.cell.model for result in results}) > 1
    shown = [
        name for name in _OPTIONAL if is_interesting(name, [getattr(result.verdicts, name) for result in results])
    ]
    columns = ["model"] if several_models else []
    columns += ["wrapper × path", "gradients", "gradients\ndiffer by", "hooks\nwrapped", "inner", "below"]
    columns += [_OPTIONAL[name] for name in shown]
    columns += ["test accuracy\nby rank", "distance from\nsynced run", "as\nexpected"]
    label_width = min(MAX_LABEL_WIDTH, max(len(result.evidence.cell.label()) for result in results))
    for column in columns:
        is_label = column == "wrapper × path"
        table.add_column(
            column, overflow="fold", min_width=label_width if is_label else None, no_wrap=column == "model"
        )
    for result in results:
        table.add_row(*_row(result, several_models, shown))
    return table


def _row(result: TrialResult, several_models: bool, shown: list[str]) -> list[str]:
    evidence, verdicts = result.evidence, result.verdicts
    row = [evidence.cell.model.rsplit(".", 1)[-1]] if several_models else []
    row += [evidence.cell.label(), _coloured(verdicts, "gradients"), _gradient_difference(evidence)]
    row += [_coloured(verdicts, name) for name in ("hooks_wrapped", "hooks_inner", "hooks_submodules", *shown)]
    row += [_quality(evidence.consequence), _distance(evidence.consequence)]
    met = "[bold red]NO[/]" if result.unmet else ("yes" if result.expected else "[dim]-[/]")
    return [*row, met]


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _coloured(verdicts: Verdicts, name: str) -> str:
    word = getattr(verdicts, name)
    return f"[{_COLOURS.get(find_tone(name, word), 'dim')}]{word}[/]"


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
    return f"[green]{stated} of {len(results)} cells have expectations, and all hold[/]"
