"""The table of versions covers the range that the package declares, and its script reads what it writes."""

import pytest

from tests import versions
from tests.versions import PASSED, Row

PIP = """torch (2.15.0)
Available versions: 2.15.0, 2.14.1, 2.13.0, 2.11.1, 2.11.0, 2.10.0
  INSTALLED: 2.13.0
"""
GOOD = Row("2.13.0", "3.11.7", (PASSED,) * 4, "2026-11-25")


def test_the_table_covers_the_supported_range_and_what_failed_is_explained():
    page = versions.PAGE.read_text()
    rows = versions.read_rows(page)
    torches = {row.torch for row in rows}
    assert any(torch.startswith(versions.read_lower_bound() + ".") for torch in torches)
    assert versions.read_constrained() in torches
    assert rows[-1].key[0] > versions.numbers_of(versions.read_constrained())
    for row in rows:
        assert set(row.cells) == {PASSED} or f"* torch {row.torch}:" in page


def test_what_is_written_is_read_again_and_the_rest_of_the_page_stays():
    page = versions.PAGE.read_text()
    bad = Row("2.11.0", "3.11.7", (PASSED, "exit code 1, not 0", PASSED, "a / b"), "2026-11-25")
    written = versions.write_rows(page, [bad, GOOD])
    assert versions.read_rows(written) == [bad, GOOD]
    assert versions.write_rows(written, versions.read_rows(page)) == page
    assert "a / b" in versions.write_rows(page, [Row("2.11.0", "3.11.7", ("a | b",) * 4, "")])


def test_a_new_row_takes_the_place_of_the_same_versions_and_rows_are_in_order():
    newer, other = (
        Row("2.13.0", "3.11.9", ("failed",) * 4, "2026-12-01"),
        Row("2.9.0", "3.11.7", (PASSED,) * 4, ""),
    )
    assert versions.merge_rows([GOOD], [newer, other]) == [other, newer]


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="no markers"):
        versions.read_rows("# Versions")


def test_the_oldest_supported_the_constrained_and_the_newest_torch_are_chosen():
    offered = versions.read_offered(PIP)
    assert versions.choose_versions(offered, "2.11", "2.13.0") == ["2.11.0", "2.13.0", "2.15.0"]
    assert versions.choose_versions(offered, "2.13", "2.13.0") == ["2.13.0", "2.15.0"]


def test_the_script_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        versions.main(["--help"])
    assert stopped.value.code == 0
    assert "--environment DIR" in capsys.readouterr().out
