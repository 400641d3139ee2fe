"""Run a lesson: ask for a prediction, run the experiment, compare the prediction with what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_WRONG_USE, WrongUse
from ddpcall.lab.run_directory import RunDirectory, new_run_id
from ddpcall.teach.lesson import Lesson, Question, Trials

SCHEMA = 1
OUTPUT_SHOWN = 4_000  # characters of a failed run's output


@dataclass(frozen=True)
class Answer:
    """One question, answered twice.

    Attributes:
        question: The question.
        predicted: The student's answer.
        measured: The experiment's.
    """

    question: Question
    predicted: str
    measured: str

    @property
    def is_right(self) -> bool:
        """Whether they agree."""
        return self.predicted == self.measured


@dataclass(frozen=True)
class Run:
    """A finished run of a lesson's experiment.

    Attributes:
        code: The lab's exit code: 0, 1 (expectations failed, or the run did) or 2 (wrong use).
        directory: The run directory.
        summary: What summary.json says.
        output: What the lab printed.
    """

    code: int
    directory: Path
    summary: dict[str, Any]
    output: str

    @property
    def trials(self) -> Trials:
        """The finished trials, or comparisons with one process."""
        return self.summary.get("trials") or self.summary.get("comparisons", [])


def parse_predictions(lesson: Lesson, answers: Sequence[str]) -> list[str]:
    """Return the choices' words for answers given on the command line.

    Raises:
        WrongUse: Too few, too many, or not among the choices.
    """
    if len(answers) != len(lesson.predict):
        questions = "\n".join(
            f"  {number}. {question.text}  {' | '.join(choice.word for choice in question.choices)}"
            for number, question in enumerate(lesson.predict, 1)
        )
        raise WrongUse(
            f"{lesson.name} asks {len(lesson.predict)} questions, and --predict gives {len(answers)} answers. "
            f"Write one for each:\n{questions}"
        )
    try:
        return [question.parse(answer) for question, answer in zip(lesson.predict, answers, strict=True)]
    except ValueError as error:
        raise WrongUse(f"--predict: {error}") from None


def ask(lesson: Lesson, show: Callable[[int, Question], None], read: Callable[[str], str]) -> list[str]:
    """Ask every question until it is answered with one of its choices.

    Args:
        lesson: The lesson.
        show: Shows a question, given its number from 1.
        read: Reads a line, given the prompt.

    Raises:
        WrongUse: The input ended before the last answer.
    """
    answers: list[str] = []
    for number, question in enumerate(lesson.predict, 1):
        show(number, question)
        while len(answers) < number:
            try:
                answers.append(question.parse(read("your prediction: ")))
            except EOFError:
                raise WrongUse(
                    "the predictions ended before the questions did; give them with --predict"
                ) from None
            except ValueError:
                numbers = " or ".join(str(index) for index in range(1, len(question.choices) + 1))
                read_as = " or ".join(choice.word for choice in question.choices)
                print(f"  write {numbers}, or {read_as}")
    return answers


def run_experiment(lesson: Lesson, ranks: int | None, device: str) -> Run:
    """Run the lesson's experiment as `ddpcall train experiment=…` does, in a process of its own.

    Args:
        lesson: The lesson.
        ranks: How many ranks; None for as many as the experiment asks for.
        device: auto, cpu or cuda.
    """
    directory = Path("runs", "lab", lesson.name, new_run_id()).absolute()
    command = [*train_command(lesson, ranks, device), f"hydra.run.dir={_quote(str(directory))}"]
    done = subprocess.run(
        [sys.executable, "-m", "ddpcall", *command[1:]],
        stdout=subprocess.PIPE,  # the table is shown in the lesson's own way; stderr has the progress bar
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
    )
    return Run(done.returncode, directory, RunDirectory(directory).read_summary(), done.stdout)


def train_command(lesson: Lesson, ranks: int | None = None, device: str = "auto") -> list[str]:
    """Return the command that runs the lesson's experiment without the lesson around it."""
    command = ["ddpcall", "train", f"experiment={lesson.experiment}"]
    command += [f"ranks={ranks}"] if ranks is not None else []
    return command + ([f"device={device}"] if device != "auto" else [])


def _quote(value: str) -> str:
    """Quote a value for Hydra's grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def compare(lesson: Lesson, predicted: Sequence[str], trials: Trials) -> list[Answer]:
    """Put what was measured beside what was predicted."""
    return [
        Answer(question, answer, question.measure(trials))
        for question, answer in zip(lesson.predict, predicted, strict=True)
    ]


def judge_run(run: Run) -> int:
    """Return the lesson's exit code: 1 when the run failed or contradicts what its experiment expects."""
    if run.code == EXIT_WRONG_USE:
        return EXIT_WRONG_USE
    return EXIT_OK if run.code == 0 and run.summary.get("outcome") == "ok" else EXIT_FAILED


def list_contradictions(run: Run) -> list[str]:
    """Return what was measured otherwise than the experiment expects, in words."""
    unmet = [
        f"{trial['wrapper']} × {trial['path']}: {name} is {words['measured']}, expected {words['expected']}"
        for trial in run.summary.get("trials", [])
        for name, words in trial["unmet"].items()
    ]
    return unmet + [
        f"{one['case']} × {one['wrapper']}: {one['found']}, expected {one['expected']}"
        for one in run.summary.get("comparisons", [])
        if not one["expectation_met"]
    ]


def write_record(path: Path, lesson: Lesson, run: Run, answers: Sequence[Answer]) -> None:
    """Write what was predicted and measured, as JSON (docs/teaching.md)."""
    record = {
        "schema": SCHEMA,
        "lesson": lesson.name,
        "experiment": lesson.experiment,
        "outcome": run.summary.get("outcome", "failed"),
        "answers": [
            {
                "question": answer.question.text,
                "choices": [choice.word for choice in answer.question.choices],
                "predicted": answer.predicted,
                "measured": answer.measured,
                "right": answer.is_right,
            }
            for answer in answers
        ],
        "contradictions": list_contradictions(run),
        "environment": run.summary.get("environment"),
        "run_directory": str(run.directory),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
