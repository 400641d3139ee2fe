"""The whole truth table and the experiments on modes, precision, sharding and recorded graphs, run as users do."""

import importlib.util

import pytest

from ddpcall.lab.truth_table import semantics_sections
from tests.ranks.lab_process import ROOT, Run, run_lab
from tests.ranks.test_experiments import assert_documented

OUTSIDE = ("inner_call", "inner_forward", "inner_method", "submodules", "functional")


@pytest.fixture(scope="module")
def truth_table(tmp_path_factory) -> Run:
    run = run_lab(tmp_path_factory.mktemp("truth_table"), "experiment=truth_table", ranks=2)
    assert run.code == 0, run.out[-3000:] + run.err[-3000:]
    return run


def rows(run: Run, *keys: str) -> dict[tuple, dict]:
    return {tuple(trial[key] for key in keys): trial for trial in run.summary()["trials"]}


def gradients(run: Run, wrapper: str) -> dict[str, str]:
    return {t["path"]: t["verdicts"]["gradients"] for t in run.summary()["trials"] if t["wrapper"] == wrapper}


def test_every_cell_has_an_expectation_that_holds(truth_table):
    trials = truth_table.summary()["trials"]
    assert len(trials) >= 150
    assert {trial["expectation_met"] for trial in trials} == {True}
    assert {trial["flight_recorder_agrees"] for trial in trials} <= {True, None}


# What the gradients probe says, by comparing ranks, and the shapes of the mixing matrix that go with it.
AGREES = {
    "synced": {"averaged", "summed", "scaled", "weighted", "dropped", "transformed"},
    "local": {"local", "partly_local", "groups", "different"},
    "no data parallelism": {"no data parallelism"},
    "crashed": {"crashed"},
}


def test_mixing_and_gradients_agree_where_both_speak(truth_table):
    spoken = 0
    for key, trial in rows(truth_table, "wrapper", "path").items():
        allowed = AGREES.get(trial["verdicts"]["gradients"])
        assert allowed is None or trial["verdicts"]["mixing"] in allowed, key
        spoken += trial["verdicts"]["gradients"] in ("synced", "local")
    assert spoken >= 100


def test_sharded_cells_have_a_mixing_verdict_and_tensor_parallelism_alone_is_none(truth_table):
    words = {
        (trial["wrapper"], trial["verdicts"]["mixing"])
        for trial in truth_table.summary()["trials"]
        if trial["verdicts"]["gradients"] == "sharded"
    }
    assert words == {
        *((wrapper, "averaged") for wrapper in ("fsdp1", "fsdp2", "fsdp2_layers", "fsdp2_registered")),
        ("tp", "no data parallelism"),
    }


def test_every_averaged_cell_was_measured_to_be_so(truth_table):
    for record in truth_table.records("evidence.jsonl"):
        if record["verdicts"]["mixing"] == "averaged":
            mixing = record["mixing"]
            assert mixing["shapes"] == ["averaged", "averaged"]
            assert mixing["scale"] == pytest.approx(1.0, abs=1e-3)  # a hook reduces in 16 bits
            assert [value for row in mixing["matrix"] for value in row] == pytest.approx([0.5] * 4, abs=1e-3)
            assert max(mixing["residual"]) < 1e-3


def test_docs_semantics_is_what_was_measured(truth_table):
    page = (ROOT / "docs" / "semantics.md").read_text()
    assert semantics_sections(truth_table.summary()) in page, "stale: write `make semantics`"


@pytest.mark.parametrize(
    "wrapper",
    ["ddp", "ddp_static_graph", "ddp_find_unused", "ddp_bucket_view", "ddp_comm_hook", "ddp_join", "accelerate"],
)
def test_options_of_ddp_change_nothing_about_who_synchronizes(truth_table, wrapper):
    expected = dict.fromkeys(("call", "forward"), "synced") | dict.fromkeys(OUTSIDE, "local")
    assert gradients(truth_table, wrapper) == expected


def test_the_python_reducer_synchronizes_whoever_calls(truth_table):
    assert set(gradients(truth_table, "ddp_python_reducer").values()) == {"synced"}


def test_a_crash_by_design_names_its_message_and_its_cause(truth_table):
    cells = rows(truth_table, "wrapper", "path")
    crashed = cells["fsdp2", "forward"]
    assert "mixed torch.Tensor and DTensor" in crashed["error"]
    assert crashed["cause"] == "the forward-pre hook that gathers the sharded parameters was passed by"
    assert cells["fsdp2_layers", "forward"]["verdicts"]["gradients"] == "sharded"
    assert cells["fsdp2", "call"]["cause"] is None


def test_accelerates_precision_is_lost_piece_by_piece_and_by_stripping(truth_table):
    cells = rows(truth_table, "wrapper", "path")
    precision = {key: trial["verdicts"]["precision"] for key, trial in cells.items()}
    assert precision["accelerate_bf16", "inner_call"] == precision["accelerate_bf16", "call"] == "bfloat16"
    assert precision["accelerate_bf16", "submodules"] == "float32"
    assert precision["accelerate_stripped", "call"] == "float32"


def test_sharded_training_that_synchronizes_reaches_the_synchronized_model(truth_table):
    for key, trial in rows(truth_table, "wrapper", "path").items():
        if trial["verdicts"]["gradients"] == "sharded" and key[0] != "tp":  # its ranks share one batch
            assert max(trial["consequence"]["distance"]) < 1e-6, key


def test_a_part_of_the_table_can_be_asked_for(tmp_path):
    restricted = ("grid.wrapper=[ddp,fsdp2]", "grid.path=[call,forward]")
    run = run_lab(tmp_path, "experiment=truth_table", *restricted, ranks=2)
    assert run.code == 0
    assert set(rows(run, "wrapper", "path")) == {(w, p) for w in ("ddp", "fsdp2") for p in ("call", "forward")}


def test_a_cell_that_disagrees_is_listed(tmp_path):
    wrong = ("grid.wrapper=[ddp]", "grid.path=[inner_call]", "expect=[{gradients: synced}]")
    run = run_lab(tmp_path, "experiment=truth_table", *wrong, ranks=2)
    assert run.code == 1
    assert "not as expected Mlp: ddp × inner_call: gradients is local, expected synced" in run.out
    assert rows(run, "path")[("inner_call",)]["unmet"] == {
        "gradients": {"expected": "synced", "measured": "local"}
    }


@pytest.mark.parametrize("name", ["precision_bypass", "sync_batchnorm", "jit_hooks", "checkpointing"])
def test_experiment_holds_and_is_documented(tmp_path, name):
    run = run_lab(tmp_path, f"experiment={name}", "tensorboard=false", ranks=2)
    assert run.code == 0, run.out
    assert_documented(run, "docs/experiments.md")


def test_forward_after_a_call_trains_nothing_in_silence(tmp_path):
    run = run_lab(tmp_path, "experiment=sharded_bypass", "tensorboard=false", ranks=2)
    assert run.code == 0, run.out
    assert_documented(run, "docs/experiments.md")
    cells = {
        (record["cell"]["wrapper"], record["cell"]["path"], record["cell"]["window"]): record
        for record in run.records("evidence.jsonl")
    }
    silent = cells["fsdp2", "forward", "wrapped_forward_first"]
    assert silent["failures"] == []
    assert silent["gradients"]["with_gradient"] == 0
    assert min(silent["consequence"]["distance"]) > 0
    assert cells["fsdp2", "call", "wrapped_forward_first"]["gradients"]["with_gradient"] == 6


def test_modes_are_logged_for_every_rank_and_step(tmp_path):
    run = run_lab(tmp_path, "experiment=mode_mismatch", ranks=2)
    assert run.code == 0, run.out
    assert_documented(run, "docs/experiments.md")
    steps = [s for s in run.records("steps.jsonl") if (s["path"], s["mode"]) == ("call", "eval_on_rank_0")]
    assert {(step["rank"], step["training_modules"] > 0) for step in steps} == {(0, False), (1, True)}
    assert {step["dropout_kept"] == 1.0 for step in steps if step["rank"] == 0} == {True}
    # Rank 0, in eval mode, counts nothing, and DDP sends its count before each of rank 1's forwards.
    assert [step["batches_tracked"] for step in steps if step["rank"] == 0] == [0] * 12
    assert [step["batches_tracked"] for step in steps if step["rank"] == 1] == [1] * 12
    folder = next((run.only_run() / "tensorboard").glob("*-call-plain-early-eval_on_rank_0"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    kept = [event.value for event in events.Scalars("modes/dropout_kept/rank0")]
    assert kept == [1.0] * 12


def test_batch_norm_and_dropout_follow_modes_and_buffers(tmp_path):
    run = run_lab(tmp_path, "experiment=batchnorm_modes", "tensorboard=false", ranks=2)
    assert run.code == 0, run.out
    assert_documented(run, "docs/experiments.md")
    (tmp_path / "dropout").mkdir()
    run = run_lab(tmp_path / "dropout", "experiment=dropout_modes", "tensorboard=false", ranks=2)
    assert run.code == 0, run.out
    assert_documented(run, "docs/experiments.md")
    masks = {key: trial["verdicts"]["dropout"] for key, trial in rows(run, "path", "mode").items()}
    assert {mode: {word for (_, m), word in masks.items() if m == mode} for _, mode in masks} == {
        "train": {"identical"},
        "seeded_by_rank": {"different"},
        "eval": {"none"},
    }


def test_fabric_is_measured_where_it_is_installed_and_else_says_what_to_install(tmp_path):
    run = run_lab(tmp_path, "experiment=truth_table", "grid.wrapper=[fabric]", "expect=[]", ranks=2)
    if importlib.util.find_spec("lightning_fabric") is None:
        assert run.code != 0
        assert "Lightning Fabric is not installed; write pip install lightning-fabric" in run.err
        assert run.summary()["outcome"] == "wrong use"
        return
    expected = dict.fromkeys(("call", "forward"), "synced") | dict.fromkeys(OUTSIDE, "local")
    assert gradients(run, "fabric") == expected
