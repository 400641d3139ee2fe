"""DC502 and DC503 from positions alone: ranks that can never meet, and ranks that are only slow."""

from dataclasses import replace
from typing import Any

import pytest

from ddpcall.findings import Severity
from ddpcall.taps import CallSite
from ddpcall.watch.rules.control import Silence, judge_ends, missing
from ddpcall.watch.sensors.positions import ENDED, FAILED, LEFT, Position

BACKWARD = Position(
    forwards=5,
    backwards=5,
    steps=4,
    silent_s=90.0,
    call="backward",
    operation="all_reduce",
    sequence=18,
    group="0",
    is_of_all=True,
    site=CallSite("train.py", 31, "main"),
)
BARRIER = replace(
    BACKWARD, backwards=4, call="barrier", operation="barrier", site=CallSite("train.py", 44, "main")
)
RUNNING = replace(BARRIER, call="", operation="", sequence=0, group="", is_of_all=False)
OF_SOME = replace(BARRIER, group="1", is_of_all=False, sequence=3)


def judge(*positions, rank=0, num_ranks=None):
    look = Silence(rank, dict(enumerate(positions)), 60.0)
    finding: Any = look.judge(num_ranks or len(positions))
    return finding


@pytest.mark.parametrize("reader", [0, 1])
def test_who_skipped_a_backward_is_named_at_that_backward_whoever_looks(reader):
    finding = judge(BACKWARD, BARRIER, rank=reader)
    assert (finding.code, finding.severity, finding.line, finding.ranks) == ("DC503", Severity.ERROR, 31, (0, 1))
    assert finding.message.startswith(
        "Rank 0 has waited 90 s in `backward` here, and rank 1 in `barrier` (train.py:44)"
    )
    assert (
        "Rank 1 skipped the backward here. Rank 0: 5 forwards, 5 backwards, 4 steps; rank 1: 5 f"
        in finding.message
    )


def test_a_rank_without_that_forward_is_not_said_to_have_skipped_a_backward():
    assert "skipped" not in judge(BACKWARD, replace(BARRIER, forwards=4)).message


def test_a_rank_whose_script_is_over_is_never_there():
    finding = judge(BACKWARD, replace(RUNNING, state=ENDED))
    assert (finding.line, finding.severity) == (31, Severity.ERROR)
    assert "the script of rank 1 is over" in finding.message


def test_a_rank_that_is_past_is_a_warning():
    finding = judge(BACKWARD, replace(RUNNING, steps=6))
    assert (finding.severity, finding.line) == (Severity.WARNING, 31)
    assert "rank 1 is past it" in finding.message


SLOW = {
    "a rank that is slow": (BACKWARD, RUNNING),
    "a rank that reads data": (BACKWARD, replace(RUNNING, call="__next__")),
    "a rank in a collective for a moment": (BACKWARD, replace(BARRIER, silent_s=2.0)),
    "all in the same collective": (BACKWARD, BACKWARD),
    "two wait for a slow third, each in another group": (replace(BACKWARD, group="1"), OF_SOME, RUNNING),
    "a group without the rank that is over": (OF_SOME, replace(RUNNING, state=ENDED), RUNNING),
    "a rank whose watch ended before its script": (BACKWARD, replace(RUNNING, state=LEFT)),
    "a rank that failed": (BACKWARD, replace(RUNNING, state=FAILED)),
    "a send": (BACKWARD, replace(BARRIER, call="send", operation="send", sequence=0)),
    "a rank that trains a model of its own": (replace(BACKWARD, forwards=0), replace(RUNNING, steps=50)),
    "this rank goes on": (replace(BACKWARD, silent_s=1.0), BARRIER),
}


@pytest.mark.parametrize("positions", SLOW.values(), ids=SLOW)
def test_waiting_is_no_finding(positions):
    assert judge(*positions) is None


def test_of_ranks_that_were_not_heard_nothing_is_known():
    assert judge(BACKWARD, OF_SOME, num_ranks=3) is None
    assert missing([0, 2], 4) == "\n  nothing was heard of ranks 1, 3"
    assert missing([0, 1], 2) == ""


def test_all_ranks_are_described():
    text = Silence(0, {0: BACKWARD, 1: RUNNING, 2: replace(RUNNING, state=ENDED)}, 60.0).describe().splitlines()
    assert text[0].startswith("  rank 0: waits in `backward` at train.py:31, 90 s after its last progress, 5 forw")
    assert text[1].startswith("  rank 1: runs at train.py:44")
    assert text[2].startswith("  rank 2: its script has ended, after 5 forwards")


def test_a_collective_that_failed_names_the_rank_whose_script_was_over_earlier():
    over = replace(RUNNING, state=ENDED, forwards=4)
    finding: Any = judge_ends(BACKWARD, {1: over}, BACKWARD.site)
    assert (finding.code, finding.line, finding.ranks) == ("DC502", 31, (1,))
    assert "its script was over after 4 forwards, 4 backwards, 4 steps" in finding.message


@pytest.mark.parametrize(
    "other",
    [replace(BACKWARD, state=ENDED), replace(BACKWARD, state=FAILED, steps=2), replace(RUNNING, forwards=4)],
)
def test_a_collective_that_failed_for_another_reason_is_left_alone(other):
    assert judge_ends(BACKWARD, {1: other}, BACKWARD.site) is None
