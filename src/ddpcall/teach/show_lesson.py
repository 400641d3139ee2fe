"""What a lesson shows in the terminal: questions, evidence, comparison, explanation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ddpcall.teach.lesson import Lesson, Question
from ddpcall.teach.lessons import number_of
from ddpcall.teach.run import Answer, Run, list_contradictions, train_command
from ddpcall.teach.show import dimmed, show_bullet, styled, text_width
from ddpcall.teach.sources import Source, locate

_PLAIN: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "show_edge": False, "header_style": "bold"}
MOST_MESSAGE = 160  # characters of a crash's message


def show_opening(console: Console, lesson: Lesson) -> None:
    """Show what the lesson asks."""
    title = f"lesson {number_of(lesson)}: {lesson.name}"
    heading = styled(lesson.title)
    heading.stylize("bold")
    console.print(
        Panel(Group(heading, styled(lesson.question)), title=title, title_align="left", width=text_width(console))
    )


def show_question(console: Console, number: int, question: Question) -> None:
    """Show one question and its choices."""
    console.print(Text(f"\n{number}. ").append_text(styled(question.text)), width=text_width(console))
    width = max(len(choice.word) for choice in question.choices)
    for index, choice in enumerate(question.choices, 1):
        line = Text(f"   {index}  ", style="dim").append(choice.word.ljust(width), style="bold").append("  ")
        console.print(line.append_text(styled(choice.meaning)))


def show_evidence(console: Console, lesson: Lesson, run: Run) -> None:
    """Show the measured verdicts, one row a trial, or what each comparison with one process found."""
    _headline(console, "measured")
    if run.summary.get("comparisons"):
        _show_comparisons(console, run)
    else:
        _show_trials(console, lesson, run)
    environment = run.summary["environment"]
    ranks = environment["world_size"]
    console.print(
        f"[dim]{ranks} rank{'s' * (ranks != 1)}, {environment['backend']} on {environment['device']}, "
        f"torch {environment['torch']}; evidence: [/]{escape(_relative(run))}",
        highlight=False,
        soft_wrap=True,
    )
    crashes = {trial["error"].split(": ", 1)[-1]: trial for trial in run.trials if trial.get("error")}
    for message, trial in crashes.items():
        short = message if len(message) <= MOST_MESSAGE else message[:MOST_MESSAGE] + " …"
        cause = f"\n  cause: {trial['cause']}" if trial["cause"] else ""
        console.print(f"[magenta]crashed:[/] {escape(short)}{cause}", highlight=False, width=text_width(console))


def _show_trials(console: Console, lesson: Lesson, run: Run) -> None:
    from ddpcall.lab.records import read_trial
    from ddpcall.lab.report.terminal import fit_tables, lay_out
    from ddpcall.paths import SPELLING, CallPath  # imports torch: after the questions were asked

    header, rows = lay_out([read_trial(trial) for trial in run.trials], lesson.columns)
    for row in rows:
        row[0].stylize("cyan")
    for table in fit_tables(console, header, rows, 1, **_PLAIN):
        console.print(table)
    paths = dict.fromkeys(trial["path"] for trial in run.trials)
    legend = Text(" · ", style="dim").join(
        Text(path, style="cyan").append(f" {SPELLING[CallPath(path)]}", style="dim") for path in paths
    )
    console.print(legend, width=text_width(console))


def _show_comparisons(console: Console, run: Run) -> None:
    from ddpcall.lab.records import ComparisonRecord
    from ddpcall.lab.report.terminal import style_word
    from ddpcall.lab.report.truth import judge_comparison
    from ddpcall.lab.typed import read_record

    table = Table(**_PLAIN)
    for title in ("case", "wrapper", "one process\nand the ranks", "what the step does"):
        table.add_column(title, overflow="fold")
    for one in [read_record(ComparisonRecord, item) for item in run.trials]:
        table.add_row(Text(one.case, style="cyan"), one.wrapper, style_word(judge_comparison(one)), one.about)
    console.print(table)


def _relative(run: Run) -> str:
    parts = run.directory.parts
    return "/".join(parts[parts.index("runs") :]) if "runs" in parts else str(run.directory)


def show_comparison(console: Console, answers: Sequence[Answer]) -> None:
    """Show the predictions beside what was measured."""
    _headline(console, "your predictions")
    for number, answer in enumerate(answers, 1):
        mark = "[bold green]✓[/]" if answer.is_right else "[bold yellow]✗[/]"
        console.print(
            Text.from_markup(f"{mark} {number}. ").append_text(styled(answer.question.text)),
            width=text_width(console),
        )
        said = f"   you said [bold]{answer.predicted}[/]"
        console.print(f"{said}, measured: [bold]{answer.measured}[/]", highlight=False)
    right = sum(answer.is_right for answer in answers)
    console.print(f"{right} of {len(answers)} as measured", highlight=False, style="bold")


def show_why(console: Console, lesson: Lesson) -> None:
    """Show the explanation, where it stands in the source, and what to go on with."""
    _headline(console, "look at")
    for line in lesson.look:
        show_bullet(console, styled(line))
    _headline(console, "why")
    for paragraph in lesson.why:
        console.print(Padding(styled(paragraph), (0, 0, 1, 0)), width=text_width(console))
    for source in lesson.sources:
        show_bullet(console, describe_source(source))
    _headline(console, "go further")
    show_bullet(
        console,
        Text("ddpcall train ", style="cyan")
        .append(" ".join(train_command(lesson)[2:]))
        .append("  this run, on its own", style="dim"),
    )
    for command, purpose in lesson.further:
        show_bullet(console, Text(command, style="cyan").append("  ").append_text(dimmed(purpose)))
    _headline(console, "discuss")
    for line in lesson.discuss:
        show_bullet(console, styled(line))


def describe_source(source: Source) -> Text:
    """Return file, line and function of a source as installed; no line where this version has no such name."""
    try:
        place = f"{source.file}:{locate(source).line}"
    except (ImportError, AttributeError, OSError, TypeError):
        place = f"{source.file} (not found in this version)"
    return Text(place, style="cyan").append(f" {source.name}: ").append_text(styled(source.says))


def show_contradictions(console: Console, run: Run) -> None:
    """Show what was measured otherwise than expected: the lesson, or this machine, is wrong."""
    lines = list_contradictions(run)
    body = "\n".join(lines) if lines else f"{run.summary.get('outcome', 'failed')}: {run.summary.get('reason')}"
    console.print(
        Panel(
            escape(body),
            title="what was measured contradicts the lesson",
            border_style="red",
            title_align="left",
            width=text_width(console),
        )
    )


def _headline(console: Console, text: str) -> None:
    console.print(f"\n[bold]── {text} [/]" + "[dim]" + "─" * max(0, text_width(console) - len(text) - 4) + "[/]")
