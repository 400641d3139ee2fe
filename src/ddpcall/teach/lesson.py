"""What a lesson is: questions with choices, an experiment, and how its measured verdicts answer them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddpcall.teach.sources import Source

Trials = list[dict[str, Any]]
Measure = Callable[[Trials], str]


@dataclass(frozen=True)
class Choice:
    """One answer: the word it is given by, and what it means."""

    word: str
    meaning: str


@dataclass(frozen=True)
class Question:
    """Something to predict.

    Attributes:
        text: The question.
        choices: The possible answers.
        measure: From a run's trials, as they stand in summary.json, to the word of the answer measured.
    """

    text: str
    choices: tuple[Choice, ...]
    measure: Measure

    def parse(self, answer: str) -> str:
        """Return the choice's word for an answer: the word itself or its number, from 1.

        Raises:
            ValueError: It is neither.
        """
        words = [choice.word for choice in self.choices]
        given = answer.strip().lower()
        if given.isdigit() and 1 <= int(given) <= len(words):
            return words[int(given) - 1]
        if given in words:
            return given
        raise ValueError(f"{answer!r} is no answer to “{self.text}”; write one of: {', '.join(words)}")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One lesson: predict, run, explain.

    Attributes:
        name: Its name on the command line.
        title: What it is about.
        experiment: The file in conf/experiment that is run.
        question: What it asks, in a sentence or two.
        predict: What the student predicts.
        columns: Verdicts shown as evidence, besides `accuracy`, `distance` and `loss`; none for comparisons with
            one process, of which everything is shown.
        look: What to look at in the evidence.
        why: The explanation, in paragraphs.
        sources: Where the behaviour stands in the source.
        further: Commands to go on with, each with a word of what for.
        discuss: Questions without a measured answer.
    """

    name: str
    title: str
    experiment: str
    question: str
    predict: tuple[Question, ...]
    columns: tuple[str, ...]
    look: tuple[str, ...]
    why: tuple[str, ...]
    sources: tuple[Source, ...]
    further: tuple[tuple[str, str], ...]
    discuss: tuple[str, ...]


def verdict(name: str, **cell: str) -> Measure:
    """Measure one verdict of the one trial that a cell's axes name.

    Args:
        name: The verdict.
        **cell: Axes and their values; a model may be named by the end of its import path.
    """

    def measure(trials: Trials) -> str:
        return str(find_trial(trials, **cell)["verdicts"][name])

    return measure


def found(**comparison: str) -> Measure:
    """Measure what one comparison with one process found: a cause, such as `same` or `weighted`.

    Args:
        **comparison: Its `case` and `wrapper`.
    """

    def measure(trials: Trials) -> str:
        return str(find_trial(trials, **comparison)["found"])

    return measure


def trains(**cell: str) -> Measure:
    """Measure whether a trial ran to its end: `trains` or `crashed`."""

    def measure(trials: Trials) -> str:
        return "crashed" if find_trial(trials, **cell)["error"] is not None else "trains"

    return measure


def compare_replicas(**cell: str) -> Measure:
    """Measure whether all ranks of a trial end with the same parameters: `same` or `different`."""

    def measure(trials: Trials) -> str:
        consequence = find_trial(trials, **cell)["consequence"]
        return "none" if consequence is None else "same" if consequence["spread"] == 0 else "different"

    return measure


def compare_accuracy(first: dict[str, str], second: dict[str, str], margin: float = 0.01) -> Measure:
    """Measure whose worst rank is the better: `first`, `second`, or `equal` within a margin of test accuracy."""

    def measure(trials: Trials) -> str:
        worst = [_worst_accuracy(find_trial(trials, **cell)) for cell in (first, second)]
        if None in worst:
            return "none"
        difference = (worst[0] or 0.0) - (worst[1] or 0.0)
        return "equal" if abs(difference) <= margin else "first" if difference > 0 else "second"

    return measure


def _worst_accuracy(trial: dict[str, Any]) -> float | None:
    consequence = trial["consequence"]
    accuracies = consequence and consequence["test_accuracy"]
    return min(accuracies) if accuracies else None


def find_trial(trials: Trials, **cell: str) -> dict[str, Any]:
    """Return the first trial, or comparison with one process, with these values on its axes.

    Raises:
        LookupError: There is none: the run was cut short, or the lesson names what its experiment has not.
    """
    for trial in trials:
        if all(trial[axis] == value or trial[axis].endswith(f".{value}") for axis, value in cell.items()):
            return trial
    raise LookupError(f"no trial has {cell}")
