"""DC110: what becomes of numbers of targets, over whole sequences of measured steps."""

from typing import Any

import pytest

from ddpcall.mixing.record import RankSketches
from ddpcall.taps import CallSite
from ddpcall.watch.rules.targets import TargetsRule

SITE = CallSite("train.py", 7, "step")
PLACE = "train.py:7"


class _Mixing:
    def __init__(self, shape):
        self.shape = shape


def judge(steps, shape="averaged", factors=None, in_one=1):
    """Return the findings about steps, each given as the targets of all ranks."""
    found: list[Any] = []
    rule = TargetsRule(found.append, {PLACE: SITE}.__getitem__)
    for number, counts in enumerate(steps, 1):
        means = factors or (1.0,) * len(counts)
        records = [
            RankSketches(rank, targets=((PLACE, count, means[rank], in_one),)) for rank, count in enumerate(counts)
        ]
        mixing: Any = _Mixing(shape)
        rule.judge(number, records, mixing)
    rule.close()
    return found


def test_numbers_that_differ_in_every_step_are_one_note_with_both_weights():
    [note] = judge([(90, 10)] * 12)
    assert (note.code, note.severity, note.line, note.step, note.ranks) == ("DC110", "note", 7, 1, (0, 1))
    assert "each rank weighs 0.50; its targets are 0.90 and 0.10 of the batch (90 and 10 in" in note.message


def test_of_many_ranks_the_fewest_and_the_most_are_told():
    [note] = judge([(10, 20, 30, 20, 20)] * 2)
    assert (
        "each rank weighs 0.20; its targets are from 0.10 to 0.30 of the batch (from 10 to 30 in" in note.message
    )


@pytest.mark.parametrize(
    "steps",
    [
        [(100, 95)] * 8,
        [(8, 8), (8, 8), (5, 4)] * 4,
        [(8, 8), (5, 4)],
        [(90, 10)],
        [(8, 0)] * 8,
    ],
    ids=["a twentieth", "the last step of an epoch", "every other step", "one step", "no target at all"],
)
def test_what_differs_little_or_seldom_is_no_note(steps):
    assert judge(steps) == []


@pytest.mark.parametrize("shape", ["local", "weighted", "different", "unidentifiable"])
def test_gradients_that_are_not_averaged_evenly_are_another_matter(shape):
    assert judge([(90, 10)] * 8, shape=shape) == []


def test_a_loss_that_is_multiplied_by_its_own_number_of_targets_is_right():
    assert judge([(90, 10)] * 8, factors=(1.8, 0.2)) == []


def test_several_means_for_one_backward_weigh_sequences_and_no_targets():
    assert judge([(90, 10)] * 8, in_one=4) == []


def test_a_line_that_some_ranks_never_reach_is_not_compared():
    found: list[Any] = []
    rule = TargetsRule(found.append, {PLACE: SITE}.__getitem__)
    mixing: Any = _Mixing("averaged")
    for step in range(1, 9):
        rule.judge(step, [RankSketches(0, targets=((PLACE, 90, 1.0, 1),)), RankSketches(1)], mixing)
    rule.close()
    assert found == []
