"""`ddpcall lab`: list, run, start, grade."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ddpcall.lab.console import open_console, warn
from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_WRONG_USE, WrongUse
from ddpcall.teach.exercises import Exercise, find_exercise
from ddpcall.teach.lesson import Lesson
from ddpcall.teach.lessons import find_lesson
from ddpcall.watch.launch import let_rank_0_speak

EXIT_INTERRUPTED = 130
TIME_LIMIT_S = 120.0


def main(arguments: list[str]) -> int:
    """Do what the command line asks for.

    Returns:
        0; 1 where a lesson's expectations failed or points are missing; 2 for wrong use.
    """
    options = _parser().parse_args(arguments)
    try:
        _refuse_launcher()
        return options.do(options)
    except WrongUse as error:
        warn(str(error))
        return EXIT_WRONG_USE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddpcall lab",
        description="Lessons that predict, run and explain, and scripts to mend that are graded.",
    )
    parser.set_defaults(do=_list)
    commands = parser.add_subparsers(metavar="COMMAND")
    listing = commands.add_parser("list", help="the lessons and exercises")
    listing.set_defaults(do=_list)

    run = commands.add_parser("run", help="predict, run and explain one lesson")
    run.add_argument("name", metavar="NAME", help="a lesson's name or number")
    run.add_argument(
        "--predict", nargs="+", metavar="ANSWER", help="the predictions, one for each question, in order"
    )
    run.add_argument("--ranks", type=int, metavar="N", help="how many ranks to start on this machine")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--json", type=Path, metavar="FILE", help="write predictions and measurements there")
    run.set_defaults(do=_run)

    start = commands.add_parser("start", help="write an exercise's broken script")
    start.add_argument("name", metavar="NAME", help="the exercise")
    start.add_argument("file", nargs="?", type=Path, metavar="FILE", help="where to; NAME.py if not given")
    start.set_defaults(do=_start)

    grade = commands.add_parser("grade", help="run a script on its ranks, under watch, and grade it")
    grade.add_argument("name", metavar="NAME", help="the exercise")
    grade.add_argument("script", type=Path, metavar="SCRIPT", help="the mended script")
    grade.add_argument("--json", type=Path, metavar="FILE", help="write the gradebook's record there")
    grade.add_argument("--ranks", type=int, default=2, metavar="N", help="how many ranks (2)")
    grade.add_argument(
        "--time-limit", type=float, default=TIME_LIMIT_S, metavar="S", help=f"seconds ({TIME_LIMIT_S:.0f})"
    )
    grade.set_defaults(do=_grade)
    return parser


def _refuse_launcher() -> None:
    """Refuse to run once on each rank of somebody's launch; rank 0 says so."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    let_rank_0_speak()
    raise WrongUse("`ddpcall lab` starts its own ranks. Write it without torchrun: ddpcall lab run NAME --ranks N")


def _list(options: argparse.Namespace) -> int:
    from ddpcall.teach.show import show_list

    show_list(open_console())
    return EXIT_OK


def _run(options: argparse.Namespace) -> int:
    from ddpcall.teach import run as lesson_run
    from ddpcall.teach import show_lesson as show

    lesson = _find_lesson(options.name)
    _check_ranks(lesson, options.ranks)
    _check_writable(options.json)
    console = open_console()
    if options.predict is not None:
        predicted = lesson_run.parse_predictions(lesson, options.predict)
        show.show_opening(console, lesson)
    else:
        _need_terminal(lesson)
        show.show_opening(console, lesson)
        predicted = lesson_run.ask(lesson, lambda *given: show.show_question(console, *given), console.input)
    command = " ".join(lesson_run.train_command(lesson, options.ranks, options.device))
    console.print(f"\n[dim]running[/] {command} [dim]…[/]", highlight=False)
    run = lesson_run.run_experiment(lesson, options.ranks, options.device)
    if not run.trials:
        warn(f"the experiment did not run\n{run.output[-lesson_run.OUTPUT_SHOWN :]}")
        return EXIT_WRONG_USE if run.code == EXIT_WRONG_USE else EXIT_FAILED
    show.show_evidence(console, lesson, run)
    code = lesson_run.judge_run(run)
    try:
        answers = lesson_run.compare(lesson, predicted, run.trials)
    except LookupError:  # the run was cut short
        answers = []
    if answers:
        show.show_comparison(console, answers)
        show.show_why(console, lesson)
    if code != EXIT_OK:
        show.show_contradictions(console, run)
    if options.json is not None:
        lesson_run.write_record(options.json, lesson, run, answers)
    return code


def _find_lesson(name: str) -> Lesson:
    try:
        return find_lesson(name)
    except ValueError as error:
        raise WrongUse(str(error)) from None


def _find_exercise(name: str) -> Exercise:
    try:
        return find_exercise(name)
    except ValueError as error:
        raise WrongUse(str(error)) from None


def _check_ranks(lesson: Lesson, ranks: int | None) -> None:
    if ranks is not None and ranks < 2 and lesson.name != "hooks_and_call":
        raise WrongUse(
            f"--ranks {ranks}: {lesson.name} compares ranks, and on one there is nothing to compare; write "
            f"--ranks 2"
        )


def _check_writable(path: Path | None) -> None:
    """Refuse a path before minutes of work are lost on it."""
    if path is not None and path.is_dir():
        raise WrongUse(f"--json {path} is a directory; write the name of a file in it")
    if path is not None and not path.absolute().parent.is_dir():
        raise WrongUse(f"--json {path}: there is no directory {path.absolute().parent}")


def _need_terminal(lesson: Lesson) -> None:
    if not sys.stdin.isatty():
        example = " ".join(question.choices[0].word for question in lesson.predict)
        raise WrongUse(
            f"{lesson.name} asks for {len(lesson.predict)} predictions, and there is no terminal to ask at. "
            f"Give them, such as: ddpcall lab run {lesson.name} --predict {example}"
        )


def _start(options: argparse.Namespace) -> int:
    from ddpcall.teach.show import show_task

    exercise = _find_exercise(options.name)
    file: Path = options.file or Path(f"{exercise.name}.py")
    if file.is_dir():
        file = file / f"{exercise.name}.py"
    try:
        with file.open("x") as written:  # never over somebody's work
            written.write(exercise.script.read_text())
    except FileExistsError:
        raise WrongUse(
            f"{file} is there already; write another name: ddpcall lab start {exercise.name} FILE"
        ) from None
    except OSError as error:
        raise WrongUse(f"{file} cannot be written: {error.strerror}") from None
    show_task(open_console(), exercise, str(file))
    return EXIT_OK


def _grade(options: argparse.Namespace) -> int:
    exercise = _find_exercise(options.name)
    if options.ranks < 2:
        raise WrongUse(
            f"--ranks {options.ranks}: what is graded is what several ranks do together; write --ranks 2"
        )
    if options.time_limit <= 0:
        raise WrongUse(f"--time-limit {options.time_limit:g}: write a number of seconds above 0")
    if not options.script.is_file():
        raise WrongUse(
            f"there is no file {options.script}; `ddpcall lab start {exercise.name}` writes the script to mend"
        )
    _check_writable(options.json)
    from rich.console import Console

    from ddpcall.teach.grade import grade
    from ddpcall.teach.show import show_report

    terminal = Console(stderr=True)
    with terminal.status(f"running {options.script.name} on {options.ranks} ranks, under watch"):
        try:
            report = grade(exercise, options.script, options.ranks, options.time_limit)
        except OSError as error:
            raise WrongUse(f"{options.script} cannot be graded: {error}") from None
    show_report(open_console(), report)
    if options.json is not None:
        options.json.write_text(json.dumps(report.record(), indent=2) + "\n")
    return EXIT_OK if report.is_full else EXIT_FAILED
