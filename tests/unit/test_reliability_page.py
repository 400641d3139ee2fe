"""docs/reliability.md names a test for every promise, and the tests are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = [
    line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines()
    if line.startswith("| ") and "::" in line
]  # fmt: skip


def test_every_fault_has_a_test_that_is_there():
    for row in ROWS:
        named = re.findall(r"`(tests/\S+?)::(\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"


def test_the_page_has_rows():
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert len(ROWS) > 30
    assert text.count("| tests |") == text.count("| fault |"), "every table of faults names tests"
