"""`ddpcall lab`: list, run, start, grade; and `ddpcall claims`: run, show, list."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpcall.lab.console import open_console, warn
from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_WRONG_USE, WrongUse
from ddpcall.launch_environment import Place, read_torch_place
from ddpcall.teach.question import find
from ddpcall.watch.launch import let_rank_0_speak

EXIT_INTERRUPTED = 130
TIME_LIMIT_S = 120.0


def main(arguments: list[str]) -> int:
    """Do what `ddpcall lab` is asked for.

    Returns:
        0; 1 where a lesson's expectations failed or points are missing; 2 for wrong use.
    """
    options = _parser().parse_args(arguments)
    return _run_command(options, _refuse_launcher)


def claims(arguments: list[str]) -> int:
    """Do what `ddpcall claims` is asked for.

    Returns:
        0; 1 if an experiment could not be carried through; 2 for an unknown id or an unusable path.
    """
    return _run_command(_claims_parser().parse_args(arguments))


def _run_command(options: argparse.Namespace, check: Any = lambda: None) -> int:
    try:
        check()
        _check_writable(getattr(options, "json", None))
        return options.do(options)
    except (WrongUse, ValueError) as error:
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
    commands.add_parser("list", help="the lessons and exercises").set_defaults(do=_list)

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


def _claims_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddpcall claims", description="Run the experiments behind claims about `forward`: what do they show?"
    )
    parser.add_argument("keys", nargs="*", metavar="ID", help="claims to run, such as CF-3; all if none is given")
    parser.set_defaults(do=_claims)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="print their code instead: scripts that run")
    instead.add_argument("--list", action="store_true", help="list them instead")
    instead.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts to a file too")
    return parser


def _refuse_launcher() -> None:
    """Refuse to run once on each rank of somebody's launch; rank 0 says so."""
    if (read_torch_place() or Place()).num_ranks > 1:
        let_rank_0_speak()
        raise WrongUse(
            "`ddpcall lab` starts its own ranks. Write it without torchrun: ddpcall lab run NAME --ranks N"
        )


def _check_writable(path: Path | None) -> None:
    """Refuse a path before minutes of work are lost on it."""
    if path is not None and path.is_dir():
        raise WrongUse(f"--json {path} is a directory; write the name of a file in it")
    if path is not None and not path.absolute().parent.is_dir():
        raise WrongUse(f"--json {path}: there is no directory {path.absolute().parent}")


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


# ---- what is done ---------------------------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    from ddpcall.teach.show import show_list

    show_list(open_console())
    return EXIT_OK


def _run(options: argparse.Namespace) -> int:
    from ddpcall.teach import run as lesson_run
    from ddpcall.teach import show
    from ddpcall.teach.lesson import LESSONS

    lesson = find(options.name, LESSONS, "lesson")
    if options.ranks is not None and options.ranks < 2 and lesson.name != "hooks_and_call":
        raise WrongUse(
            f"--ranks {options.ranks}: {lesson.name} compares ranks, and on one there is nothing to compare; "
            "write --ranks 2"
        )
    console = open_console()
    if options.predict is not None:
        predicted = lesson_run.parse_predictions(lesson, options.predict)
        show.show_opening(console, lesson)
    elif not sys.stdin.isatty():
        example = " ".join(next(iter(question.choices)) for question in lesson.predict)
        raise WrongUse(
            f"{lesson.name} asks for {len(lesson.predict)} predictions, and there is no terminal to ask at. "
            f"Give them, such as: ddpcall lab run {lesson.name} --predict {example}"
        )
    else:
        show.show_opening(console, lesson)
        predicted = lesson_run.ask(lesson, lambda question: show.show_question(console, question), console.input)
    show.headline(console, "measured")
    run = lesson_run.run_experiment(lesson, options.ranks, options.device)
    if not run.trials:
        warn("the experiment did not run; its own words stand above")
        return EXIT_WRONG_USE if run.code == EXIT_WRONG_USE else EXIT_FAILED
    results = run.answer(lesson, predicted)
    show.show_comparison(console, results)
    show.show_explanation(console, lesson)
    if run.exit_code != EXIT_OK:
        show.show_contradictions(console, run)
    _write(options.json, run.record(lesson, results))
    return run.exit_code


def _start(options: argparse.Namespace) -> int:
    from ddpcall.teach.exercises import EXERCISES
    from ddpcall.teach.show import show_task

    exercise = find(options.name, EXERCISES, "exercise")
    file: Path = options.file or Path(f"{exercise.name}.py")
    if file.is_dir():
        file = file / f"{exercise.name}.py"
    try:
        with file.open("x") as written:  # never over somebody's work
            written.write(exercise.script)
    except FileExistsError:
        raise WrongUse(
            f"{file} is there already; write another name: ddpcall lab start {exercise.name} FILE"
        ) from None
    except OSError as error:
        raise WrongUse(f"{file} cannot be written: {error.strerror}") from None
    show_task(open_console(), exercise, str(file))
    return EXIT_OK


def _grade(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ddpcall.teach.exercises import EXERCISES
    from ddpcall.teach.grade import grade
    from ddpcall.teach.show import show_grade

    exercise = find(options.name, EXERCISES, "exercise")
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
    with Console(stderr=True).status(f"running {options.script.name} on {options.ranks} ranks, under watch"):
        try:
            graded = grade(exercise, options.script, options.ranks, options.time_limit)
        except OSError as error:
            raise WrongUse(f"{options.script} cannot be graded: {error}") from None
    show_grade(open_console(), graded)
    _write(options.json, graded.record())
    return EXIT_OK if graded.is_full else EXIT_FAILED


def _claims(options: argparse.Namespace) -> int:
    from ddpcall.teach.claims import find_claims
    from ddpcall.teach.claims.run import run_claims
    from ddpcall.teach.run import describe_environment
    from ddpcall.teach.show import show_claim_results, show_claims

    chosen, console = find_claims(options.keys), open_console()
    if options.list:
        show_claims(console, chosen)
        return EXIT_OK
    if options.show:
        code = "\n\n".join(show_code(claim) for claim in chosen)
        console.out(code, highlight=False, end="")  # as it is, so that it can be piped into a file and run
        return EXIT_OK
    results = run_claims(chosen)
    now = describe_environment()
    versions = f"torch {now['torch']}, Python {now['python']}, gloo on cpu where ranks are needed"
    show_claim_results(console, results, versions)
    _write(options.json, record_claims(results))
    return EXIT_FAILED if any(result.failed for result in results) else EXIT_OK


def record_claims(results: Sequence[Any]) -> dict[str, Any]:
    """Return results as `--json` writes them."""
    import torch

    return {
        "schema": 1,
        "claims": [
            {
                "id": result.question.key,
                "verdict": result.measured,
                "evidence": result.sentence,
                "torch": torch.__version__,
            }
            for result in results
        ],
    }


def show_code(claim: Any) -> str:
    """Return a claim's experiment and judge, with what they use of their module, as a script that runs them."""
    from ddpcall.teach.source_code import cut_out

    experiment, judge = claim.experiment.__name__, claim.judge_evidence.__name__
    run, imports = f"{experiment}()", ""
    if claim.num_ranks > 1:
        imports = "    from ddpcall.ranks import run_on_ranks\n\n"
        run = f"run_on_ranks({experiment}, {claim.num_ranks})[0]"
    code = cut_out([inspect.getsource(sys.modules[claim.experiment.__module__])], [experiment, judge])
    last = f'if __name__ == "__main__":\n{imports}    print({judge}(**{run}))\n'
    return f'"""{claim.key}: {claim.text}\n\nSource: {claim.source}\n"""\n\n{code}\n\n{last}'
