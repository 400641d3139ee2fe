"""Every shipped experiment, run as a user runs it; its verdicts are stated here, apart from the YAML."""

import json

import pytest
import torch

from ddpcall.lab.mixing_page import IMAGES, fill_page, read_drawings
from ddpcall.lab.perfetto import write_trace
from ddpcall.lab.truth_table import replace_table, verdict_table
from tests.ranks.lab_process import ROOT, Run, run_lab

DDP_TABLE = {
    "call": ("synced", "fired", "fired", "fired"),
    "forward": ("synced", "skipped", "fired", "fired"),
    "inner_call": ("local", "skipped", "fired", "fired"),
    "inner_forward": ("local", "skipped", "skipped", "fired"),
    "inner_method": ("local", "skipped", "fired", "fired"),
    "submodules": ("local", "skipped", "skipped", "fired"),
    "functional": ("local", "skipped", "fired", "fired"),
}


def verdict_rows(run: Run, *keys: str) -> dict[tuple, tuple]:
    return {
        tuple(trial[key] for key in keys): tuple(
            trial["verdicts"][name] for name in ("gradients", "hooks_wrapped", "hooks_inner", "hooks_submodules")
        )
        for trial in run.summary()["trials"]
    }


def assert_documented(run: Run, document: str) -> None:
    """The table between the experiment's markers is the one this run would write."""
    text, summary = (ROOT / document).read_text(), run.summary()
    name = summary["experiment"]
    table = text.split(f"<!-- table {name} -->\n")[1].split("\n\nMeasured with")[0]
    assert table == verdict_table(summary), "stale: write `make tables`"


@pytest.fixture(scope="module")
def forward_bypass(tmp_path_factory) -> Run:
    run = run_lab(tmp_path_factory.mktemp("forward_bypass"), "experiment=forward_bypass", ranks=2)
    assert run.code == 0, run.err
    return run


def test_forward_bypass_measures_who_synchronizes_and_which_hooks_fire(forward_bypass):
    assert verdict_rows(forward_bypass, "path") == {(path,): row for path, row in DDP_TABLE.items()}


def test_the_readmes_table_is_what_was_measured(forward_bypass):
    assert_documented(forward_bypass, "README.md")
    assert_documented(forward_bypass, "docs/index.md")
    with pytest.raises(ValueError, match="no markers"):
        replace_table("a text without markers", forward_bypass.summary())


def test_the_consequence_of_local_gradients_is_two_models(forward_bypass):
    for trial in forward_bypass.summary()["trials"]:
        consequence, synced = trial["consequence"], trial["verdicts"]["gradients"] == "synced"
        assert len(consequence["test_accuracy"]) == 2
        if synced:
            assert consequence["spread"] == 0
            assert consequence["distance"] == [0, 0]
            assert consequence["test_accuracy"][0] == consequence["test_accuracy"][1]
        else:
            assert consequence["spread"] > 0.01
            assert min(consequence["distance"]) > 0.01


def test_the_hooks_probe_leaves_after_20_steps_with_its_counts(forward_bypass):
    for record in forward_bypass.records("evidence.jsonl"):
        inner = [hook for hook in record["hooks"] if hook["role"] == "inner"]
        # Piece by piece, the inner module's own forward never runs.
        assert {hook["forwards"] for hook in inner} == {0 if record["cell"]["path"] == "submodules" else 20}
        assert {hook["fired"] for hook in inner} <= {0, 20}
        assert {hook["registered"] for hook in inner} == {1}


def test_the_flight_recorder_agrees_with_the_reducer_probe(forward_bypass):
    for record in forward_bypass.records("evidence.jsonl"):
        synced = record["verdicts"]["gradients"] == "synced"
        assert record["collectives"]["agrees"]
        assert [bool(count) for count in record["collectives"]["all_reduces"]] == [synced] * 60
        assert [bool(count) for count in record["reducer"]["arrivals_armed"]] == [synced] * 60
        assert [bool(count) for count in record["reducer"]["arrivals_unarmed"]] == [not synced] * 60


def test_replicas_part_after_the_first_local_step_and_in_every_parameter(forward_bypass):
    for record in forward_bypass.records("evidence.jsonl"):
        local = record["verdicts"]["gradients"] == "local"
        assert record["replicas"]["first_step_parameters"] == (0 if local else None)
        assert len(record["replicas"]["parameters"]) == (6 if local else 0)
    assert len({record["replicas"]["initial_digest"] for record in forward_bypass.records("evidence.jsonl")}) == 1


def test_steps_are_recorded_for_every_rank_with_the_same_losses_at_first(forward_bypass):
    steps = forward_bypass.records("steps.jsonl")
    assert len(steps) == 7 * 2 * 60
    first = {(step["path"], step["rank"]): step["loss"] for step in steps if step["step"] == 0}
    assert len({loss for (_, rank), loss in first.items() if rank == 0}) == 1
    assert first["call", 0] != first["call", 1]


def test_steps_tell_when_and_how_far_the_replicas_part(forward_bypass):
    verdicts = {trial["path"]: trial["verdicts"]["gradients"] for trial in forward_bypass.summary()["trials"]}
    for step in forward_bypass.records("steps.jsonl"):
        apart = verdicts[step["path"]] == "local" and step["rank"] == 1
        assert (step["distance_to_rank0"] > 0) == apart


def test_accuracy_is_measured_every_tenth_step_and_ends_at_the_consequence(forward_bypass):
    final = {trial["path"]: trial["consequence"]["test_accuracy"] for trial in forward_bypass.summary()["trials"]}
    for path, accuracies in final.items():
        steps = [step for step in forward_bypass.records("steps.jsonl") if step["path"] == path]
        for rank, accuracy in enumerate(accuracies):
            measured = {s["step"]: s["accuracy"] for s in steps if s["rank"] == rank and s["accuracy"] is not None}
            assert list(measured) == [0, 10, 20, 30, 40, 50, 59]
            assert measured[59] == accuracy


def test_each_trial_and_rank_has_a_timeline_of_the_third_step_and_buckets_where_gradients_are_synced(
    forward_bypass,
):
    verdicts = {trial["path"]: trial["verdicts"]["gradients"] for trial in forward_bypass.summary()["trials"]}
    timelines = forward_bypass.records("timeline.jsonl")
    assert [(line["path"], line["rank"]) for line in timelines] == [
        (path, rank) for path in verdicts for rank in (0, 1)
    ]
    for line in timelines:
        synced = verdicts[line["path"]] == "synced"
        assert (line["step"], line["raised"], line["untimed"]) == (2, False, [])
        assert [event["kind"] for event in line["events"]].count("bucket") == (1 if synced else 0)
        assert ("bucket" in [skipped["kind"] for skipped in line["skipped"]]) != synced
        assert (line["skipped"] == []) == (line["path"] == "call")
        starts = [event["start_us"] for event in line["events"]]
        assert starts == sorted(starts)


def test_the_trace_of_a_run_nests_in_every_thread(forward_bypass, tmp_path):
    write_trace(forward_bypass.records("timeline.jsonl"), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    threads = {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    assert threads == {(rank, thread) for rank in (0, 1) for thread in range(1, 8)}
    for thread in threads:
        spans = [
            (e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == thread
        ]
        crossing = [(a, b) for a in spans for b in spans if a[0] < b[0] < a[1] < b[1]]
        assert crossing == []


def test_one_run_directory_holds_all_that_was_promised(forward_bypass):
    names = {path.name for path in forward_bypass.only_run().iterdir()}
    assert names == {
        ".hydra",
        "config.yaml",
        "environment.json",
        "evidence.jsonl",
        "report.html",
        "steps.jsonl",
        "summary.json",
        "table.txt",
        "tensorboard",
        "timeline.jsonl",
    }
    environment = json.loads((forward_bypass.only_run() / "environment.json").read_text())
    assert (environment["backend"], environment["world_size"]) == ("gloo", 2)
    assert len(list((forward_bypass.only_run() / "tensorboard").glob("*/events*"))) == 7


def test_the_table_shows_each_cell_and_no_progress_bar_when_piped(forward_bypass):
    for path in DDP_TABLE:
        assert f"ddp × {path} " in forward_bypass.out
    assert "7 of 7 cells have expectations, and all hold" in forward_bypass.out
    assert "━" not in forward_bypass.err


def test_arming_decides_not_the_attribute(tmp_path):
    run = run_lab(tmp_path, "experiment=arming", "steps=6", "tensorboard=false", ranks=2)
    assert run.code == 0, run.err
    assert_documented(run, "docs/experiments.md")
    gradients = {key: row[0] for key, row in verdict_rows(run, "path", "window").items()}
    assert gradients == {
        ("call", "plain"): "synced",
        ("call", "wrapped_forward_first"): "synced",
        ("call", "wrapped_forward_no_grad_first"): "synced",
        ("call", "no_sync_forward"): "local",
        ("call", "no_sync_backward"): "synced",
        ("call", "no_sync_both"): "local",
        ("inner_call", "plain"): "local",
        ("inner_call", "wrapped_forward_first"): "synced",
        ("inner_call", "wrapped_forward_no_grad_first"): "local",
        ("inner_call", "no_sync_forward"): "local",
        ("inner_call", "no_sync_backward"): "local",
        ("inner_call", "no_sync_both"): "local",
    }
    assert all(record["collectives"]["agrees"] for record in run.records("evidence.jsonl"))


def test_ten_ways_to_mix_are_told_apart_and_drawn(tmp_path):
    run = run_lab(tmp_path, "experiment=mixing_matrix", "tensorboard=false")
    assert run.code == 0, run.out + run.err
    records = {(r["cell"]["wrapper"], r["cell"]["window"]): r for r in run.records("evidence.jsonl")}
    matrices = {key: r["mixing"]["matrix"] for key, r in records.items()}
    own = [[float(i == j) for j in range(4)] for i in range(4)]
    halves = [[0.5 * (i // 2 == j // 2) for j in range(4)] for i in range(4)]
    expected = {
        ("ddp", "plain"): [[0.25] * 4] * 4,
        ("ddp_summed", "plain"): [[1.0] * 4] * 4,
        ("ddp_groups", "plain"): halves,
        ("ddp_dropped_rank", "plain"): [[0.25, 0.25, 0.25, 0]] * 4,
        ("ddp_join_uneven", "plain"): [[0.25] * 3] * 3,
        ("ddp", "no_sync_last_micro_batch"): [[0.25] * 4 + row for row in own],
        ("fsdp2_hybrid_inner", "plain"): halves,
        ("local_sgd", "plain"): own,
        ("ddp_ring", "plain"): [[1 / 3 * ((i - j) % 4 != 2) for j in range(4)] for i in range(4)],
    }
    for key, matrix in expected.items():
        measured = [value for row in matrices[key] for value in row]
        assert measured == pytest.approx([value for row in matrix for value in row], abs=1e-5), key
    powersgd = records["ddp_powersgd", "plain"]["mixing"]
    assert set(powersgd["by_parameter"]) == {"transformed", "averaged"}
    assert all(name.endswith("weight") for name in powersgd["by_parameter"]["transformed"])
    # The gradients probe cannot tell six of them apart.
    verdicts = [(trial["verdicts"]["gradients"], trial["verdicts"]["mixing"]) for trial in run.summary()["trials"]]
    assert {mixing for gradients, mixing in verdicts if gradients == "synced"} == {
        "averaged",
        "summed",
        "dropped",
        "scaled",
        "transformed",
    }
    assert_drawn(run)


def assert_drawn(run: Run) -> None:
    """The images of docs/mixing_matrix.md, and their descriptions, are those that this run would write."""
    page = ROOT / "docs" / "mixing_matrix.md"
    drawings = read_drawings(run.only_run())
    assert page.read_text() == fill_page(page.read_text(), drawings), "stale: write `make mixing`"
    images = {path.stem: path.read_text() for path in (page.parent / IMAGES).iterdir()}
    assert images == {name: drawing.svg for name, drawing in drawings.items()}, "stale: write `make mixing`"


def test_replicate_loses_synchronization_on_forward_alone(tmp_path):
    run = run_lab(tmp_path, "experiment=replicate_bypass", "steps=6", "tensorboard=false", ranks=2)
    assert run.code == 0, run.err
    assert_documented(run, "docs/experiments.md")
    assert verdict_rows(run, "path") == {
        ("call",): ("synced", "fired", "fired", "fired"),
        ("forward",): ("local", "skipped", "skipped", "fired"),
        ("inner_method",): ("synced", "fired", "fired", "fired"),
        ("submodules",): ("local", "skipped", "skipped", "fired"),
        ("functional",): ("synced", "fired", "fired", "fired"),
    }
    assert all(record["collectives"]["agrees"] for record in run.records("evidence.jsonl"))


def test_compiled_code_is_slipped_past_and_ignores_late_hooks(tmp_path):
    run = run_lab(tmp_path, "experiment=compile_bypass", "steps=3", "tensorboard=false", ranks=2)
    assert run.code == 0, run.err
    assert_documented(run, "docs/experiments.md")
    rows = {
        (trial["wrapper"], trial["path"]): trial["verdicts"]
        for trial in run.summary()["trials"]
        if trial["hooks"] == "late"
    }
    compiled = {pair for pair, verdicts in rows.items() if verdicts["compiled"] == "compiled"}
    assert compiled == {
        *((wrapper, "call") for wrapper, _ in rows),
        *((wrapper, "forward") for wrapper in ("compile", "ddp_of_compile", "compile_of_ddp")),
    }
    assert all(verdicts["hooks_submodules"] == "skipped" for pair, verdicts in rows.items() if pair in compiled)
    assert all(verdicts["hooks_submodules"] == "fired" for pair, verdicts in rows.items() if pair not in compiled)
    early = [trial for trial in run.summary()["trials"] if trial["hooks"] == "early"]
    assert {trial["verdicts"]["hooks_submodules"] for trial in early} == {"fired"}
    assert "left out: compile_inplace × inner_call makes no sense" in run.out


def test_forward_skips_hooks_and_what_lives_in_hooks_on_one_process(tmp_path):
    run = run_lab(tmp_path, "experiment=hooks_bypass", "tensorboard=false")
    assert run.code == 0, run.err
    assert_documented(run, "docs/experiments.md")
    rows = verdict_rows(run, "model", "path")
    models = "ddpcall.lab.models."
    assert {row for (_, path), row in rows.items() if path == "call"} == {
        ("no data parallelism", "fired", "fired", "fired"),
        ("no data parallelism", "fired", "fired", "none"),
    }
    forward = {model.removeprefix(models): row[0] for (model, path), row in rows.items() if path == "forward"}
    assert forward == {
        "Mlp": "no data parallelism",
        "spectral_norm_linear": "no data parallelism",
        "weight_norm_linear": "crashed",
        "pruned_linear": "crashed",
        "LazyFlatLinear": "crashed",
    }
    stale = {
        record["cell"]["path"]: record["gradients"]["without_gradient"]
        for record in run.records("evidence.jsonl")
        if record["cell"]["model"].endswith("spectral_norm_linear")
    }
    assert stale == {"call": [], "forward": ["weight_orig"]}
    kinds = {
        (hook["kind"], hook["fired"] > 0)
        for record in run.records("evidence.jsonl")
        if record["cell"]["model"].endswith("Mlp") and record["cell"]["path"] == "forward"
        for hook in record["hooks"]
        if hook["role"] == "inner"
    }
    assert kinds == {
        (prefix + kind, False)
        for prefix in ("", "global_")
        for kind in ("forward_pre", "forward", "full_backward")
    }


def test_a_probe_whose_private_name_torch_lacks_says_so_and_the_others_measure(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import torch\ndel torch._C._will_engine_execute_node\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    run = run_lab(
        tmp_path, "experiment=forward_bypass", "grid.path=[inner_call]", "expect=[]", environment=environment
    )
    assert run.code == 0, run.err
    assert f"verdict mixing of ddp is none: torch {torch.__version__} has no torch._C._will_engine" in run.err
    (trial,) = run.summary()["trials"]
    assert (trial["verdicts"]["mixing"], trial["verdicts"]["gradients"]) == ("none", "local")
