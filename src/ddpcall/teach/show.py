"""What `ddpcall lab` and `ddpcall claims` show in the terminal: one table of results, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.markdown import Markdown
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ddpcall.teach.claims.claim import Claim
from ddpcall.teach.exercises import EXERCISES, Exercise
from ddpcall.teach.grade import Grade
from ddpcall.teach.lesson import LESSONS, Lesson, LessonQuestion
from ddpcall.teach.question import DEPENDS, FALSE, MET, MISSED, SKIPPED, TRUE, Result
from ddpcall.teach.run import LessonRun, train_command
from ddpcall.teach.source_code import Source, locate

TEXT_WIDTH = 100  # columns: no wider than one reads with ease
OUTPUT_LINES = 12
STYLES: dict[str, str] = {
    TRUE: "green",
    FALSE: "bold red",
    DEPENDS: "yellow",
    SKIPPED: "dim",
    MET: "green",
    MISSED: "bold red",
}


def _table(console: Console, rows: Iterable[Sequence[RenderableType]], leading: int = 0) -> None:
    """Show rows whose last column is text: it takes what the others leave, and breaks between words."""
    table = Table(box=box.SIMPLE, show_edge=False, show_header=False, padding=(0, 2, 0, 0), leading=leading)
    for index, row in enumerate(rows):
        for number in range(len(row) if index == 0 else 0):
            table.add_column(no_wrap=number < len(row) - 1, overflow="fold")
        table.add_row(*row)
    console.print(table, width=text_width(console))


def text_width(console: Console) -> int:
    """Return how wide running text is shown."""
    return min(console.width, TEXT_WIDTH)


def marked(text: str, style: str = "") -> Text:
    """Return a sentence with its `code` set apart."""
    shown = Text(style=style)
    for number, part in enumerate(text.split("`")):
        shown.append(part, style="bold cyan" if number % 2 else "")
    return shown


def headline(console: Console, text: str) -> None:
    """Show the title of what follows."""
    console.print(f"\n[bold]── {text} [/]" + "[dim]" + "─" * max(0, text_width(console) - len(text) - 4) + "[/]")


def _panel(console: Console, title: str, body: RenderableType, style: str = "none") -> None:
    console.print(Panel(body, title=title, title_align="left", border_style=style, width=text_width(console)))


# ---- the lists ------------------------------------------------------------------------------------------------


def show_list(console: Console) -> None:
    """Show the lessons in order, then the exercises."""
    console.print("[bold]Lessons[/]: predict, run, explain")
    _table(console, [(f"[dim]{one.number}[/] [bold]{one.name}[/]", marked(one.title)) for one in LESSONS])
    console.print("[dim]next:[/] ddpcall lab run hooks_and_call\n", highlight=False)
    console.print("[bold]Exercises[/]: mend a script, have it graded")
    _table(console, [(f"[bold]{one.name}[/]", marked(one.title)) for one in EXERCISES])
    console.print("[dim]next:[/] ddpcall lab start module_bypass", highlight=False)


def show_claims(console: Console, claims: Iterable[Claim]) -> None:
    """Show claims without running any."""
    rows = [(claim.key, marked(claim.text).append("\n").append(marked(claim.source, "dim"))) for claim in claims]
    _table(console, rows, leading=1)


# ---- results --------------------------------------------------------------------------------------------------


def show_results(console: Console, results: Sequence[Result]) -> None:
    """Show results of any kind, one a row: its key, what was measured, the question and the sentence on it."""
    rows = []
    for result in results:
        question, points = result.question, getattr(result.question, "points", None)
        word = Text(result.measured, style=STYLES.get(result.measured, "bold"))
        text = marked(question.text)
        if points is not None:  # a criterion
            word.append(f"\n{result.points} of {points}" if points else "", style="dim")
        if isinstance(question, LessonQuestion):
            word.stylize("bold green" if result.is_as_expected else "bold yellow")
            text.append(f"\nyou said {result.expected}, measured: {result.measured}")
        if result.sentence:
            text.append("\n").append(marked(result.sentence, "dim"))
        if result.withheld_by and result.measured == MET:
            text.append(f" Counts with: {', '.join(result.withheld_by)}.", style="yellow")
        rows.append((question.key, word, text))
    _table(console, rows, leading=1)


def list_remarks(results: Sequence[Result]) -> list[str]:
    """Name the claims whose experiment contradicts a first look, and what torch warned of, with who met it."""
    met_by: dict[str, list[str]] = {}
    for result in results:
        for warning in result.warnings:
            met_by.setdefault(warning, []).append(result.question.key)
    disagreeing = [one for one in results if not one.is_as_expected and one.measured != SKIPPED]
    return [
        *(f"{one.question.key} is {one.measured}, where a first look said {one.expected}" for one in disagreeing),
        *(f"torch warns: {warning} ({', '.join(keys)})" for warning, keys in met_by.items()),
    ]


def count_outcomes(results: Sequence[Result]) -> str:
    """Count the results by what was measured."""
    counts = {word: sum(result.measured == word for result in results) for word in STYLES}
    return ", ".join(f"{number} {word}" for word, number in counts.items() if number)


def show_claim_results(console: Console, results: Sequence[Result], versions: str) -> None:
    """Show what became of claims, and with which versions."""
    show_results(console, results)
    for line in [*list_remarks(results), f"{count_outcomes(results)}; {versions}"]:
        console.print(escape(line), highlight=False, width=text_width(console))


def show_grade(console: Console, grade: Grade) -> None:
    """Show a graded script: each criterion with points and a sentence, and its last output where it failed."""
    headline(console, f"{grade.exercise.name}: {escape(grade.script.name)}")
    show_results(console, grade.results)
    if any(result.measured != MET for result in grade.results[:2]):
        tail = [line for line in grade.run.ended.output.splitlines() if line.strip()][-OUTPUT_LINES:]
        console.print(Text("\n".join(["the last it printed:", *tail]), style="dim"), soft_wrap=True)
    total = Text(f"{grade.points} of {grade.of} points", style=f"bold {'green' if grade.is_full else 'yellow'}")
    console.print(
        total.append(f" in {grade.run.ended.seconds:.0f} s on {grade.run.num_ranks} ranks", style="not bold")
    )
    if not grade.is_full:
        console.print(Text("hint  ", style="dim").append(marked(grade.exercise.hint)), width=text_width(console))


# ---- lessons and exercises ------------------------------------------------------------------------------------


def show_task(console: Console, exercise: Exercise, file: str) -> None:
    """Show what is to be mended in a script just written."""
    body = marked(exercise.title, "bold").append("\n\n").append(marked(exercise.task))
    _panel(console, exercise.name, body.append("\n\nhint  ", style="dim").append(marked(exercise.hint)))
    console.print(f"written: [bold]{escape(file)}[/]. Mend it, then:", highlight=False)
    commands = {
        f"torchrun --standalone --nproc-per-node 2 {file}": "run it",
        f"ddpcall watch -n 2 {file}": "ask what is wrong",
        f"ddpcall lab grade {exercise.name} {file}": "have it graded",
    }
    for command, purpose in commands.items():
        console.print(Text("  ").append(command, style="cyan").append(f"  {purpose}", style="dim"))


def show_opening(console: Console, lesson: Lesson) -> None:
    """Show what the lesson asks."""
    body = marked(lesson.title, "bold").append("\n").append(marked(lesson.question))
    _panel(console, f"lesson {lesson.number}: {lesson.name}", body)


def show_question(console: Console, question: LessonQuestion) -> None:
    """Show one question and its choices."""
    console.print(Text(f"\n{question.key}. ").append(marked(question.text)), width=text_width(console))
    choices = enumerate(question.choices.items(), 1)
    _table(console, [(f"   [dim]{n}[/]", f"[bold]{word}[/]", marked(meaning)) for n, (word, meaning) in choices])


def show_comparison(console: Console, results: Sequence[Result]) -> None:
    """Show the predictions beside what was measured."""
    headline(console, "your predictions")
    show_results(console, results)
    right = sum(result.is_as_expected for result in results)
    console.print(f"{right} of {len(results)} as measured", highlight=False, style="bold")


def show_explanation(console: Console, lesson: Lesson) -> None:
    """Show what to look at, why it is so, where it stands in the source, and what to go on with."""
    for title in ("Look at", "Why", "Sources", "Go further", "Discuss"):
        headline(console, title.lower())
        text = lesson.sections[title]
        if title == "Sources":
            text = "\n".join(
                f"* `{_find_source(source)}` `{source.name}`: {source.says}" for source in lesson.sources
            )
        elif title == "Go further":
            text = f"* `{' '.join(train_command(lesson))}`: this run, on its own\n{text}"
        console.print(Markdown(text), width=text_width(console))


def _find_source(source: Source) -> str:
    """Return file and line of a source as installed; no line where this version has no such name."""
    try:
        return f"{source.file}:{locate(source)[1]}"
    except (ImportError, AttributeError, OSError, TypeError):
        return f"{source.file} (not found in this version)"


def show_contradictions(console: Console, run: LessonRun) -> None:
    """Show what was measured otherwise than expected: the lesson, or this machine, is wrong."""
    lines = run.contradictions()
    body = "\n".join(lines) if lines else f"{run.summary.get('outcome', 'failed')}: {run.summary.get('reason')}"
    _panel(console, "what was measured contradicts the lesson", escape(body), "red")
