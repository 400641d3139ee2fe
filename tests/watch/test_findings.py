"""The catalogue: complete, its pages written from it, and every event and difference has a rule."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddpcall.findings import CATALOGUE, FAMILIES, Severity, find_rule, render_page, render_pages

PAGES = Path(__file__).parents[2] / "docs" / "findings"


def test_the_catalogue_has_every_code_and_name_once_in_its_family():
    rules = [(heading, rule) for heading, family in FAMILIES.items() for rule in family]
    codes = [rule.code for _, rule in rules]
    assert codes == sorted(set(codes)) == list(CATALOGUE)
    assert len({rule.name for _, rule in rules}) == len(codes)
    assert all(re.fullmatch(heading[:3] + r"\d\d", rule.code) for heading, rule in rules)


@pytest.mark.parametrize("rule", CATALOGUE.values(), ids=lambda rule: rule.code)
def test_a_rule_says_why_what_to_write_and_where_it_is_blind(rule):
    assert all((rule.title, rule.why, rule.wrong, rule.fix, rule.silent_when, rule.blind_to))
    assert all(re.fullmatch(r"https://\S+", link) for link in rule.links)
    assert rule.links


def test_the_pages_in_docs_are_those_of_the_catalogue():
    written = {path.name: path.read_text() for path in PAGES.glob("*.md")}
    assert written == render_pages(), "stale: run `python -m ddpcall explain --write docs/findings`"


@pytest.mark.parametrize("name", ["DC101", "dc101", "gradients-not-synchronized"])
def test_a_rule_is_found_by_code_and_by_name(name):
    assert find_rule(name).code == "DC101"


def test_an_unknown_code_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no finding 'DC999'.*DC101, .*DC503"):
        find_rule("DC999")


def test_severities_have_an_order():
    assert Severity.NOTE.rank < Severity.WARNING.rank < Severity.ERROR.rank


def explain(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ddpcall", "explain", *arguments], capture_output=True, text=True, check=False
    )


def test_explain_prints_the_page_and_wrong_use_exits_with_2():
    good, bad = explain("DC104"), explain("DC999")
    assert (good.returncode, good.stdout.strip()) == (0, render_page(CATALOGUE["DC104"]).strip())
    assert bad.returncode == 2
    assert "no finding 'DC999'" in bad.stderr
