"""The documentation site: it builds strictly (no broken link, no page left out), and loads nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_links_from_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert [path for path, _ in links if path and not (ROOT / path).exists()] == []
