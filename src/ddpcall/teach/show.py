"""What the course shows in the terminal: its list, an exercise's task, a graded script."""

from __future__ import annotations

import re

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ddpcall.teach.exercises import EXERCISES, Exercise
from ddpcall.teach.grade import Report
from ddpcall.teach.lessons import LESSONS

TEXT_WIDTH = 100
OUTPUT_LINES = 12
_MARKED = re.compile(r"`([^`]+)`|\*([^*]+)\*")


def styled(text: str) -> Text:
    """Return a sentence with its `code` and *stress* set apart."""
    shown, end = Text(), 0
    for mark in _MARKED.finditer(text):
        shown.append(text[end : mark.start()])
        shown.append(mark[1] or mark[2], style="bold cyan" if mark[1] else "italic")
        end = mark.end()
    return shown.append(text[end:])


def dimmed(text: str) -> Text:
    """Return a sentence in the background, its `code` readable."""
    shown = styled(text)
    shown.stylize_before("dim")
    return shown


def show_list(console: Console) -> None:
    """Show the lessons in order, then the exercises."""
    lessons = _plain_table("lesson", "what it is about")
    for number, lesson in enumerate(LESSONS, 1):
        lessons.add_row(f"[dim]{number}[/] [bold]{lesson.name}[/]", styled(lesson.title))
    exercises = _plain_table("exercise", "a script to mend")
    for exercise in EXERCISES:
        exercises.add_row(f"[bold]{exercise.name}[/]", styled(exercise.title))
    console.print(Group("[bold]Lessons[/]: predict, run, explain", lessons))
    console.print("[dim]next:[/] ddpcall lab run hooks_and_call\n", highlight=False)
    console.print(Group("[bold]Exercises[/]: mend a script, have it graded", exercises))
    console.print("[dim]next:[/] ddpcall lab start module_bypass", highlight=False)


def _plain_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column(columns[0], no_wrap=True)
    table.add_column(columns[1], overflow="fold")
    return table


# ---- exercises ------------------------------------------------------------------------------------------------


def show_task(console: Console, exercise: Exercise, file: str) -> None:
    """Show what is to be mended in a script just written."""
    body = Text()
    heading = styled(exercise.title)
    heading.stylize("bold")
    body.append_text(heading).append("\n\n").append_text(styled(exercise.task))
    body.append("\n\nhint  ", style="dim").append_text(styled(exercise.hint))
    console.print(Panel(body, title=exercise.name, title_align="left", width=text_width(console)))
    commands = (
        ("torchrun --standalone --nproc-per-node 2 " + file, "run it"),
        (f"ddpcall watch -n 2 {file}", "ask what is wrong"),
        (f"ddpcall lab grade {exercise.name} {file}", "have it graded"),
    )
    console.print(f"written: [bold]{escape(file)}[/]. Mend it, then:", highlight=False)
    for command, purpose in commands:
        show_bullet(console, Text(command, style="cyan").append(f"  {purpose}", style="dim"))


def show_report(console: Console, report: Report) -> None:
    """Show a graded script: each criterion with points and a sentence, and its last output where it failed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    for name, justify in (("", "left"), ("criterion", "left"), ("points", "right"), ("what was measured", "left")):
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name == "points")  # pyright: ignore[reportArgumentType]
    for score in report.scores:
        judgement = score.judgement
        sentence = styled(judgement.sentence)
        if judgement.passed and score.withheld_by:
            sentence.append(f" Counts with: {', '.join(score.withheld_by)}.", style="yellow")
        mark = "[bold red]✗[/]" if not judgement.passed else "[yellow]–[/]" if score.withheld_by else "[green]✓[/]"
        of = score.criterion.points
        table.add_row(mark, score.criterion.title, f"{score.points}/{of}" if of else "", sentence)
    console.print(
        Panel(
            table,
            title=f"{report.exercise.name}: {escape(report.script.name)}",
            title_align="left",
            width=min(console.width, 120),
        )
    )
    if not all(score.judgement.passed for score in report.scores[:2]):
        tail = [line for line in report.ended.output.splitlines() if line.strip()][-OUTPUT_LINES:]
        console.print(Text("the last it printed:", style="dim"))
        console.print(Text("\n".join(tail), style="dim"), soft_wrap=True)
    colour = "green" if report.is_full else "yellow"
    total = Text().append(f"{report.points} of {report.of} points", style=f"bold {colour}")
    console.print(total.append(f" in {report.ended.seconds:.0f} s on {report.ranks} ranks"))
    if not report.is_full:
        console.print(
            Text("hint  ", style="dim").append_text(styled(report.exercise.hint)), width=text_width(console)
        )


def show_bullet(console: Console, text: Text) -> None:
    """Show a line of a list."""
    grid = Table.grid(padding=(0, 1))
    grid.add_row("[dim]•[/]", text)
    console.print(grid, width=text_width(console))


def text_width(console: Console) -> int:
    """Return how wide running text is shown: as the terminal, but no wider than one reads with ease."""
    return min(console.width, TEXT_WIDTH)
