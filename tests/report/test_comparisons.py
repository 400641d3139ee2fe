"""Runs that compare with one process instead of trying a grid: every rendering shows the comparisons."""

import io
import json
from typing import Any

from rich.console import Console

from ddpcall.lab.records import ComparisonRecord
from ddpcall.lab.report.compare import compare_runs
from ddpcall.lab.report.load import load_run
from ddpcall.lab.report.markdown import render_markdown
from ddpcall.lab.report.page import render_page, to_json
from ddpcall.lab.report.terminal import show_comparisons
from ddpcall.lab.report.view import build_view
from ddpcall.lab.schema import TrainConfig
from ddpcall.lab.truth_table import verdict_table
from tests.report.made import ENVIRONMENT, make_comparisons, make_run

ANSWER = (
    "1 of 4 steps computes what one process does; ranks or micro-batches have other weights in "
    "`token_means × ddp`; the loss is another one in `gather_without_gradient × "
    "ddp`; some parameters differ in `norm × ddp`."
)


def test_answer_and_status_are_those_of_the_comparisons(tmp_path):
    (run,) = build_view([load_run(make_run(tmp_path / "run", (), **make_comparisons()))]).runs
    assert run.answer == ANSWER
    assert run.status == ("good", "As expected: 4 of 4 comparisons have expectations, and all hold.")
    assert (run.table, run.failures) == (None, ())


def test_what_is_not_as_expected_stands_first(tmp_path):
    (run,) = build_view([load_run(make_run(tmp_path / "run", (), **make_comparisons(norm="same")))]).runs
    assert run.status == ("lost", "1 of 4 comparisons is not as expected.")
    first = run.comparisons[0]
    assert (first.label, first.found.word, first.found.expected) == (
        "norm × ddp",
        "same",
        "some_parameters",
    )


def test_a_run_that_was_killed_says_how_many_comparisons_are_missing(tmp_path):
    summary = make_comparisons() | {"outcome": "running", "num_comparisons": 9}
    (run,) = build_view([load_run(make_run(tmp_path / "run", (), **summary))]).runs
    assert run.status[1].startswith("The run goes on, or was killed before it could say more: 4 of 9 comparisons")
    empty: dict[str, Any] = summary | {"comparisons": []}
    (run,) = build_view([load_run(make_run(tmp_path / "empty", (), **empty))]).runs
    assert run.answer == "Nothing was measured."
    assert "0 of 9 comparisons measured" in run.status[1]


def test_page_markdown_and_json_hold_every_comparison(tmp_path):
    view = build_view([load_run(make_run(tmp_path / "run", (), **make_comparisons()))])
    page, markdown, plain = render_page(view), render_markdown(view), json.loads(to_json(view))
    for case in ("mean", "token_means", "gather_without_gradient", "norm"):
        assert f"{case} × ddp<br>" in page
        assert f"| `{case} × ddp` a step that takes the " in markdown
    assert "the whole batch weights them 0.90 and 0.10" in page
    assert "The truth table" not in page
    assert plain["runs"][0]["comparisons"][0]["found"]["word"] == "same"


def test_a_comparison_that_cannot_be_read_is_left_out_with_a_sentence(tmp_path):
    summary = make_comparisons()
    summary["comparisons"][1].pop("found")
    run = load_run(make_run(tmp_path / "run", (), **summary))
    assert len(run.comparisons) == 3
    assert any("comparison 1" in problem for problem in run.problems)


def test_two_runs_are_compared_by_what_was_found(tmp_path):
    one = load_run(make_run(tmp_path / "one", (), **make_comparisons()))
    other = load_run(make_run(tmp_path / "other", (), **make_comparisons(mean="scaled")))
    compared = compare_runs([one, other], ["one", "other"])
    assert compared.sentence == "1 verdict in 1 of the 4 cells that the runs have in common differs."
    (difference,) = compared.differences
    assert difference.label == "mean × ddp"
    assert [cell and cell.word for cell in difference.cells] == ["same", "scaled"]
    trials = load_run(make_run(tmp_path / "trials"))
    assert "no cell in common" in compare_runs([one, trials], ["one", "trials"]).sentence


def test_the_table_of_the_documents_leaves_out_what_differs_from_run_to_run():
    table = verdict_table(make_comparisons())
    assert "| `mean`: a step that takes the mean | ddp | same |" in table
    assert "| `token_means`: a step that takes the token_means | ddp | **weighted** |" in table


def test_the_table_fits_80_columns():
    plain = make_comparisons(norm="same")["comparisons"]
    results = [
        ComparisonRecord(**{name: value for name, value in one.items() if name != "expectation_met"})
        for one in plain
    ]
    shown = io.StringIO()
    show_comparisons(Console(file=shown, width=80), TrainConfig(), ENVIRONMENT, results)
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "gather_without_gradient × ddp " in line)
    assert row.split()[-3:] == ["loss", "loss", "yes"]
    assert any(line.split()[-3:] == ["some_parameters", "same", "NO"] for line in lines)
    text = " ".join(shown.getvalue().split())
    assert "not as expected (some_parameters) norm × ddp, a step that takes the norm: Ranks" in text
    assert "1 of 4 comparisons not as expected" in text
