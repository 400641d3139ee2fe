"""Mixing matrices in the report: which are drawn, what an entry says, and how many ranks become a few groups."""

import dataclasses
import re

import pytest

from ddpcall.evidence import Cell
from ddpcall.lab.records import TrialRecord
from ddpcall.lab.report.facts import collect_sections
from ddpcall.lab.report.load import load
from ddpcall.lab.report.markdown import render_markdown
from ddpcall.lab.report.mixing import build_pictures
from ddpcall.lab.report.page import render_page
from ddpcall.lab.report.view import build_view
from tests.report.made import make_evidence, make_mixing, make_run

MEAN = [[0.5, 0.5], [0.5, 0.5]]
OWN = [[1.0, 1e-9], [-1e-9, 1.0]]
LAST_LOCAL = [[0.5, 0.5, 1.0, 0.0], [0.5, 0.5, 0.0, 1.0]]


def view_of(tmp_path, mixings, **options):
    return build_view([load(make_run(tmp_path / "run", mixings=mixings, **options))])


def pictures_of(tmp_path, mixings):
    mixing = view_of(tmp_path, mixings).runs[0].mixing
    assert mixing is not None
    return mixing.pictures


def test_matrices_that_are_alike_are_one_picture(tmp_path):
    almost = [[0.5 + 1e-8, 0.5], [0.5, 0.5]]
    mixings = {
        "call": make_mixing(MEAN, "averaged"),
        "forward": make_mixing(almost, "averaged"),
        "inner_call": make_mixing(OWN, "local"),
    }
    pictures = pictures_of(tmp_path, mixings)
    assert [(p.name, p.word, p.tone) for p in pictures] == [
        ("call, forward", "averaged", "good"),
        ("inner_call", "local", "lost"),
    ]
    assert [[entry.text for entry in row] for row in pictures[1].entries] == [["1", "0"], ["0", "1"]]
    assert [[entry.strength for entry in row] for row in pictures[1].entries] == [[1, 0], [0, 1]]


def test_an_entry_says_what_it_means(tmp_path):
    (picture,) = pictures_of(tmp_path, {"call": make_mixing(LAST_LOCAL, "partly_local")})
    assert picture.blocks == ("backward 0", "backward 1")
    assert [entry.says for entry in picture.entries[1]] == [
        "rank 1 uses 0.5 of rank 0's gradient (backward 0)",
        "rank 1 uses 0.5 of its own gradient (backward 0)",
        "rank 1 uses nothing of rank 0's gradient (backward 1)",
        "rank 1 uses 1 of its own gradient (backward 1)",
    ]
    (unknown,) = pictures_of(tmp_path / "b", {"call": make_mixing([[0.5, None], [0.5, None]], "weighted")})
    assert unknown.entries[0][1].says == "rank 0 uses an amount that the step does not tell of rank 1's gradient"
    assert unknown.entries[0][1].text == "–"


@pytest.mark.parametrize(("num_ranks", "num_rows", "last"), [(16, 16, "15"), (17, 9, "16"), (64, 16, "60–63")])
def test_many_ranks_are_drawn_by_groups(tmp_path, num_ranks, num_rows, last):
    mean = [[1 / num_ranks] * num_ranks] * num_ranks
    (picture,) = pictures_of(tmp_path, {"call": make_mixing(mean, "averaged")})
    assert (len(picture.rows), picture.rows[-1]) == (num_rows, last)
    assert len(picture.entries[0]) == num_rows
    if num_ranks == 64:
        # Each of the four ranks of the row uses 1 / 64 of each of the column's four.
        assert picture.entries[0][1].value == pytest.approx(4 / 64, abs=1e-3)
        assert picture.entries[0][1].says == "ranks 0–3 use 0.062 of the gradients of ranks 4–7"
        assert picture.entries[1][1].says == "ranks 4–7 use 0.062 of their own gradients"


@pytest.mark.parametrize(
    "changes",
    [
        {"matrix": ((0.5,), (0.5, 0.5))},
        {"matrix": ((0.5, 0.5),)},
        {"matrix": ((None, None), (None, None))},
        {"ranks": (0, 0)},
        {"columns": ((0, 0),)},
        {"columns": ((), (1, 0))},
        {"columns": ((0, 0, 0), (1, 0))},
    ],
)
def test_a_matrix_that_does_not_fit_its_ranks_is_left_out_and_the_rest_is_shown(tmp_path, changes):
    broken = dataclasses.replace(make_mixing(MEAN, "averaged"), **changes)
    view = view_of(tmp_path, {"call": broken, "forward": make_mixing(MEAN, "summed")})
    assert view.runs[0].mixing is not None
    assert [picture.name for picture in view.runs[0].mixing.pictures] == ["forward"]
    assert render_page(view)


def test_numbers_that_are_none_are_drawn_as_unknown(tmp_path):
    odd = make_mixing([[float("inf"), float("nan")], [0.5, 0.5]], "averaged")
    (picture,) = pictures_of(tmp_path, {"call": odd})
    assert [entry.value for entry in picture.entries[0]] == [None, None]


def test_a_run_without_the_probe_has_no_such_section(tmp_path):
    view = view_of(tmp_path, {})
    assert view.runs[0].mixing is None
    assert "Who learns from whom" not in render_page(view)


def test_nothing_is_drawn_or_blamed_where_there_is_no_data_parallelism():
    cell = Cell(wrapper="none", path="call")
    evidence = dataclasses.replace(
        make_evidence(cell), mixing=make_mixing(OWN, "local"), data_parallel=False, gradients=None
    )
    trial = TrialRecord(cell=cell, verdicts={"mixing": "no data parallelism"}, evidence=evidence)
    assert build_pictures([trial]) is None
    (section,) = [section for section in collect_sections(trial, ["mixing"]) if section.name == "mixing"]
    assert [label for label, _ in section.facts] == ["what it means"]
    assert "nothing to lose" in section.facts[0][1]
    assert build_pictures([dataclasses.replace(trial, verdicts={"mixing": "local"})]) is not None


def test_markdown_has_the_matrix_as_a_table(tmp_path):
    text = render_markdown(view_of(tmp_path, {"call": make_mixing(OWN, "local")}))
    assert "**local** (call): The ranks are local." in text
    assert "| uses of | rank 0 | rank 1 |\n| --- | --- | --- |\n| rank 0 | 1 | 0 |\n| rank 1 | 0 | 1 |" in text


def test_the_page_draws_every_entry_with_a_label_and_one_of_them_in_the_order_of_tabs(tmp_path):
    page = render_page(view_of(tmp_path, {"call": make_mixing(LAST_LOCAL, "partly_local")}))
    cells = re.findall(r'<g role="gridcell" tabindex="(-?\d)" aria-label="([^"]+)"', page)
    assert len(cells) == 8
    assert [tab for tab, _ in cells].count("0") == 1
    assert cells[3] == ("-1", "rank 0 uses nothing of rank 1&#39;s gradient (backward 1)")


def test_the_evidence_of_the_verdict_has_the_sentence_and_the_numbers(tmp_path):
    table = view_of(tmp_path, {"call": make_mixing(MEAN, "averaged")}).runs[0].table
    assert table is not None
    (section,) = [section for section in table.rows[0].evidence if section.name == "mixing"]
    assert section.word == "averaged"
    assert dict(section.facts) == {
        "what it means": "The ranks are averaged.",
        "steps measured": "4, 5: averaged",
        "times the mean": "1",
        "left unexplained": "1e-08",
    }
