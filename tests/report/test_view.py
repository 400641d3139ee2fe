"""The view model: what is shown, before it looks like anything."""

import dataclasses
import json
from itertools import pairwise

import pytest

from ddpcall.evidence import Cell, Environment, Skipped, TimelineEvent
from ddpcall.lab.records import RunRecord, TimelineRecord, TrialRecord
from ddpcall.lab.report.compare import compare_runs, name_runs
from ddpcall.lab.report.load import load
from ddpcall.lab.report.load_watch import WatchRecord, load_watch
from ddpcall.lab.report.page import to_json
from ddpcall.lab.report.series import MOST_LINES, MOST_POINTS, make_ticks, thin
from ddpcall.lab.report.timeline import build_timeline
from ddpcall.lab.report.truth import build_table
from ddpcall.lab.report.view import build_view
from ddpcall.lab.report.watched import Coverage, view_watch
from tests.report.made import PATHS, make_finding, make_findings, make_run, make_watched


def view_of(path, **options):
    return build_view([load(make_run(path, **options))]).runs[0]


def test_failed_expectations_are_listed_with_what_was_measured(tmp_path):
    run = view_of(
        tmp_path / "run",
        expected={"call": {"gradients": "synced"}, "inner_call": {"gradients": "synced", "hooks_inner": "fired"}},
        crashes={"functional": "boom"},
    )
    assert [(failure.label, failure.unmet) for failure in run.failures] == [
        ("inner_call", (("gradients", "synced", "local"),)),
        ("functional", (("gradients", "no crash", "crashed"),)),
    ]
    assert run.failures[1].error == "rank 1, step 2: RuntimeError: boom"
    assert run.status == ("lost", "2 of 7 cells are not as expected.")


def test_every_row_has_the_evidence_of_each_verdict_it_shows(tmp_path):
    table = view_of(tmp_path / "run").table
    assert table is not None
    assert [name for name, _ in table.columns] == ["gradients", "hooks_wrapped", "hooks_inner", "hooks_submodules"]
    for row in table.rows:
        sections = {section.name: section for section in row.evidence}
        assert [sections[cell.name].word for cell in row.cells] == [cell.word for cell in row.cells]
        assert all(sections[cell.name].facts for cell in row.cells)
    facts = dict(table.rows[2].evidence[0].facts)
    assert facts["largest difference between ranks"] == "0.5 (largest gradient 1)"
    assert facts["gradients that arrived"] == "0 while armed, 24 while not"
    assert facts["parameters parted"] == "after step 0 (from 0)"


def test_the_overview_is_for_wrappers_and_paths_alone():
    trials = [
        TrialRecord(cell=Cell(wrapper=w, path=p), verdicts={"gradients": "local"})
        for w, p in [("ddp", "forward"), ("ddp", "call"), ("tp", "call")]
    ]
    overview = build_table(trials).overview
    assert overview is not None
    assert (overview.wrappers, overview.paths) == (("ddp", "tp"), ("call", "forward"))
    assert [[cell and cell.number for cell in row] for row in overview.cells] == [[1, 0], [2, None]]
    assert (
        build_table(
            [dataclasses.replace(t, cell=dataclasses.replace(t.cell, mode=t.cell.path)) for t in trials]
        ).overview
        is None
    )


def test_curves_that_coincide_are_drawn_once_and_named_for_all(tmp_path):
    run = view_of(tmp_path / "run")
    assert run.distance is not None
    assert [(line.name, line.points[-1][1]) for line in run.distance.lines] == [
        ("call, forward", 0.0),
        ("inner_call, inner_forward, inner_method, submodules, functional", pytest.approx(0.3)),
    ]
    synced, parted = run.accuracy
    assert [line.rank for line in parted.lines] == [0, 1]
    assert [step for step, _ in parted.lines[0].points] == [0, 2, 4]
    assert synced.ticks == parted.ticks


def test_too_many_curves_keep_the_farthest_and_the_nearest(tmp_path):
    cells = [Cell(wrapper="ddp", path=f"p{number}") for number in range(30)]
    directory = make_run(tmp_path / "run", cells)
    with (directory / "steps.jsonl").open("w") as file:
        for number, cell in enumerate(cells):
            record = {**dataclasses.asdict(cell), "rank": 1, "step": 0, "distance_to_rank0": number / 10}
            file.write(json.dumps(record) + "\n")
    plot = build_view([load(directory)]).runs[0].distance
    assert plot is not None
    assert [line.name for line in plot.lines] == [
        "p0",
        *(f"p{number}" for number in range(30 - MOST_LINES + 1, 30)),
    ]
    assert plot.left_out == 30 - MOST_LINES


def test_thinning_keeps_both_ends_and_every_peak():
    points = tuple((step, 5.0 if step == 777 else -3.0 if step == 4001 else step % 7 / 10) for step in range(5000))
    thinned = thin(points)
    assert len(thinned) <= MOST_POINTS
    assert thinned[0] == points[0]
    assert thinned[-1] == points[-1]
    assert {(777, 5.0), (4001, -3.0)} <= set(thinned)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


@pytest.mark.parametrize(
    "values", [[0.0], [0.31], [1.0], [-3.0, 4.0], [1e-9], [7e12], [1e149, -1e149], [5e-324], []]
)
def test_ticks_are_even_and_span_the_values_and_zero(values):
    ticks = make_ticks(values)
    assert 2 <= len(ticks) <= 12
    assert all(after > before for before, after in pairwise(ticks))
    assert ticks[0] <= min([0.0, *values]) + 1e-9
    assert ticks[-1] >= max([0.0, *values]) * (1 - 1e-9)


def test_what_a_step_went_past_is_drawn_beside_what_happened():
    record = TimelineRecord(
        wrapper="ddp",
        path="inner_call",
        rank=0,
        step=2,
        events=(
            TimelineEvent(kind="forward", name="Mlp", owner="inner", start_us=100, end_us=500),
            TimelineEvent(kind="backward", name="backward", start_us=600, end_us=1000),
        ),
        skipped=(
            Skipped(kind="forward", name="DistributedDataParallel", owner="wrapped"),
            Skipped(kind="pre_hook", name="forward_pre of DistributedDataParallel", owner="wrapped"),
            Skipped(kind="hook", name="forward of DistributedDataParallel", owner="wrapped"),
            Skipped(kind="hook", name="full_backward of DistributedDataParallel", owner="wrapped"),
            Skipped(kind="bucket", name="reduction of 6 gradients"),
            Skipped(kind="hook", name="forward of a", owner="submodule"),
            Skipped(kind="hook", name="forward of b", owner="submodule"),
        ),
    )
    timeline = build_timeline(record, 0, "inner_call")
    lanes = {
        lane.name: [(span.name, span.start_us, span.end_us, span.absent) for span in lane.spans]
        for lane in timeline.lanes
    }
    assert lanes == {
        "wrapped": [
            ("DistributedDataParallel", 100, 500, True),
            ("forward_pre of DistributedDataParallel", 80, 100, True),
            ("forward of DistributedDataParallel", 500, 520, True),
            ("full_backward of DistributedDataParallel", 790, 810, True),
        ],
        "inner": [("Mlp", 100, 500, False)],
        "below": [("forward of 2 modules", 500, 520, True)],
        "backward": [("backward", 600, 1000, False)],
        "communication": [("reduction of 6 gradients", 800, 1000, True)],
    }
    assert timeline.absent[0] == "forward of DistributedDataParallel"
    assert timeline.absent[1] == "forward_pre hook of DistributedDataParallel"
    assert timeline.caption == "1.00 ms in all, forward 0.40 ms, backward 0.40 ms, no bucket reduced"


def test_batch_norm_and_dropout_are_shown_where_measured(tmp_path):
    assert view_of(tmp_path / "plain").modes is None
    modes = view_of(tmp_path / "run", modes=True).modes
    assert modes is not None
    assert modes.apart is not None
    assert [line.name for line in modes.apart.lines] == [
        "call, forward",
        "inner_call, inner_forward, inner_method, submodules, functional",
    ]
    assert [(strip.name, strip.same, strip.kept) for strip in modes.masks] == [
        ("all 7 cells", (True, None, False, False, False, False), (pytest.approx(0.8), pytest.approx(0.8)))
    ]
    assert [plot.title for plot in modes.norms] == [
        "Norm of the running means: call, forward",
        "Norm of the running means: inner_call, inner_forward, inner_method, submodules, functional",
    ]


def other_environment(**changes) -> Environment:
    return Environment(
        **{
            "torch": "2.13.0",
            "python": "3.11.7",
            "backend": "gloo",
            "device": "cpu",
            "device_name": "x86_64",
            "world_size": 2,
            **changes,
        }
    )


def test_runs_side_by_side_list_the_verdicts_that_differ(tmp_path):
    cells = [Cell(wrapper="ddp", path=path, model="my.Mlp") for path in PATHS]
    first = load(make_run(tmp_path / "a", cells))
    second = load(
        make_run(tmp_path / "b", cells[:-1], crashes={"call": "x"}, environment=other_environment(torch="2.11.0"))
    )
    assert isinstance(first, RunRecord)
    assert isinstance(second, RunRecord)
    comparison = compare_runs([first, second], name_runs([first, second]))
    assert comparison.runs == ("torch 2.13.0", "torch 2.11.0")
    assert [(d.label, d.title, [c and c.word for c in d.cells]) for d in comparison.differences] == [
        ("call", "gradients", ["synced", "crashed"]),
        ("call", "mixing", ["none", "crashed"]),
    ]
    assert comparison.sentence == "2 verdicts in 1 of the 6 cells that the runs have in common differ."
    assert comparison.alone == (("functional",), ())


def test_runs_that_nothing_tells_apart_are_named_by_directory(tmp_path):
    runs = [load(make_run(tmp_path / name)) for name in ("a", "b")]
    view = build_view(runs)
    assert [run.name for run in view.runs] == ["a", "b"]
    assert view.comparison is not None
    assert view.comparison.sentence == "No verdict differs in the 7 cells that the runs have in common."


def test_the_command_repeats_the_run_on_as_many_ranks(tmp_path):
    run = view_of(tmp_path / "run")
    expected = "train experiment=forward_bypass 'note=it'\"'\"'s <b>'"
    assert run.command == f"torchrun --standalone --nproc-per-node 2 -m ddpcall {expected}"
    alone = view_of(tmp_path / "one", environment=other_environment(world_size=1))
    assert alone.command == f"ddpcall {expected}"


def test_the_json_is_versioned_and_has_the_whole_view(tmp_path):
    view = build_view([load(make_run(tmp_path / "run"))])
    written = json.loads(to_json(view))
    assert written["schema"] == 2
    assert written["runs"][0]["answer"] == view.runs[0].answer
    assert len(written["runs"][0]["table"]["rows"]) == len(PATHS)


def test_findings_come_worst_first_with_the_page_of_their_rule(tmp_path):
    file = make_findings(
        tmp_path / "findings.json",
        make_finding(code="DC301", severity="warning", step=0),
        make_finding(step=9),
        make_finding(code="DC999", severity="grave", name="unheard-of"),
    )
    record = load(file)
    assert isinstance(record, WatchRecord)
    watch = view_watch(record)
    assert [(found.finding.code, found.rule is not None) for found in watch.findings] == [
        ("DC101", True),
        ("DC301", True),
        ("DC999", False),
    ]
    assert watch.counts == (("error", 1), ("warning", 1))
    assert watch.answer == (
        "1 error, 1 warning; the worst: the optimizer stepped with gradients that were never averaged over the "
        "ranks, at `train.py:5 in main`."
    )
    assert watch.findings[0].where == "ranks 0, 1, from optimizer step 9, seen 6 times"


def test_a_watch_that_found_nothing_says_so(tmp_path):
    watch = view_watch(load_watch(make_findings(tmp_path / "findings.json", watched=make_watched(30))))
    assert watch.answer == "The watch found nothing."
    assert watch.coverage == Coverage("Watched", "1 DDP model, 30 steps on 2 of 2 ranks.", "good")


@pytest.mark.parametrize(
    ("content", "start"),
    [
        ({"watched": make_watched(0)}, "Nothing could be found out: no step of a torch optimizer was taken"),
        ({}, "The file does not say what was watched"),
    ],
)
def test_a_watch_that_saw_too_little_is_no_green_page(tmp_path, content, start):
    watch = view_watch(load_watch(make_findings(tmp_path / "f.json", **content)))
    assert watch.answer.startswith("No answer: ")
    assert watch.coverage.text.startswith(start)
    assert watch.coverage.tone == "part"


def test_what_was_watched_is_not_green_beside_findings(tmp_path):
    record = load_watch(make_findings(tmp_path / "f.json", make_finding(), watched=make_watched(30)))
    assert view_watch(record).coverage.tone == "other"
