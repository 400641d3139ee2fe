"""Every lesson: run as a user runs it, compared with its page; and the questions asked at a terminal."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpcall.lab.errors import WrongUse
from ddpcall.teach import command, pages
from ddpcall.teach import run as lesson_run
from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.lesson import LESSONS, LessonQuestion, find_trial
from ddpcall.teach.question import SKIPPED, Answer, find
from ddpcall.teach.run import LessonRun
from ddpcall.teach.source_code import Source, locate
from tests.labs.test_grade import lab
from tests.ranks.lab_process import ROOT, clean_environment

NAMES = [lesson.name for lesson in LESSONS]
TALK_SECONDS = 240  # of silence, on a busy machine
DOCS = ROOT / "docs" / "labs"
# What is true, stated apart from catalogue and experiments.
MEASURED = {
    "hooks_and_call": ["skipped", "fired", "crashed"],
    "who_synchronizes": ["synced", "synced", "local", "local"],
    "arming": ["synced", "local", "synced", "local"],
    "replicas_parting": ["different", "first"],
    "batchnorm_dropout": ["differ", "same", "identical", "none"],
    "compiled_code": ["eager", "compiled", "skipped", "local"],
    "sharding": ["crashed", "none", "sharded"],
    "accelerate_unwrap": ["local", "bfloat16", "float32"],
    "one_rank_apart": ["synced", "same", "differs"],
    "mixing": ["synced", "partly_local", "scaled", "groups"],
    "one_process": ["weighted", "scaled", "same", "loss"],
}


def find_lesson(name: str) -> Any:
    return find(name, LESSONS, "lesson")


def wrong(question: LessonQuestion, measured: str) -> str:
    return next(word for word in question.choices if word != measured)


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_compares_the_prediction_with_what_it_measures_and_its_page_says_the_same(name, tmp_path):
    lesson = find_lesson(name)
    # The first prediction is wrong: a lesson, no failure.
    first, *others = MEASURED[name]
    predicted = [wrong(lesson.predict[0], first), *others]
    done = lab(
        tmp_path, "run", str(lesson.number), "--device", "cpu", "--json", "told.json", "--predict", *predicted
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    assert [answer["measured"] for answer in told["answers"]] == MEASURED[name]
    assert [answer["predicted"] for answer in told["answers"]] == predicted
    assert [answer["right"] for answer in told["answers"]] == [False, *(True for _ in others)]
    assert f"{len(others)} of {len(predicted)} as measured" in done.stdout
    assert (told["outcome"], told["contradictions"]) == ("ok", [])
    summary = json.loads(Path(told["run_directory"], "summary.json").read_text())
    page = (DOCS / pages.page_name(lesson)).read_text()
    fresh = pages.render_page(lesson, summary)
    assert pages.strip_captions(page) == pages.strip_captions(fresh), "stale: write `make lessons`"
    for source in lesson.sources:  # with the line of the version installed
        assert f"{source.file}:{locate(source)[1]} {source.name}" in " ".join(done.stdout.split())


def test_the_index_is_written_from_the_catalogue():
    assert (DOCS / "index.md").read_text() == pages.render_index()
    assert {path.name for path in DOCS.iterdir()} == {"index.md", *map(pages.page_name, LESSONS)}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_lesson_refers_to_is_there(name):
    lesson = find_lesson(name)
    assert (ROOT / "conf" / "experiment" / f"{lesson.experiment}.yaml").exists()
    assert lesson.number == NAMES.index(name) + 1
    assert [question.key for question in lesson.predict] == [str(n + 1) for n in range(len(MEASURED[name]))]
    assert all(word in question.choices for question, word in zip(lesson.predict, MEASURED[name], strict=True))
    assert lesson.sources
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").iterdir()}
    exercises = {exercise.name for exercise in EXERCISES}
    text = lesson.sections["Go further"]
    assert set(re.findall(r"experiment=(\w+)", text)) <= experiments
    assert set(re.findall(r"lab start (\w+)", text)) <= exercises
    assert set(re.findall(r"lab run (\w+)", text)) <= set(NAMES)
    for source in lesson.sources:
        path, number = locate(source)
        assert path.as_posix().endswith(source.file)
        line = path.read_text().splitlines()[number - 1 :]
        assert any(source.name.rsplit(".", 1)[-1] in text for text in line[:3])  # decorators stand above


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_hints_name_lessons_that_are_there(exercise):
    assert set(re.findall(r"lab run (\w+)", exercise.hint)) <= set(NAMES)


def test_a_source_that_this_version_lacks_raises():
    with pytest.raises(AttributeError, match="no_such_thing"):
        locate(Source("torch.nn.modules.module", "Module.no_such_thing", "nothing"))


def test_the_list_names_every_lesson_in_order_and_every_exercise(tmp_path):
    bare, listed = lab(tmp_path), lab(tmp_path, "list")
    assert (bare.returncode, bare.stdout) == (0, listed.stdout)
    places = [bare.stdout.index(f"{number} {name}") for number, name in enumerate(NAMES, 1)]
    places += [bare.stdout.index(f"\n{exercise.name}") for exercise in EXERCISES]
    assert places == sorted(places)


INTERRUPT = "interrupt"


def talk(directory: Path, arguments: list[str], answers: list[str]) -> tuple[int, str]:
    """Run the command at a terminal, and answer each prompt; returns exit code and what the terminal showed."""
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpcall", "lab", *arguments],
        cwd=directory,
        env=clean_environment(TERM="xterm"),
        stdin=its_end,
        stdout=its_end,
        stderr=its_end,
        start_new_session=True,
    )
    os.close(its_end)
    shown, prompts = b"", 0
    while select.select([terminal], [], [], TALK_SECONDS)[0]:
        try:
            shown += os.read(terminal, 65_536)
        except OSError:  # the other end is closed
            break
        if answers and shown.count(b"your prediction: ") > prompts:
            prompts += 1
            answer = answers.pop(0)
            if answer == INTERRUPT:
                process.send_signal(signal.SIGINT)
            else:
                os.write(terminal, answer.encode())
    else:
        process.kill()
    os.close(terminal)
    return process.wait(), shown.decode()


def test_at_a_terminal_the_questions_are_asked_until_they_are_answered(tmp_path):
    code, shown = talk(tmp_path, ["run", "hooks_and_call"], ["maybe\n", "2\n", "FIRED\n", "crashed\n"])
    assert code == 0, shown
    assert "write 1 or 2, or fired or skipped" in shown
    assert "3 of 3 as measured" in shown
    assert shown.index("the hooks registered on") < shown.index("── measured")  # asked before it was run


def test_an_end_of_input_is_wrong_use_and_an_interrupt_is_not_a_traceback(tmp_path):
    code, shown = talk(tmp_path, ["run", "hooks_and_call"], ["2\n", "\x04"])
    assert code == 2
    assert "ended before the questions did" in shown
    code, shown = talk(tmp_path, ["run", "hooks_and_call"], [INTERRUPT])
    assert code == 130
    assert "Traceback" not in shown


def test_a_measurement_that_contradicts_the_lesson_exits_with_1(tmp_path, monkeypatch, capsys):
    def contrary(*_: Any) -> list[str]:
        return [
            "ddpcall", "train", "experiment=hooks_bypass", "grid.model=[ddpcall.lab.models.Mlp]", "steps=2",
            "expect=[{path: call, hooks_wrapped: skipped}]",
        ]  # fmt: skip

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lesson_run, "train_command", contrary)
    answers = ["skipped", "fired", "crashed"]
    assert command.main(["run", "hooks_and_call", "--json", "told.json", "--predict", *answers]) == 1
    assert "none × call: hooks_wrapped is fired, expected skipped" in capsys.readouterr().out
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["outcome"] == "expectations failed"
    assert told["contradictions"] == ["none × call: hooks_wrapped is fired, expected skipped"]


def test_an_experiment_that_does_not_run_says_why(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lesson_run, "train_command", lambda *_: ["ddpcall", "train", "experiment=nothing"])
    assert command.main(["run", "hooks_and_call", "--predict", "skipped", "fired", "crashed"]) == 2
    said = capfd.readouterr().err
    assert "the experiment did not run" in said
    assert "experiment/nothing" in said


@pytest.mark.parametrize(
    ("code", "outcome", "expected"),
    [(0, "ok", 0), (1, "expectations failed", 1), (1, "hung", 1), (2, "", 2), (0, "running", 1), (-9, "", 1)],
)
def test_the_exit_code_follows_the_run(code, outcome, expected):
    assert LessonRun(code, Path(), {"outcome": outcome}).exit_code == expected


def trial(**changed: Any) -> dict[str, Any]:
    cell = {
        "wrapper": "ddp",
        "path": "call",
        "window": "plain",
        "hooks": "early",
        "mode": "train",
        "model": "a.b.Mlp",
    }
    verdicts = {"gradients": "synced"}
    consequence = {"spread": 0.0, "test_accuracy": [0.9, 0.9]}
    return {**cell, "verdicts": verdicts, "consequence": consequence, "unmet": {}, **changed}


def test_answers_come_from_the_trials_and_from_nowhere_else():
    lesson = find_lesson("replicas_parting")

    def answers(*trials: dict[str, Any]) -> list[tuple[str, bool]]:
        results = LessonRun(0, Path(), {"trials": list(trials)}).answer(lesson, ["same", "equal"])
        return [(one.measured, one.is_as_expected) for one in results]

    parted = trial(path="inner_call", consequence={"spread": 0.1, "test_accuracy": [0.95, 0.5]})
    assert answers(trial(), parted) == [("different", False), ("first", False)]
    assert answers(trial(), trial(path="inner_call")) == [("same", True), ("equal", True)]
    crashed = trial(path="inner_call", consequence=None)
    assert answers(trial(), crashed) == [("none", False), ("none", False)]
    assert answers(trial()) == [(SKIPPED, False), (SKIPPED, False)]
    with pytest.raises(LookupError, match="no trial has"):
        find_trial([trial()], {"path": "inner_call"})


def test_contradictions_are_told_by_cell():
    unmet = {"gradients": {"expected": "synced", "measured": "local"}}
    run = LessonRun(1, Path(), {"trials": [trial(), trial(unmet=unmet)]})
    assert run.contradictions() == ["ddp × call: gradients is local, expected synced"]


def test_an_answer_is_a_word_or_a_number():
    choices = {"a": "A", "b": "B"}
    question = LessonQuestion(key="1", text="?", choices=choices, judge=lambda trials: Answer("a"))
    assert [question.parse(text) for text in ("a", " B ", "1", "2")] == ["a", "b", "a", "b"]
    for text in ("0", "3", "c", ""):
        with pytest.raises(ValueError, match="write one of: a, b"):
            question.parse(text)
    with pytest.raises(WrongUse, match="asks 2 questions, and --predict gives 3"):
        lesson_run.parse_predictions(find_lesson("replicas_parting"), ["same"] * 3)
