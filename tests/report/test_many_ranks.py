"""The page of 64 ranks: small, whole, and readable on a wide screen and on a narrow one."""

import dataclasses
from pathlib import Path

import pytest

from ddpcall.lab.report.load import load
from ddpcall.lab.report.page import render_page
from ddpcall.lab.report.view import build_view
from tests.report.made import ENVIRONMENT, PATHS, SYNCED, make_mixing, make_run

NUM_RANKS, NUM_STEPS = 64, 100
MOST_BYTES = 6 * 10**6


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    averaged = [[1 / NUM_RANKS] * NUM_RANKS] * NUM_RANKS
    local = [[float(rank == other) for other in range(NUM_RANKS)] for rank in range(NUM_RANKS)]
    mixings = {
        path: make_mixing(averaged, "averaged") if path in SYNCED else make_mixing(local, "local")
        for path in PATHS
    }
    run = make_run(
        tmp_path_factory.mktemp("many") / "run",
        modes=True,
        num_steps=NUM_STEPS,
        environment=dataclasses.replace(ENVIRONMENT, world_size=NUM_RANKS),
        mixings=mixings,
    )
    record = load(run)
    assert record.problems == ()
    place = run / "report.html"
    place.write_text(render_page(build_view([record])))
    return place


def test_the_page_of_64_ranks_is_small_and_says_what_it_leaves_to_the_files(page):
    assert page.stat().st_size < MOST_BYTES
    text = page.read_text()
    assert "world size 64" in text
    assert "56 more curves are in steps.jsonl" in text
    assert "60–63" in text, "the matrix has blocks of ranks, to the last"
    assert "70.0% to 80.0%" in text
    assert text.rstrip().endswith("</html>")


def test_numbers_by_rank_are_one_where_they_are_equal_and_a_range_where_ranks_are_many():
    from ddpcall.lab.report.words import format_share, list_by_rank

    assert list_by_rank([0.9] * 64, format_share) == "90.0%"
    assert list_by_rank([0.9, 0.8], format_share) == "90.0%, 80.0%"
    assert list_by_rank([0.1, 0.09, None, 0.5, 0.2], format_share) == "9.0% to 50.0%"
