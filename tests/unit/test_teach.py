"""What lessons, claims and exercises share: answers, the table of results, and scripts cut out of modules."""

import io

import pytest
from rich.console import Console

from ddpcall import cli
from ddpcall.findings import CATALOGUE
from ddpcall.teach import show
from ddpcall.teach.claims import CLAIMS
from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.grade.criteria import Criterion, answer_all
from ddpcall.teach.lesson import LESSONS
from ddpcall.teach.question import MET, MISSED, SKIPPED, TRUE, Answer, NotSeen, Question, Result, answer, find
from ddpcall.teach.source_code import cut_out


def judge(observed: dict) -> Answer:
    if not observed:
        raise NotSeen("Nothing was seen.")
    return Answer(observed["word"], "Measured.")


QUESTION = Question(key="one", text="Is it so?", judge=judge)


def test_an_answer_is_compared_with_what_was_expected():
    result = answer(QUESTION, {"word": TRUE}, TRUE)
    assert (result.measured, result.sentence, result.is_as_expected, result.failed) == (
        TRUE,
        "Measured.",
        True,
        False,
    )
    assert not answer(QUESTION, {"word": TRUE}, "false").is_as_expected


@pytest.mark.parametrize(
    ("observed", "sentence"),
    [({}, "Nothing was seen."), ({"other": 1}, "cannot be read (KeyError"), ([1], "cannot be read (TypeError")],
)
def test_what_was_not_seen_or_cannot_be_read_is_no_answer(observed, sentence):
    result = answer(QUESTION, observed, SKIPPED)
    assert (result.measured, result.failed) == (SKIPPED, True)
    assert sentence in result.sentence


def test_a_fault_of_the_judges_own_is_raised():
    broken = Question(key="one", text="?", judge=lambda observed: observed.nothing)
    with pytest.raises(AttributeError, match="nothing"):
        answer(broken, {}, TRUE)


def test_points_count_only_with_the_criteria_that_they_require():
    def criterion(key: str, word: str, *requires: str) -> Criterion:
        return Criterion(key=key, text=key, points=10, judge=lambda run: Answer(word), requires=requires)

    criteria = [criterion("a", MET), criterion("b", MISSED, "a"), criterion("c", MET, "a", "b")]
    results = answer_all(criteria, None)  # pyright: ignore[reportArgumentType] (these judges look at nothing)
    assert [(result.points, result.withheld_by) for result in results] == [(10, ()), (0, ()), (0, ("b",))]


def test_lessons_and_exercises_are_found_by_name_and_lessons_by_number():
    assert find("arming", LESSONS, "lesson") is find("3", LESSONS, "lesson")
    assert find("early_step", EXERCISES, "exercise").name == "early_step"
    with pytest.raises(ValueError, match="no lesson '0'; write one of: hooks_and_call"):
        find("0", LESSONS, "lesson")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_of_results_cuts_nothing_and_breaks_no_word(width):
    sentence = "the keyword gives “TypeError: trace() got an unexpected keyword argument 'use_linear2'”, " * 3
    results = [Result(claim, claim.first_look, claim.first_look, sentence) for claim in CLAIMS]
    shown = io.StringIO()
    show.show_claim_results(Console(file=shown, width=width), results, "torch")
    words = set(shown.getvalue().split())
    for result in results:
        expected = f"{result.question.key} {result.question.text} {result.sentence}".replace("`", "").split()
        assert [word for word in expected if word not in words] == []
    assert max(map(len, shown.getvalue().splitlines())) <= width


def test_a_cut_holds_what_is_reached_with_its_imports_and_no_more():
    plain = "import os, sys\n\nA, B = 1, 2\n\n\ndef help():\n    return A\n\n\n"
    plain += "def main():\n    return help() + sys.maxsize\n"
    own = "from plain import *\n\n\ndef help():\n    return more()\n\n\n"
    own += "def more():\n    return 3\n\n\ndef unused():\n    ...\n"
    assert cut_out([plain, own], ["main"], ignored_module="plain") == (
        "import sys\n\n\ndef help():\n    return more()\n\n\ndef more():\n    return 3\n\n\n"
        "def main():\n    return help() + sys.maxsize\n"
    )


def test_explain_without_a_code_lists_every_finding_and_no_markdown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    cli.main(["explain"])
    listed = capsys.readouterr().out
    assert all(code in listed and rule.name in listed for code, rule in CATALOGUE.items())
    assert not {"|", "#", "`"} & set(listed)
    assert max(map(len, listed.splitlines())) <= 80
