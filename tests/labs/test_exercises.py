"""Every exercise: broken as handed out, full marks when mended, and no full marks for those who cheat."""

import ast

import pytest

from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.question import MET
from tests.labs.solutions import CHEATS, SOLUTIONS, broken, cheating, mended

NAMES = [exercise.name for exercise in EXERCISES]
# What each broken script must be told, apart from what the watch finds.
BROKEN = {
    "module_bypass": {"hook", "parallel", "synchronized", "findings"},
    "custom_method": {"parallel", "synchronized", "findings"},
    "no_sync_window": {"synchronized", "findings"},
    "late_unfreeze": {"parallel", "synchronized", "findings"},
    "rank0_eval": {"train_mode", "alike", "findings"},
    "early_step": {"synchronized", "findings"},
    "load_on_rank0": {"pretrained", "synchronized", "findings"},
    "shared_data": {"covers", "parallel", "findings"},
    "one_process": {"one_process"},  # the watch has a note, which costs nothing
}
CODES = {
    "module_bypass": "DC101",
    "custom_method": "DC101",
    "no_sync_window": "DC104",
    "late_unfreeze": "DC102",
    "rank0_eval": "DC204",
    "early_step": "DC105",
    "load_on_rank0": "DC202",
    "shared_data": "DC206",
    "one_process": "DC110",
}


def missed(report) -> set[str]:
    return {result.question.key for result in report.results if result.measured != MET}


def test_every_exercise_has_a_solution_and_two_cheats():
    assert set(SOLUTIONS) == set(NAMES)
    for name in NAMES:
        assert sum(cheat.exercise == name for cheat in CHEATS.values()) >= 2


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_the_criteria_are_worth_100_points_and_come_after_what_they_require(exercise):
    keys = [criterion.key for criterion in exercise.criteria]
    assert sum(criterion.points for criterion in exercise.criteria) == 100
    assert len(set(keys)) == len(keys)
    for criterion in exercise.criteria:
        assert set(criterion.requires) <= set(keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_script_does_not_tell_what_is_wrong_with_it(name):
    code = ast.unparse(ast.parse(broken(name)))  # without comments
    assert "DC1" not in broken(name)
    assert "DC2" not in broken(name)
    assert "ddpcall" not in code


@pytest.mark.parametrize("name", NAMES)
def test_the_broken_script_misses_what_it_is_about(name, grade_text):
    report = grade_text(name, broken(name))
    assert missed(report) == BROKEN[name]
    assert report.points <= 70
    assert not report.is_full
    assert CODES[name] in {finding["code"] for finding in report.run.findings}


@pytest.mark.parametrize("name", NAMES)
def test_the_mended_script_gets_full_marks(name, grade_text):
    report = grade_text(name, mended(name))
    assert missed(report) == set()
    assert (report.points, report.of, report.is_full) == (100, 100, True)


@pytest.mark.parametrize("label", CHEATS)
def test_a_cheat_loses_points(label, grade_text):
    cheat = CHEATS[label]
    report = grade_text(cheat.exercise, cheating(cheat))
    assert set(cheat.loses) <= missed(report)
    assert not report.is_full
    assert report.points <= 75


def test_with_four_ranks_fewer_steps_are_asked_for(grade_text):
    assert grade_text("module_bypass", mended("module_bypass"), ranks=4).points == 100


def test_a_gradient_that_was_clipped_is_still_the_mean(grade_text):
    clipped = mended("module_bypass").replace(
        "            optimizer.step()\n",
        "            nn.utils.clip_grad_norm_(model.parameters(), 0.1)\n            optimizer.step()\n",
    )
    assert "clip_grad" in clipped
    assert missed(grade_text("module_bypass", clipped)) == set()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("this is no Python", "SyntaxError"),
        ("raise ValueError('on purpose')", "raised ValueError: on purpose (exit code 1)"),
        ("import sys; sys.exit('no more')", "left with an error (exit code 1)"),
        ("import os; os.kill(os.getpid(), 9)", "never came to the script's end"),
        ("", None),
    ],
    ids=["no Python", "raises", "exits", "is killed", "does nothing"],
)
def test_a_script_that_trains_nothing_gets_nothing_but_its_end(text, sentence, grade_text):
    report = grade_text("module_bypass", text)
    runs = next(result for result in report.results if result.question.key == "runs")
    assert report.points == (0 if sentence else 5)
    assert (runs.measured == MET) is (sentence is None)
    assert (sentence or "came to its end on 2 ranks") in runs.sentence
