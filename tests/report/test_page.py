"""The page and the Markdown as text: escaped, whole, self-contained."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from ddpcall.evidence import Cell
from ddpcall.lab.report.load import load
from ddpcall.lab.report.markdown import render_markdown
from ddpcall.lab.report.page import embed_json, mark_code, render_page
from ddpcall.lab.report.view import build_view
from tests.report.made import PATHS, make_finding, make_findings, make_run

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&\"'`|*_"
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Page(HTMLParser):
    """What a page consists of: tags with their attributes, headings, the text of scripts, what was left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.scripts += [data] if self.open and self.open[-1] == "script" else []

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]

    @property
    def headings(self) -> list[int]:
        return [int(tag[1]) for tag, _ in self.tags if re.fullmatch("h[1-6]", tag)]


def render(*paths: Path) -> str:
    return render_page(build_view([load(path) for path in paths]))


@pytest.fixture
def evil_run(tmp_path) -> Path:
    cells = [Cell(wrapper="ddp", path=path, model=EVIL) for path in PATHS] + [Cell(wrapper=EVIL, path=EVIL)]
    directory = make_run(
        tmp_path / "evil",
        cells,
        expected={"call": {"gradients": EVIL}},
        crashes={"functional": EVIL},
        experiment=EVIL,
        question=EVIL,
        reason=EVIL,
        outcome=EVIL,
        left_out=[EVIL],
        stacks={"0": EVIL},
    )
    (directory / ".hydra" / "overrides.yaml").write_text(json.dumps([EVIL]))
    timeline = (directory / "timeline.jsonl").read_text().replace('"Mlp"', json.dumps(EVIL))
    (directory / "timeline.jsonl").write_text(timeline)
    return directory


@pytest.fixture
def evil_watch(tmp_path) -> Path:
    (tmp_path / "train.py").write_text(f"{EVIL}\n" * 9)
    texts = dict.fromkeys(("name", "message", "function", "cause", "fix"), EVIL)
    return make_findings(
        tmp_path / "findings.json", make_finding(**texts), make_finding(code=EVIL, severity=EVIL, file=EVIL)
    )


def test_text_of_users_is_text_everywhere(evil_run, evil_watch):
    text = render(evil_run, evil_watch)
    page = Page(text)
    assert "<script>alert" not in text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    data = [
        json.loads(script) for tag, script in zip(script_tags(page), page.scripts, strict=True) if "type" in tag
    ]
    assert any(json.dumps(EVIL)[1:-1] in json.dumps(item) for item in data)
    assert text.count("&lt;/script&gt;&lt;script&gt;alert(&#39;x&#39;)") > 10


def script_tags(page: Page) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in page.tags if tag == "script"]


def test_markdown_keeps_text_of_users_text(evil_run, evil_watch):
    text = render_markdown(build_view([load(evil_run), load(evil_watch)]))
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    page = Page(rendered)
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert "&lt;script&gt;" in rendered
    assert len([tag for tag, _ in page.tags if tag == "table"]) == 3
    assert "<script>" in MarkdownIt("commonmark").render("<script>1</script>")  # so it would have shown


def test_the_page_needs_nothing_from_anywhere(evil_run, evil_watch):
    page = Page(render(evil_run, evil_watch))
    assert page.attributes("src") == []
    hrefs = {href for tag, a in page.tags if (href := a.get("href")) and tag != "a"}
    assert hrefs == {"data:,"}
    assert "@import" not in render(evil_run)
    assert "url(" not in render(evil_run)


def test_the_document_is_well_formed_with_headings_in_order_and_ids_that_are_one_of_a_kind(tmp_path, evil_watch):
    runs = [make_run(tmp_path / name, modes=True, expected={"call": {"gradients": "local"}}) for name in "ab"]
    for paths in (runs[:1], runs, [evil_watch], [*runs, evil_watch]):
        page = Page(render(*paths))
        assert page.open == []
        assert page.tags[0][0] == "html"
        assert page.tags[0][1]["lang"] == "en"
        assert page.headings[0] == 1
        assert page.headings.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(page.headings))
        ids = page.attributes("id")
        assert len(ids) == len(set(ids))
        named = [name for value in page.attributes("aria-labelledby") for name in value.split()]
        assert set(named) <= set(ids)
        assert {href[1:] for href in page.attributes("href") if href.startswith("#")} <= set(ids)


def test_the_truth_table_is_a_table_with_headers_and_words(tmp_path):
    text = render(make_run(tmp_path / "run"))
    table = text[text.index('id="run-0-heat"') :]
    table = table[: table.index("</table>")]
    assert table.count('<th scope="col">') == 6
    assert table.count('<th scope="row">') == 2 * len(PATHS)
    words = re.findall(r'<button type="button" class="(\w+)"[^>]*>(\w+)</button>', table)
    assert len(words) == 4 * len(PATHS)
    assert set(words) == {("good", "synced"), ("lost", "local"), ("good", "fired"), ("part", "skipped")}
    assert table.count('tabindex="0"') == 1


def test_failed_expectations_come_before_everything_else(tmp_path):
    run = make_run(tmp_path / "run", expected={"inner_call": {"gradients": "synced"}})
    text = render(run)
    assert text.index("Not as expected</h2>") < text.index("The truth table</h2>")
    markdown = render_markdown(build_view([load(run)]))
    assert markdown.index("* inner_call, `inner(x)`: gradients is local, expected synced") < markdown.index(
        "| wrapper | path |"
    )
    assert "**local** (expected synced)" in markdown


def test_two_thousand_cells_stay_below_the_limit(tmp_path):
    cells = [Cell(wrapper=f"w{number // 7}", path=PATHS[number % 7], model="my.Mlp") for number in range(2000)]
    text = render(make_run(tmp_path / "run", cells, crashes={"functional": "a long message " * 50}))
    assert len(text.encode()) < 6e6


def test_embedded_json_cannot_end_its_script_element():
    text = embed_json({"a": "</script><!-- \u2028 & é", "b": [float("inf")]})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!-- \u2028 & é", "b": ["inf"]}


def test_prose_is_escaped_before_its_code_is_marked():
    assert mark_code("call `a<b>` & <i>") == "call <code>a&lt;b&gt;</code> &amp; &lt;i&gt;"


def test_the_page_of_a_run_that_hung_says_where_each_rank_was(tmp_path):
    run = make_run(
        tmp_path / "run", outcome="hung", reason="no end after 5 s", stacks={"0": "in wait", "1": "in sleep"}
    )
    text = render(run)
    assert "no end after 5 s" in text
    assert 'rank 1</h3><pre tabindex="0">in sleep</pre>' in text
