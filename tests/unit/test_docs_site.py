"""The documentation site: it builds strictly (no broken link, no page left out), and loads nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ddpcall.teach.claims import CLAIMS
from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.lesson import LESSONS
from ddpcall.teach.pages import page_name
from tests.report.chromium import CHROMIUM, DRIVER, MISSING, set_view, start_chromium

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="write: pip install '.[docs]'")
    directory = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return directory


def test_pages_load_nothing_from_elsewhere(site):
    loading = re.compile(r"""<(?:script|img|link|iframe)[^>]+(?:src|href)=["']?(https?:)?//""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    assert [page.name for page in pages if loading.search(page.read_text())] == []


def test_the_reference_shows_what_docstrings_say(site):
    page = (site / "reference" / "watch.html").read_text()
    for promise in ("raises WatchError where the harm is done", "Another watch is running in this process"):
        assert promise in re.sub(r"<[^>]+>", "", page)


def test_a_lessons_questions_are_a_list_and_their_choices_lists_in_it(site):
    for lesson in LESSONS:
        page = (site / "labs" / page_name(lesson).replace(".md", ".html")).read_text()
        predict = page.partition('id="predict"')[2].partition('id="run"')[0]
        counts = [len(re.findall(f"<{tag}>", predict)) for tag in ("ol", "ul", "li")]
        choices = sum(len(question.choices) for question in lesson.predict)
        assert counts == [1, len(lesson.predict), len(lesson.predict) + choices], lesson.name


def test_the_home_shows_a_picture_and_a_finding_and_links_to_pages_that_make_docs_builds(site):
    page = (site / "index.html").read_text()
    assert 'src="images/report.png"' in page
    assert "DC101 gradients-not-synchronized" in re.sub(r"<[^>]+>", "", page)
    (experiments,) = re.findall(r"^LIVE := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all((ROOT / "conf" / "experiment" / f"{name}.yaml").exists() for name in experiments.split())
    linked = set(re.findall(r'href="?live/(\w+)\.html', page))
    assert linked == {*experiments.split(), "watch"}


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
def test_nothing_runs_off_a_narrow_screen(site, tmp_path):
    driver = start_chromium(tmp_path)
    try:
        set_view(driver, 420, 900, "light")
        for name in (
            "index.html",
            "watch.html",
            "labs/02_who_synchronizes.html",
            "semantics.html",
            "own_code.html",
            "decisions.html",
            "integrations.html",
        ):
            driver.get((site / name).as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 420, name
    finally:
        driver.quit()


def test_the_readme_is_short_in_its_order_and_its_counts_are_true():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Install",
        "What each way of calling the model loses",
        "Watch",
        "Test",
        "Teach",
        "What it is blind to",
        "Map of rooms",
        "Develop",
    ]
    wrappers = len(re.findall(r"^## ", (ROOT / "docs" / "semantics.md").read_text(), re.MULTILINE))
    assert f"the same for {wrappers} wrappers" in text
    assert f"# {len(CLAIMS)} claims about forward" in text
    numbers = {8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve"}
    assert f"# {numbers[len(LESSONS)]} lessons and {numbers[len(EXERCISES)]} exercises" in text


def test_links_from_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert [path for path, _ in links if path and not (ROOT / path).exists()] == []
