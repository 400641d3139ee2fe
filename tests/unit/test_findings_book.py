"""One life of a finding: whole sequences of what a rule tells the book, and what is published of it."""

from dataclasses import replace

import pytest

from ddpcall.findings import Finding
from ddpcall.watch.findings_book import FindingsBook, Status

BYPASSED = Finding(
    code="DC101",
    name="gradients-not-synchronized",
    severity="error",
    message="Net is called past its wrapper.",
    file="train.py",
    line=12,
    function="step",
    ranks=(),
    step=2,
    parameters=("w",),
    cause="bypassed",
    fix="Call the wrapper.",
)
LOCATED = replace(BYPASSED, line=7)
DIVERGED = replace(BYPASSED, code="DC201", file="", line=0, ranks=(0, 1))
HARM = ("bypassed", 12)


class Rank:
    """Publishes into a list; other ranks' findings are what a test says."""

    rank = 1
    stops = False

    def __init__(self):
        self.told = []
        self.others = []
        self.ignored = ()
        self.book = FindingsBook(self)

    def wants(self, finding):
        return finding.code not in self.ignored

    def publish(self, finding):
        self.told.append((finding.line, finding.count))

    def republish(self):
        self.told.append("republished")

    def all_findings(self):
        return [*self.others, *self.book.findings()]


@pytest.fixture
def rank():
    return Rank()


def lines(book):
    return [finding.line for finding in book.findings()]


def test_a_reported_finding_is_this_ranks_and_is_counted(rank):
    rank.book.report(BYPASSED)
    rank.book.report(replace(BYPASSED, step=1, parameters=("b",)))
    assert rank.told == [(12, 1), (12, 2)]
    (finding,) = rank.book.findings()
    assert (finding.ranks, finding.step, finding.parameters, finding.count) == ((1,), 1, ("w", "b"), 2)


def test_a_comparison_names_its_ranks_itself(rank):
    rank.book.report(DIVERGED)
    assert rank.book.findings()[0].ranks == (0, 1)


def test_what_is_suspected_is_told_only_when_it_is_confirmed_and_once(rank):
    rank.book.suspect(HARM, BYPASSED)
    rank.book.suspect(HARM, LOCATED)
    assert (rank.told, lines(rank.book), rank.book.explains_divergence()) == ([], [], False)
    rank.book.confirm(HARM)
    rank.book.confirm(HARM)
    rank.book.suspect(HARM, BYPASSED)
    assert (rank.told, rank.book.status(HARM)) == ([(12, 1)], Status.REPORTED)


def test_what_nobody_suspected_cannot_be_confirmed(rank):
    rank.book.confirm(HARM)
    assert (rank.told, rank.book.status(HARM)) == ([], None)


def test_a_finding_that_is_held_for_a_better_line_explains_already_and_is_told_at_that_line(rank):
    rank.book.hold(HARM, BYPASSED)
    assert (rank.told, rank.book.status(HARM), rank.book.explains_divergence()) == ([], Status.CONFIRMED, True)
    rank.book.report(LOCATED, HARM)
    rank.book.release()
    assert rank.told == [(7, 1)]


def test_a_finding_whose_line_never_came_is_released_as_it_is(rank):
    rank.book.hold(HARM, BYPASSED)
    rank.book.suspect("other", LOCATED)
    rank.book.release()
    assert (rank.told, rank.book.status("other")) == ([(12, 1)], Status.SUSPECTED)


def test_what_is_withdrawn_while_it_is_held_is_never_told(rank):
    """Averaged weights are recognized while the line is looked for still: no later report may come through."""
    rank.book.hold(HARM, BYPASSED)
    rank.book.withdraw(HARM)
    rank.book.release()
    rank.book.confirm(HARM)
    rank.book.hold(HARM, BYPASSED)
    rank.book.report(LOCATED, HARM)
    assert (rank.told, lines(rank.book), rank.book.status(HARM)) == ([], [], Status.WITHDRAWN)
    assert rank.book.explains_divergence()


def test_a_finding_is_withdrawn_by_its_harm_though_it_was_told_at_a_better_line(rank):
    rank.book.report(LOCATED, HARM)
    rank.book.withdraw(HARM)
    rank.book.report(LOCATED, HARM)
    assert (rank.told, lines(rank.book)) == ([(7, 1), "republished"], [])


def test_two_harms_on_one_line_are_told_once(rank):
    rank.book.report(BYPASSED, "one model")
    rank.book.report(BYPASSED, "another")
    assert (rank.told, lines(rank.book)) == ([(12, 1), (12, 2)], [12])


def test_only_findings_about_gradients_explain_why_parameters_differ_and_other_ranks_have_some_too(rank):
    rank.book.report(DIVERGED)
    assert not rank.book.explains_divergence()
    rank.others = [BYPASSED]
    assert rank.book.explains_divergence()


def test_what_the_user_ignores_is_not_kept(rank):
    rank.ignored = ("DC101",)
    rank.book.report(BYPASSED)
    assert (rank.told, rank.book.explains_divergence()) == ([], False)


def test_a_forked_child_starts_with_an_empty_book(rank):
    rank.book.report(BYPASSED)
    rank.book.withdraw("nothing")
    rank.book.clear()
    assert rank.book.findings() == []
