"""The loader: whole directories come out whole, broken ones say what is broken and give the rest."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from ddpcall.evidence import Cell
from ddpcall.lab.records import RunRecord
from ddpcall.lab.report.load import load
from ddpcall.lab.report.load_watch import WatchRecord
from ddpcall.lab.report.markdown import render_markdown
from ddpcall.lab.report.page import render_page
from ddpcall.lab.report.view import build_view
from ddpcall.lab.typed import Misfit, NothingToShow, read_record
from tests.report.made import NUM_RANKS, NUM_STEPS, PATHS, make_finding, make_findings, make_run


def load_run(path: Path) -> RunRecord:
    record = load(path)
    assert isinstance(record, RunRecord)
    return record


def show(record: RunRecord | WatchRecord) -> str:
    view = build_view([record])
    return render_page(view) + render_markdown(view)


def test_a_whole_directory_has_no_problems_and_all_its_parts(tmp_path):
    run = load_run(make_run(tmp_path / "run", modes=True))
    assert run.problems == ()
    assert [trial.cell.path for trial in run.trials] == list(PATHS)
    assert all(trial.evidence is not None and trial.evidence.cell == trial.cell for trial in run.trials)
    assert set(run.steps) == {trial.cell for trial in run.trials}
    steps = run.steps[Cell(wrapper="ddp", path="inner_call", model="my.Mlp")]
    assert sorted(steps) == list(range(NUM_RANKS))
    assert steps[1].steps == tuple(range(NUM_STEPS))
    assert steps[1].columns["distance_to_rank0"] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    assert steps[0].columns["masks_identical"] == (1.0, None, 0.0, 0.0, 0.0, 0.0)
    assert len(run.timeline) == NUM_RANKS * len(PATHS)
    assert run.overrides == ("experiment=forward_bypass", "note=it's <b>")


def test_the_summary_file_itself_names_its_run(tmp_path):
    run = make_run(tmp_path / "run")
    assert load_run(run / "summary.json") == load_run(run)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: (path.mkdir(), (path / "notes.txt").write_text("hello")), "is not a run directory"),
        (lambda path: (path.mkdir(), (path / "summary.json").write_text("")), "nothing that can be read"),
        (
            lambda path: (path.mkdir(), (path / "evidence.jsonl").write_bytes(b"\x00\xff\n")),
            "nothing that can be read",
        ),
        (lambda path: path.write_text("[1, 2"), "cannot be read"),
        (lambda path: path.write_text("{}"), "holds no findings"),
    ],
    ids=["missing", "empty", "foreign", "empty summary", "garbage", "half a file", "other JSON"],
)
def test_what_holds_nothing_is_refused_with_a_reason(tmp_path, make, says):
    make(tmp_path / "run")
    with pytest.raises(NothingToShow, match=says):
        load(tmp_path / "run")


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_a_run_killed_while_writing_shows_the_trials_it_had(tmp_path):
    run = make_run(tmp_path / "run", outcome="running", num_trials=9)
    cut(run / "evidence.jsonl", 0.5)
    cut(run / "steps.jsonl", 0.51)
    record = load_run(run)
    assert len(record.trials) == len(PATHS)
    assert sum(trial.evidence is not None for trial in record.trials) == 3
    assert [problem.split(":")[0] for problem in record.problems] == ["evidence.jsonl", "steps.jsonl"]
    assert "The run goes on, or was killed" in show(record)


def test_without_a_summary_the_trials_come_from_the_evidence_judged_anew(tmp_path):
    whole = load_run(make_run(tmp_path / "run", expected={"call": {"gradients": "local"}}))
    (tmp_path / "run" / "summary.json").unlink()
    record = load_run(tmp_path / "run")
    assert record.trials == whole.trials
    assert record.trials[0].unmet == {"gradients": {"expected": "local", "measured": "synced"}}
    assert record.outcome == "unknown"
    assert record.problems == ("summary.json is missing: how the run ended is not known",)


def test_without_evidence_the_verdicts_of_the_summary_are_shown(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "evidence.jsonl").unlink()
    record = load_run(run)
    assert record.problems == ("evidence.jsonl is missing",)
    assert [trial.verdicts["gradients"] for trial in record.trials].count("synced") == 2
    assert "could not be read from evidence.jsonl" in show(record)


def test_an_older_directory_without_timeline_and_distances_is_shown_without_problems(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "timeline.jsonl").unlink()
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    old = [{k: v for k, v in line.items() if k not in ("distance_to_rank0", "accuracy")} for line in lines]
    (run / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    record = load_run(run)
    view = build_view([record]).runs[0]
    assert record.problems == ()
    assert (view.distance, view.accuracy, view.timelines) == (None, (), None)
    assert [models.accuracy for models in view.final_models] == [(0.9, 0.9), (0.8, 0.7)]


def test_fields_of_a_newer_version_are_left_out_and_the_schema_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["schema"] = 2
    summary["trials"][0]["aura"] = "blue"
    (run / "summary.json").write_text(json.dumps(summary))
    record = load_run(run)
    assert len(record.trials) == len(PATHS)
    assert record.problems[0].startswith("summary.json has schema 2, and this version of ddpcall knows 1")


def test_numbers_that_json_has_no_word_for_are_read_and_not_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    lines = (run / "steps.jsonl").read_text().replace('"distance_to_rank0": 0.05', '"distance_to_rank0": "nan"')
    (run / "steps.jsonl").write_text(lines.replace('"distance_to_rank0": 0.1,', '"distance_to_rank0": "inf",'))
    plot = build_view([load_run(run)]).runs[0].distance
    assert plot is not None
    assert max(value for line in plot.lines for _, value in line.points) == pytest.approx(0.3)


def mutate(value: Any, chance: random.Random) -> Any:
    """Return a JSON value with one of its parts replaced by something of another type, or taken away."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        return [*value[:at], mutate(value[at], chance), *value[at + 1 :]]
    return chance.choice([None, 7, -1e308, "nan", "<x>", [], {}, [[]], {"a": [None]}, True, "9" * 400, 0.0])


@pytest.mark.parametrize("seed", range(60))
def test_no_mutation_of_any_file_breaks_the_report(tmp_path, seed):
    chance = random.Random(seed)
    run = make_run(tmp_path / "run", modes=True, crashes={"functional": "boom"})
    name = chance.choice(["summary.json", "evidence.jsonl", "steps.jsonl", "timeline.jsonl"])
    lines = (run / name).read_text().splitlines() if name.endswith("l") else [(run / name).read_text()]
    for _ in range(chance.randrange(1, 6)):
        at = chance.randrange(len(lines))
        lines[at] = json.dumps(mutate(json.loads(lines[at]), chance))
    (run / name).write_text("\n".join(lines) + "\n")
    assert "<html" in show(load_run(run))


def show_or_refuse(path: Path) -> bool:
    """Say whether a path is either shown, or refused by its name."""
    try:
        record = load(path)
    except NothingToShow as error:
        return str(path) in str(error)
    return "<html" in show(record)


@pytest.mark.parametrize("seed", range(30))
def test_no_cut_of_any_file_breaks_the_report(tmp_path, seed):
    chance = random.Random(seed)
    run = make_run(tmp_path / "run", modes=True)
    for file in list(run.rglob("*.*")):
        if file.is_file() and chance.random() < 0.5:
            cut(file, chance.random())
    assert show_or_refuse(run)


@pytest.mark.parametrize("seed", range(20))
def test_no_mutation_of_findings_breaks_the_report(tmp_path, seed):
    chance = random.Random(seed)
    file = make_findings(tmp_path / "findings.json", make_finding(), make_finding(code="DC999", severity="grave"))
    file.write_text(json.dumps(mutate(json.loads(file.read_text()), chance)))
    assert show_or_refuse(file)


def test_findings_come_with_their_source_lines(tmp_path):
    (tmp_path / "train.py").write_text("".join(f"line {number}\n" for number in range(1, 10)))
    record = load(make_findings(tmp_path / "findings.json", make_finding()))
    assert isinstance(record, WatchRecord)
    ((_, excerpt),) = record.findings
    assert [(line.number, line.text, line.marked) for line in excerpt.lines] == [
        (number, f"line {number}", number == 5) for number in range(2, 9)
    ]
    assert excerpt.note is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"file": "gone.py"}, "gone.py is not on this machine"),
        ({"line": 50}, "has only 2 lines now"),
        ({"line": 0, "file": ""}, "No line can be told"),
    ],
)
def test_source_that_cannot_be_shown_is_said(tmp_path, changes, says):
    (tmp_path / "train.py").write_text("a\nb\n")
    record = load(make_findings(tmp_path / "findings.json", make_finding(**changes)))
    assert isinstance(record, WatchRecord)
    ((_, excerpt),) = record.findings
    assert excerpt.lines == ()
    assert says in (excerpt.note or "")


def test_source_that_changed_since_the_run_is_said(tmp_path):
    file = make_findings(tmp_path / "findings.json", make_finding(line=1))
    (tmp_path / "train.py").write_text("a\n")
    written = file.stat().st_mtime
    os.utime(tmp_path / "train.py", (written + 10, written + 10))
    record = load(file)
    assert isinstance(record, WatchRecord)
    assert "has changed since the run" in (record.findings[0][1].note or "")


def test_a_directory_with_findings_alone_is_a_watched_run(tmp_path):
    make_findings(tmp_path / "findings.json", make_finding())
    assert isinstance(load(tmp_path), WatchRecord)
    shutil.copytree(make_run(tmp_path / "run"), tmp_path, dirs_exist_ok=True)
    assert isinstance(load(tmp_path), RunRecord)


def test_the_typed_reader_says_where_a_value_does_not_fit():
    assert read_record(Cell, {"wrapper": "ddp", "path": "call", "new": 1}) == Cell(wrapper="ddp", path="call")
    with pytest.raises(Misfit, match=r"trial\.path: 3 is not str"):
        read_record(Cell, {"wrapper": "ddp", "path": 3}, "trial")
    with pytest.raises(Misfit, match="missing 1 required keyword-only argument: 'path'"):
        read_record(Cell, {"wrapper": "ddp"}, "trial")
