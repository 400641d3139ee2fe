"""Lessons: Markdown files with questions, an experiment, and how its measured verdicts answer them.

A lesson is the file in `lessons/`: its title, the experiment's name, and sections. In `Predict` every question
carries, in a comment, what answers it: a verdict's name and the cell it is read from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ddpcall.teach.question import Answer, NotSeen, Question
from ddpcall.teach.source_code import Source

Trials = list[dict[str, Any]]
_FILES = Path(__file__).parent / "lessons"
_QUESTION = re.compile(r"^(\d+)\. (.*?)<!-- (.*?) -->\n((?: {4}[^\n]*\n?)+)", re.MULTILINE | re.DOTALL)
_CHOICE = re.compile(r"\* `(\w+)`: ([^*]*)")
_SOURCE = re.compile(r"\* `([^`]+)\.py`,\s+`([^`]+)`:\s+([^*]*)")


@dataclass(frozen=True, kw_only=True)
class LessonQuestion(Question):
    """Something to predict; its judge takes a run's trials, as they stand in summary.json.

    Attributes:
        choices: The possible answers: each one's word, and what it means.
    """

    choices: dict[str, str]

    def parse(self, given: str) -> str:
        """Return the choice's word for an answer: the word itself or its number, from 1.

        Raises:
            ValueError: It is neither.
        """
        words = list(self.choices)
        word = given.strip().lower()
        if word.isdigit() and 1 <= int(word) <= len(words):
            return words[int(word) - 1]
        if word in words:
            return word
        raise ValueError(f"{given!r} is no answer to “{self.text}”; write one of: {', '.join(words)}")


@dataclass(frozen=True)
class Lesson:
    """One lesson: predict, run, explain.

    Attributes:
        number: Its place in the course, from 1.
        name: Its name on the command line.
        title: What it is about.
        experiment: The file in conf/experiment that is run.
        question: What it asks, in a sentence or two.
        sections: The Markdown of Predict, Look at, Why, Sources, Go further and Discuss.
        predict: What the student predicts.
        sources: Where the behavior stands in the source.
    """

    number: int
    name: str
    title: str
    experiment: str
    question: str
    sections: dict[str, str]
    predict: tuple[LessonQuestion, ...]
    sources: tuple[Source, ...]

    @classmethod
    def read(cls, path: Path) -> Lesson:
        """Read a lesson's file."""
        number, _, name = path.stem.partition("_")
        opening, *parts = path.read_text().split("\n## ")
        heading, experiment, question = opening.split("\n", 2)
        sections = {title: text.strip() + "\n" for title, _, text in (part.partition("\n") for part in parts)}
        sources = (
            Source(file.replace("/", "."), name, " ".join(says.split()))
            for file, name, says in _SOURCE.findall(sections["Sources"])
        )
        return cls(
            int(number),
            name,
            heading.partition(". ")[2],
            experiment.removeprefix("<!-- experiment: ").removesuffix(" -->"),
            " ".join(question.split()),
            sections,
            tuple(_parse_questions(sections["Predict"])),
            tuple(sources),
        )


def _parse_questions(text: str) -> Iterator[LessonQuestion]:
    for key, asked, measured, choices in _QUESTION.findall(text):
        yield LessonQuestion(
            key=key,
            text=" ".join(asked.split()),
            judge=partial(measure, measured),
            choices={word: " ".join(meaning.split()) for word, meaning in _CHOICE.findall(choices)},
        )


def measure(measured: str, trials: Trials) -> Answer:
    """Answer a question from a run's trials.

    Args:
        measured: `name: axis=value …`. The name is a verdict's, or `found` (by a comparison with one process),
            `trains` (or crashed), `replicas` (same or different), or `accuracy` of two cells (`a | b`): whose
            worst rank is better, first or second, or `equal` within one percent.
        trials: Those of the run.

    Raises:
        NotSeen: There is no such trial: the run was cut short, or the lesson names what its experiment has not.
    """
    name, _, cells = measured.partition(": ")
    found = [find_trial(trials, dict(pair.split("=") for pair in cell.split())) for cell in cells.split("|")]
    consequences: list[Any] = [trial.get("consequence") for trial in found]
    match name:
        case "found":
            return Answer(found[0]["found"])
        case "trains":
            return Answer("trains" if found[0]["error"] is None else "crashed")
        case "replicas" | "accuracy" if None in consequences:
            return Answer("none")
        case "replicas":
            return Answer("same" if consequences[0]["spread"] == 0 else "different")
        case "accuracy":
            worst = [min(consequence["test_accuracy"]) for consequence in consequences]
            better = "first" if worst[0] > worst[1] else "second"
            return Answer("equal" if abs(worst[0] - worst[1]) <= 0.01 else better)
        case _:
            return Answer(found[0]["verdicts"][name])


def find_trial(trials: Trials, cell: dict[str, str]) -> dict[str, Any]:
    """Return the first trial, or comparison with one process, with these values on its axes.

    Args:
        trials: Those of a run.
        cell: Axes and their values; a model may be named by the end of its import path.

    Raises:
        NotSeen: There is none.
    """
    for trial in trials:
        if all(trial[axis] == value or trial[axis].endswith(f".{value}") for axis, value in cell.items()):
            return trial
    raise NotSeen(f"no trial has {cell}")


LESSONS = tuple(Lesson.read(path) for path in sorted(_FILES.glob("*.md")))
