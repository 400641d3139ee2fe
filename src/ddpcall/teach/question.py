"""One kind of question and one kind of result: claims, lessons and exercises all predict, run and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class Outcome(StrEnum):
    """What became of a claim or a criterion. `skipped`: it could not be answered, and the sentence says why."""

    TRUE = "true"
    FALSE = "false"
    DEPENDS = "depends"
    SKIPPED = "skipped"
    MET = "met"
    MISSED = "missed"


TRUE, FALSE, DEPENDS, SKIPPED, MET, MISSED = Outcome


class Answer(NamedTuple):
    """What a run says to a question: one word, and a sentence with what was measured."""

    word: str
    sentence: str = ""


class NotSeen(LookupError):
    """What an answer would rest on was not observed, so there is no answer."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing that a run answers.

    Attributes:
        key: Its name: a claim's id, a criterion's key, the number of a lesson's question.
        text: What is asked, claimed or demanded.
        judge: A pure function from what a run observed to the answer.
    """

    key: str
    text: str
    judge: Callable[[Any], Answer]


@dataclass(frozen=True)
class Result:
    """One question, predicted and measured.

    Attributes:
        question: The question.
        expected: What was predicted: a first look at a claim, a student's word, `met` for a criterion.
        measured: The word that the run gave.
        sentence: What the run measured, or why there is no answer.
        failed: There is no answer: the run failed, or what the answer rests on was not seen.
        withheld_by: Titles of the criteria that keep its points back although it is met.
        warnings: What torch warned of meanwhile, as `Category: first sentence`, each once.
    """

    question: Any
    expected: str
    measured: str
    sentence: str = ""
    failed: bool = False
    withheld_by: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_as_expected(self) -> bool:
        """Whether prediction and measurement agree."""
        return self.measured == self.expected

    @property
    def points(self) -> int:
        """What a criterion earned."""
        return self.question.points if self.measured == MET and not self.withheld_by else 0


def answer(question: Question, observed: Any, expected: str) -> Result:
    """Have one question answered by what a run observed. Observations may come from a process we do not trust."""
    try:
        word, sentence = question.judge(observed)
    except NotSeen as absence:
        return Result(question, expected, SKIPPED, str(absence), failed=True)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        sentence = f"What was observed cannot be read ({type(error).__name__}: {error})."
        return Result(question, expected, SKIPPED, sentence, failed=True)
    return Result(question, expected, word, sentence)


def find(name: str, subjects: Iterable[Any], kind: str) -> Any:
    """Return a lesson or an exercise by its name or, where it has one, its number.

    Raises:
        ValueError: There is none such; the message lists those that are.
    """
    subjects = list(subjects)
    for subject in subjects:
        if name in (subject.name, str(getattr(subject, "number", subject.name))):
            return subject
    raise ValueError(f"there is no {kind} {name!r}; write one of: {', '.join(one.name for one in subjects)}")
