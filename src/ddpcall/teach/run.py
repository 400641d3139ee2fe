"""Run a lesson: ask for predictions, run the experiment, answer the questions from what it measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddpcall
from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_WRONG_USE, WrongUse
from ddpcall.lab.run_directory import RunDirectory, new_run_id
from ddpcall.teach.lesson import Lesson, LessonQuestion, Trials
from ddpcall.teach.question import Result, answer

SCHEMA = 1


@dataclass(frozen=True)
class LessonRun:
    """A finished run of a lesson's experiment.

    Attributes:
        code: The lab's exit code: 0, 1 (expectations failed, or the run did) or 2 (wrong use).
        directory: The run directory.
        summary: What summary.json says.
    """

    code: int
    directory: Path
    summary: dict[str, Any]

    @property
    def trials(self) -> Trials:
        """The finished trials, or comparisons with one process."""
        return self.summary.get("trials") or self.summary.get("comparisons", [])

    @property
    def exit_code(self) -> int:
        """The lesson's: 1 when the run failed or contradicts what its experiment expects."""
        if self.code == EXIT_WRONG_USE:
            return EXIT_WRONG_USE
        return EXIT_OK if self.code == 0 and self.summary.get("outcome") == "ok" else EXIT_FAILED

    def answer(self, lesson: Lesson, predicted: Sequence[str]) -> list[Result]:
        """Put what was measured beside what was predicted."""
        return [
            answer(question, self.trials, word) for question, word in zip(lesson.predict, predicted, strict=True)
        ]

    def contradictions(self) -> list[str]:
        """Return what was measured otherwise than the experiment expects, in words."""
        unmet = [
            f"{trial['wrapper']} × {trial['path']}: {name} is {words['measured']}, expected {words['expected']}"
            for trial in self.summary.get("trials", [])
            for name, words in trial["unmet"].items()
        ]
        return unmet + [
            f"{one['case']} × {one['wrapper']}: {one['found']}, expected {one['expected']}"
            for one in self.summary.get("comparisons", [])
            if not one["expectation_met"]
        ]

    def record(self, lesson: Lesson, results: Sequence[Result]) -> dict[str, Any]:
        """Return what was predicted and measured, as `--json` writes it (docs/teaching.md)."""
        return {
            "schema": SCHEMA,
            "lesson": lesson.name,
            "experiment": lesson.experiment,
            "outcome": self.summary.get("outcome", "failed"),
            "answers": [
                {
                    "question": result.question.text,
                    "choices": list(result.question.choices),
                    "predicted": result.expected,
                    "measured": result.measured,
                    "right": result.is_as_expected,
                }
                for result in results
            ],
            "contradictions": self.contradictions(),
            "environment": self.summary.get("environment"),
            "run_directory": str(self.directory),
        }


def describe_environment() -> dict[str, str]:
    """Return the versions that a record was made with."""
    import torch

    return {"ddpcall": ddpcall.__version__, "torch": torch.__version__, "python": platform.python_version()}


def parse_predictions(lesson: Lesson, given: Sequence[str]) -> list[str]:
    """Return the choices' words for answers given on the command line.

    Raises:
        WrongUse: Too few, too many, or not among the choices.
    """
    if len(given) != len(lesson.predict):
        questions = "\n".join(f"  {one.key}. {one.text}  {' | '.join(one.choices)}" for one in lesson.predict)
        raise WrongUse(
            f"{lesson.name} asks {len(lesson.predict)} questions, and --predict gives {len(given)} answers. "
            f"Write one for each:\n{questions}"
        )
    try:
        return [question.parse(word) for question, word in zip(lesson.predict, given, strict=True)]
    except ValueError as error:
        raise WrongUse(f"--predict: {error}") from None


def ask(lesson: Lesson, show: Callable[[LessonQuestion], None], read: Callable[[str], str]) -> list[str]:
    """Ask every question until it is answered with one of its choices.

    Args:
        lesson: The lesson.
        show: Shows a question.
        read: Reads a line, given the prompt.

    Raises:
        WrongUse: The input ended before the last answer.
    """
    words: list[str] = []
    for number, question in enumerate(lesson.predict, 1):
        show(question)
        while len(words) < number:
            try:
                words.append(question.parse(read("your prediction: ")))
            except EOFError:
                raise WrongUse(
                    "the predictions ended before the questions did; give them with --predict"
                ) from None
            except ValueError:
                numbers = " or ".join(str(index) for index in range(1, len(question.choices) + 1))
                print(f"  write {numbers}, or {' or '.join(question.choices)}")
    return words


def train_command(lesson: Lesson, ranks: int | None = None, device: str = "auto") -> list[str]:
    """Return the command that runs the lesson's experiment without the lesson around it."""
    command = ["ddpcall", "train", f"experiment={lesson.experiment}"]
    command += [f"ranks={ranks}"] if ranks is not None else []
    return command + ([f"device={device}"] if device != "auto" else [])


def run_experiment(lesson: Lesson, ranks: int | None, device: str) -> LessonRun:
    """Run the lesson's experiment as `ddpcall train experiment=…` does, in a process that prints its own table.

    Args:
        lesson: The lesson.
        ranks: How many ranks; None for as many as the experiment asks for.
        device: auto, cpu or cuda.
    """
    directory = Path("runs", "lab", lesson.name, new_run_id()).absolute()
    quoted = "'" + str(directory).replace("\\", "\\\\").replace("'", "\\'") + "'"  # for Hydra's grammar
    command = [*train_command(lesson, ranks, device)[1:], f"hydra.run.dir={quoted}"]
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", "ddpcall", *command], check=False, env=dict(os.environ))
    return LessonRun(done.returncode, directory, RunDirectory(directory).read_summary())
