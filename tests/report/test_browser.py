"""The page in a real browser: it answers to mouse and keyboard, asks nobody for anything, complains of nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ddpcall.compare.command import main as compare
from ddpcall.evidence import Cell
from ddpcall.lab.report.compared import render_page as render_compared
from ddpcall.lab.report.load import load
from ddpcall.lab.report.page import render_page
from ddpcall.lab.report.view import build_view
from tests.ranks.test_record_and_compare import make_model, record, train
from tests.report import test_many_ranks
from tests.report.chromium import CHROMIUM, DRIVER, MISSING, set_view, start_chromium
from tests.report.made import (
    PATHS,
    make_comparisons,
    make_finding,
    make_findings,
    make_mixing,
    make_run,
    make_watched,
)

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'ddpcall[dev]'")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

if not (CHROMIUM and DRIVER):
    pytest.skip(MISSING, allow_module_level=True)


many_ranks = test_many_ranks.page  # the fixture


class Browser:
    """Chromium with an empty profile, and what it logged."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, width: int = 1600, height: int = 1000, scheme: str = "light") -> None:
        """Show a page; what was logged before is forgotten."""
        set_view(self.driver, width, height, scheme)
        self.complaints()
        self.requests()
        self.driver.get(page.as_uri())

    def complaints(self) -> list[str]:
        """Return what the console said since the last call: errors, warnings, violations of the page's policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses asked for since the last call, but for files and data in the page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith(("file:", "data:"))]

    def run(self, script: str, *arguments: object) -> object:
        """Run a script in the page and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def find(self, selector: str) -> list:
        """Return all elements that a CSS selector finds."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    @property
    def focused(self) -> str:
        """Return the text of the element that has the focus."""
        return str(self.run("return document.activeElement.textContent")).strip()

    @property
    def is_open(self) -> bool:
        """Say whether the evidence is shown."""
        return bool(self.run("return document.getElementById('evidence').open"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    driver = start_chromium(tmp_path_factory.mktemp("profile"))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


def write_page(directory: Path, *paths: Path) -> Path:
    place = directory / "report.html"
    place.write_text(render_page(build_view([load(path) for path in paths])))
    return place


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """Pages of all kinds, by name."""
    root = tmp_path_factory.mktemp("pages")
    run = make_run(
        root / "run", modes=True, expected={"inner_call": {"gradients": "synced"}}, crashes={"functional": "x"}
    )
    grid = [Cell(wrapper=w, path=p) for w in ("ddp", "replicate", "fsdp2") for p in PATHS]
    (root / "train.py").write_text("x = '<script>alert(1)</script>'\n" * 9)
    findings = make_findings(
        root / "findings.json",
        make_finding(),
        make_finding(code="DC301", severity="warning", line=2),
        watched=make_watched(30),
    )
    eight = [[0.25] * 4 + [float(i == j) for j in range(4)] for i in range(4)]
    mixings = {
        "call": make_mixing([[0.5, 0.5], [0.5, 0.5]], "averaged"),
        "inner_call": make_mixing([[1.0, 0.0], [0.0, 1.0]], "local"),
        "forward": make_mixing(eight, "partly_local"),
        "functional": make_mixing([[1 / 16] * 16] * 16, "averaged"),
    }
    paths = {
        "run": (run,),
        "mixing": (make_run(root / "mixing", mixings=mixings),),
        "grid": (make_run(root / "grid", grid),),
        "pair": (run, make_run(root / "other")),
        "comparisons": (make_run(root / "comparisons", (), **make_comparisons()),),
        "watch": (findings,),
        "unwatched": (make_findings(root / "unwatched.json", watched=make_watched(0)),),
    }
    for name in paths:
        (root / f"page-{name}").mkdir()
    return {name: write_page(root / f"page-{name}", *those) for name, those in paths.items()}


NAMES = ("run", "grid", "pair", "comparisons", "watch", "unwatched", "mixing")


def test_what_the_browser_logs_is_seen_here(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><title>x</title><img src='http://127.0.0.1:9/x.png'><script>missing()</script>"
    )
    browser.open(page)
    assert any("missing is not defined" in complaint for complaint in browser.complaints())
    assert browser.requests() == ["http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_open_without_complaint_or_request(browser, pages, name, scheme):
    browser.open(pages[name], scheme=scheme)
    for details in browser.find("details > summary"):
        details.click()
    assert browser.complaints() == []
    assert browser.requests() == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [400, 1600])
def test_the_page_itself_never_scrolls_sideways(browser, pages, name, width):
    browser.open(pages[name], width=width)
    assert browser.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_runs_off_the_page_of_two_recorded_runs(browser, tmp_path, width):
    place = tmp_path / ("a_directory_with_a_long_name_" * 3)
    for name, lr in (("A", 0.01), ("B", 0.02)):
        record(place / name, train, make_model(nn.BatchNorm1d(16)), lr=lr)
    page = tmp_path / "compared.html"
    assert compare(place / "A", place / "B", None, None, (page, render_compared)) == 1
    browser.open(page, width=width)
    assert browser.complaints() == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    beyond = (
        "return [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    )
    assert browser.run(f"{beyond}.map(e => e.outerHTML)") == []
    assert "Learning rates are 0.01 in A and 0.02 in B" in browser.find(".message")[0].text


@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_of_64_ranks_is_cut_off_or_covered(browser, many_ranks, width):
    browser.open(many_ranks, width=width)
    assert browser.complaints() == []
    assert browser.run("return document.documentElement.scrollWidth") <= width
    matrices = browser.find(".mixing svg")
    assert len(matrices) == 2
    beyond = """
        const box = arguments[0].getBoundingClientRect(), texts = [...arguments[0].querySelectorAll("text")];
        return texts.filter(text => { const own = text.getBoundingClientRect();
            return own.left < box.left || own.right > box.right || own.top < box.top || own.bottom > box.bottom;
        }).map(text => text.textContent);"""
    covered = """
        const boxes = [...arguments[0].querySelectorAll(arguments[1])].map(text => text.getBoundingClientRect());
        const covers = (box, i) => i && box.top === boxes[i - 1].top && box.left < boxes[i - 1].right;
        return boxes.filter(covers).length;"""
    for matrix in matrices:
        assert browser.run(beyond, matrix) == []
        assert browser.run(covered, matrix, "[role=columnheader]") == 0
        assert browser.run(covered, matrix, "[role=gridcell] text") == 0
    for dots in browser.find(".dots") if width == 1200 else []:
        assert browser.run(covered, dots, "span") == 0


def test_a_click_opens_the_evidence_of_that_cell(browser, pages):
    browser.open(pages["run"])
    cell = browser.find("#run-0-heat tbody tr:nth-child(3) td button")[0]
    assert cell.text.startswith("local")
    cell.click()
    assert browser.is_open
    assert browser.find("#evidence h2")[0].text == "ddp × inner_call"
    asked = browser.find("#evidence .asked")
    assert [part.find_element(By.TAG_NAME, "h3").text for part in asked] == ["gradients\nlocal\nexpected: synced"]
    assert "0.5 (largest gradient 1)" in asked[0].text
    browser.find("#evidence .close")[0].click()
    assert not browser.is_open


def test_the_keyboard_reaches_every_cell_opens_and_closes(browser, pages):
    browser.open(pages["run"])
    browser.run("document.querySelector('#run-0-heat').closest('section').querySelector('h2').scrollIntoView()")
    browser.run("document.querySelector('#run-0-heat button[tabindex=\"0\"]').focus()")
    assert browser.focused == "synced"
    browser.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert browser.focused == "skipped"
    browser.press(Keys.ENTER)
    assert browser.is_open
    assert browser.find("#evidence h2")[0].text == "ddp × inner_call"
    assert browser.find("#evidence .asked h3")[0].text == "hooks on wrapped\nskipped"
    browser.press(Keys.ESCAPE)
    assert not browser.is_open
    assert browser.focused == "skipped"
    browser.press(Keys.END, Keys.ARROW_UP, Keys.HOME)
    assert browser.focused == "synced"
    browser.press(Keys.TAB)
    assert browser.run("return document.activeElement.closest('#run-0-heat')") is None
    browser.press(Keys.SHIFT, Keys.TAB)
    assert browser.run("return document.querySelectorAll('#run-0-heat button[tabindex=\"0\"]').length") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1600])
def test_an_entry_of_a_mixing_matrix_says_what_it_means_to_mouse_and_keyboard(browser, pages, scheme, width):
    browser.open(pages["mixing"], width=width, scheme=scheme)
    figures = browser.find("figure.mixing")
    assert [len(figure.find_elements(By.CSS_SELECTOR, "[role=gridcell]")) for figure in figures] == [4, 32, 4, 256]
    local = figures[2]
    says = local.find_element(By.CSS_SELECTOR, ".says")
    browser.run("arguments[0].scrollIntoView({block: 'center'})", local)
    cells = local.find_elements(By.CSS_SELECTOR, "[role=gridcell]")
    webdriver.ActionChains(browser.driver).move_to_element(cells[3]).perform()
    assert says.text == "rank 1 uses 1 of its own gradient"
    browser.run("arguments[0].focus()", cells[0])
    assert says.text == "rank 0 uses 1 of its own gradient"
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)  # the second has nowhere to go
    assert says.text == "rank 0 uses nothing of rank 1's gradient"
    browser.press(Keys.ARROW_DOWN, Keys.HOME)
    assert says.text == "rank 1 uses nothing of rank 0's gradient"
    assert [cell.get_attribute("tabindex") for cell in cells] == ["-1", "-1", "0", "-1"]
    assert browser.run("return document.activeElement.getAttribute('aria-label')") == says.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_numbers_of_a_mixing_matrix_can_be_read(browser, pages, scheme):
    """Contrast of at least 4.5 between an entry's number and what it stands on, as WCAG AA asks."""
    browser.open(pages["mixing"], scheme=scheme)
    ratios = browser.run("""
        const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const light = (c) => c.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        return [...document.querySelectorAll(".mixing [role=gridcell]")].map((cell) => {
            const [under, over] = [...cell.querySelectorAll("rect")];
            const [a, b] = [rgb(getComputedStyle(under).fill), rgb(getComputedStyle(over).fill)];
            const share = Number(over.getAttribute("fill-opacity"));
            const ground = light(a.map((v, i) => v + (b[i] - v) * share));
            const ink = light(rgb(getComputedStyle(cell.querySelector("text")).fill));
            return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
        });""")
    assert min(ratios) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [420, 1600])
@pytest.mark.parametrize(
    ("name", "words", "tone"),
    [
        ("watch", "Watched. 1 DDP model, 30 steps on 2 of 2 ranks.", "--other-bg"),
        (
            "unwatched",
            "Too little was watched. Nothing could be found out: no step of a torch optimizer was taken",
            "--part-bg",
        ),
    ],
)
def test_what_was_watched_is_seen_first_and_too_little_of_it_in_the_color_of_a_warning(
    browser, pages, name, words, tone, width, scheme
):
    browser.open(pages[name], width=width, scheme=scheme)
    (coverage,) = browser.find(".coverage")
    (answer,) = browser.find(".answer")
    assert coverage.text.startswith(words)
    assert coverage.location["y"] + coverage.size["height"] <= min(answer.location["y"], 600)
    color, of_tone = browser.run(
        """
        const swatch = document.body.appendChild(document.createElement("i"));
        swatch.style.backgroundColor = `var(${arguments[1]})`;
        return [arguments[0], swatch].map((each) => getComputedStyle(each).backgroundColor);""",
        coverage,
        tone,
    )
    assert color == of_tone
    assert not browser.find(".good")


def test_tab_alone_comes_to_the_truth_table(browser, pages):
    browser.open(pages["run"])
    for _ in range(40):
        browser.press(Keys.TAB)
        if browser.run("return document.activeElement.closest('#run-0-heat') !== null"):
            break
    else:
        pytest.fail("40 Tabs did not reach the table")
    browser.press(Keys.ENTER)
    assert browser.is_open


def test_the_overview_and_the_failed_expectations_open_evidence_too(browser, pages):
    browser.open(pages["grid"])
    browser.find(".overview button[data-row='9']")[0].click()
    assert browser.find("#evidence h2")[0].text == "replicate × inner_call"
    browser.open(pages["run"])
    browser.find(".failed button")[0].click()
    assert browser.find("#evidence h2")[0].text == "ddp × inner_call"


def test_each_run_of_a_pair_opens_its_own_evidence(browser, pages):
    browser.open(pages["pair"])
    for run, word in (("run-0", "crashed"), ("run-1", "local")):
        browser.find(f"#{run}-heat tbody tr:last-child td button")[0].click()
        assert browser.find("#evidence .verdict")[0].text == word
        browser.press(Keys.ESCAPE)


def test_the_filter_leaves_the_rows_that_have_all_words(browser, pages):
    browser.open(pages["grid"])
    field = browser.find("#run-0-filter")[0]
    field.send_keys("fsdp2 local")
    shown = [row.text.split()[:2] for row in browser.find("#run-0-heat tbody tr") if row.is_displayed()]
    assert shown == [["fsdp2", path] for path in PATHS[2:]]
    assert browser.find("#run-0-filter-count")[0].text == "5 of 21 cells"


def test_the_step_slider_shows_each_curves_value(browser, pages):
    browser.open(pages["run"])
    figure = browser.find("figure[data-plot]")[0]
    slider = figure.find_element(By.CSS_SELECTOR, "input")
    values = lambda: [output.text for output in figure.find_elements(By.CSS_SELECTOR, ".keys output")]  # noqa: E731
    assert values() == ["0", "0.3"]
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert values() == ["0", "0.2"]


def test_text_of_users_does_not_run_when_it_is_opened(browser, tmp_path):
    evil = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"
    run = make_run(
        tmp_path / "run", [Cell(wrapper="ddp", path="call", model=evil)], crashes={"call": evil}, question=evil
    )
    page = write_page(tmp_path, run)
    browser.open(page)
    browser.find("#run-0-heat button")[0].click()
    assert evil in browser.find("#evidence")[0].text
    assert browser.driver.title == "forward_bypass · ddpcall report"
    assert browser.complaints() == []


def axe_source() -> str:
    package = pytest.importorskip("axe_selenium_python", reason="needs axe: pip install 'ddpcall[dev]'")
    return next(Path(package.__file__).parent.rglob("axe.min.js")).read_text()


def violations(browser: Browser) -> list[str]:
    browser.run(axe_source())
    found = browser.driver.execute_async_script("const done = arguments[0]; axe.run(document).then(done);")
    return [
        f"{violation['id']}: {node['html'][:160]} {node['failureSummary'][:400]}"
        for violation in found["violations"]
        for node in violation["nodes"][:3]
    ]


def test_axe_sees_what_is_wrong_on_a_bad_page(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><title>x</title><p style='color:#999;background:#fff'>pale</p><img src='data:,'>"
    )
    browser.open(page)
    assert {violation.split(":")[0] for violation in violations(browser)} >= {
        "color-contrast",
        "image-alt",
        "html-has-lang",
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_wrong(browser, pages, name, scheme):
    browser.open(pages[name], scheme=scheme)
    browser.run("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert violations(browser) == []


def test_axe_finds_nothing_wrong_with_open_evidence(browser, pages):
    browser.open(pages["run"])
    browser.find("#run-0-heat tbody tr:last-child td button")[0].click()
    assert violations(browser) == []


def test_two_thousand_cells_open_and_answer(browser, tmp_path):
    cells = [Cell(wrapper=f"w{number // 7}", path=PATHS[number % 7]) for number in range(2000)]
    page = write_page(tmp_path, make_run(tmp_path / "run", cells))
    browser.open(page)
    assert len(browser.find("#run-0-heat tbody tr")) == 2000
    assert browser.run("return document.querySelectorAll('*').length") < 60_000
    browser.run("document.querySelector('#run-0-heat tbody tr:last-child td button').click()")
    assert browser.find("#evidence h2")[0].text == "w285 × inner_method"
    browser.press(Keys.ESCAPE)
    browser.find("#run-0-filter")[0].send_keys("w77")
    assert browser.find("#run-0-filter-count")[0].text == "7 of 2000 cells"
    assert browser.complaints() == []


def test_it_prints_in_light_colors_with_everything_open(browser, pages):
    browser.open(pages["run"], scheme="dark")
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return getComputedStyle(document.body).color") == "rgb(21, 24, 30)"
    assert browser.run("return [...document.querySelectorAll('details')].every((part) => part.open)")
    assert not browser.find("nav")[0].is_displayed()
