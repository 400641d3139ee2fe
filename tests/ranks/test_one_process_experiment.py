"""The experiment of comparisons with one process, run as a user runs it; what it finds is stated here again."""

import pytest

from ddpcall.lab.report.command import main as report
from ddpcall.lab.truth_table import verdict_table
from tests.ranks.lab_process import ROOT, Run, run_lab

FOUND = {
    "mean × ddp": "same",
    "mean × replicate": "same",
    "mean × fsdp1": "same",
    "mean × fsdp2": "same",
    "mean × tp": "same",
    "mean × accelerate": "same",
    "mean × accelerate_bf16": "module",
    "mean × ddp_summed": "scaled",
    "mean × none": "weighted",
    "mean × ddp_comm_hook": "unexplained",
    "sum × ddp": "scaled",
    "sum × fsdp2": "scaled",
    "sum_times_ranks × ddp": "same",
    "sum_times_ranks × fsdp2": "same",
    "token_means × ddp": "weighted",
    "token_mean_of_all × ddp": "same",
    "uneven_batch × ddp": "weighted",
    "uneven_batch_counted × ddp": "same",
    "unequal_micro_batches × ddp": "weighted",
    "micro_batches_counted × ddp": "same",
    "equal_micro_batches × ddp": "same",
    "batch_norm × ddp": "module",
    "sync_batch_norm × ddp": "same",
    "gather_without_gradient × ddp": "loss",
    "gather_with_gradient × ddp": "same",
    "own_negatives × ddp": "loss",
    "clip_then_average × none": "update",
    "average_then_clip × none": "same",
    "summed_norm × ddp": "update",
    "summed_norm × fsdp2": "same",
    "norm_outside_plan × tp": "some_parameters",
    "norm_in_plan × tp": "same",
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Run:
    run = run_lab(tmp_path_factory.mktemp("one_process"), "experiment=same_as_one_process")
    assert run.code == 0, run.out + run.err
    return run


def test_every_mistake_is_told_from_its_right_twin(experiment):
    comparisons = experiment.summary()["comparisons"]
    assert {f"{one['case']} × {one['wrapper']}": one["found"] for one in comparisons} == FOUND
    assert all(one["comparison"]["step"] == 1 for one in comparisons if one["found"] == "same")


def test_messages_name_what_is_wrong(experiment):
    said = {one["case"]: one["message"] for one in experiment.summary()["comparisons"]}
    assert (
        "the whole batch weights them 0.90 and 0.10, as their numbers of target tokens 72 and 8"
        in (said["token_means"])
    )
    assert "1 (BatchNorm1d): its output differs for 8 of 8 samples" in said["batch_norm"]
    assert "norm.weight, norm.bias. The others agree" in said["norm_outside_plan"]
    assert "Clip what the ranks have averaged" in said["clip_then_average"]


def test_table_page_and_markdown_show_every_comparison(experiment, capsys):
    directory = experiment.only_run()
    page = (directory / "report.html").read_text()
    assert report([directory], out=None, open_it=False, form="md") == 0
    markdown = capsys.readouterr().out
    for label, found in FOUND.items():
        row = next(line for line in experiment.out.splitlines() if line.strip().startswith(f"{label} "))
        assert row.split()[-3:] == [found, found, "yes"]
        assert f">{label}<br>" in page
        assert f"| `{label}` " in markdown
    for text in (page, markdown, experiment.out):
        assert "numbers of target tokens 72 and 8" in " ".join(text.split())
    for text in (page, markdown):
        assert f"{list(FOUND.values()).count('same')} of {len(FOUND)} steps compute what one process does" in text
        assert "As expected: 32 of 32 comparisons have expectations, and all hold." in text


def test_the_documented_table_is_what_was_found(experiment):
    table = (ROOT / "docs" / "experiments.md").read_text().split("<!-- table same_as_one_process -->\n")[1]
    assert table.split("\n\nMeasured with")[0] == verdict_table(experiment.summary()), "stale: write `make tables`"


def test_an_expectation_that_fails_is_exit_code_1_on_three_ranks_too(tmp_path):
    cases = "[{case: sum, expect: same}, {case: mean, wrapper: tp, expect: same}]"
    run = run_lab(tmp_path, "experiment=same_as_one_process", f"one_process={cases}", "ranks=3")
    assert run.code == 1, run.out + run.err
    first, second = run.summary()["comparisons"]
    assert (first["found"], first["expectation_met"]) == ("scaled", False)
    assert run.summary()["outcome"] == "expectations failed"
    assert "1 of 2 comparisons not as expected" in run.out
    assert "not as expected (same) sum × ddp" in run.out
    assert second["found"] == "same", second["message"]
