"""What the lab prints at 80 columns, piped, and where the user chose a width or no color."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from ddpcall.evidence import Cell
from ddpcall.lab import console as lab_console
from ddpcall.lab.console import open_console, say
from ddpcall.lab.records import TrialRecord
from ddpcall.lab.report.terminal import print_result, say_left_out, split_columns
from ddpcall.lab.schema import TrainConfig
from ddpcall.paths import CallPath
from ddpcall.verdicts import NO_DATA_PARALLELISM, judge
from ddpcall.wrappers import WRAPPERS
from tests.report.made import ENVIRONMENT, PATHS, make_evidence

TITLES = ["gradients", "mixing", "hooks on wrapped", "hooks on inner", "hooks below"]
TITLES += ["gradients differ by", "test accuracy by rank", "distance from synced run", "as expected"]
DDP_CELLS = [Cell(wrapper="ddp", path=path, model="my.Mlp") for path in PATHS]
SHIPPED = [path for path in CallPath if path is not CallPath.CUSTOM]
ALL_CELLS = [
    Cell(wrapper=wrapper, path=path)
    for wrapper, spec in WRAPPERS.items()
    for path in spec.meaningful_paths()
    if path in SHIPPED
]


def make_results(cells: list[Cell], expected: dict[str, str] | None = None) -> list[TrialRecord]:
    made = [make_evidence(cell) for cell in cells]
    verdicts = [judge(evidence) | {"mixing": "unidentifiable"} for evidence in made]
    verdicts = [
        verdict | {"gradients": NO_DATA_PARALLELISM} if cell.wrapper == "tp" else verdict
        for cell, verdict in zip(cells, verdicts, strict=True)
    ]
    return [
        TrialRecord.of(evidence, expected or {}, verdict) for evidence, verdict in zip(made, verdicts, strict=True)
    ]


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """Return a function that prints results to a terminal of a width; None: into a pipe."""

    def print_results(results: list[TrialRecord], width: int | None, **environment: str) -> str:
        for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        if width is not None:
            monkeypatch.setenv("COLUMNS", str(width))
            monkeypatch.setattr(lab_console._Terminal, "is_terminal", True)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        directory = (
            tmp_path / "a directory whose name is longer than a narrow terminal is wide" / "20261125-142042"
        )
        directory.mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            print_result(TrainConfig(), ENVIRONMENT, results, directory)
        return out.getvalue()

    return print_results


def table_rows(text: str) -> dict[str, list[str]]:
    """Return each row's cells by its label, joined over all tables; a title's lines are joined with a blank."""
    rows: dict[str, list[str]] = {}
    title: list[str] = []
    for line in Text.from_ansi(text).plain.splitlines():
        cells = [cell.strip() for cell in line[1:-1].split(line[0])] if line[:1] in ("┃", "│") else []
        if line.startswith("┃"):
            title = [
                f"{above} {cell}".strip() for above, cell in zip(title or [""] * len(cells), cells, strict=True)
            ]
        elif title:
            rows.setdefault(title[0], []).extend(title[1:])
            title = []
        if line.startswith("│"):
            rows.setdefault(cells[0], []).extend(cells[1:])
    return rows


@pytest.mark.parametrize("width", [60, 80, 100, 140, None])
def test_at_any_width_each_column_is_there_once_and_no_word_is_broken(printed, width):
    text = printed(make_results(DDP_CELLS), width)
    rows = table_rows(text)
    assert rows["wrapper × path"] == TITLES
    numbers = {True: ["0", "90.0% 90.0%", "0"], False: ["0.5", "80.0% 70.0%", "0.25"]}
    for path in PATHS:
        difference, accuracy, distance = numbers[path in ("call", "forward")]
        cells = rows[f"ddp × {path}"]
        assert cells[0] == ("synced" if path in ("call", "forward") else "local")
        assert cells[1] == "unidentifiable"
        assert cells[5:] == [difference, accuracy, distance, "-"]
    drawn = [line for line in Text.from_ansi(text).plain.splitlines() if line[:1] in ("┏", "┃", "│", "└")]
    assert max(map(len, drawn)) <= (width or 200)
    assert (sum(line.startswith("┏") for line in drawn) == 1) == (width in (140, None))


def test_the_paths_below_a_table_stay_whole(printed):
    lines = Text.from_ansi(printed(make_results(DDP_CELLS), 40)).plain.splitlines()
    (evidence,) = [line for line in lines if line.startswith("evidence: ")]
    assert Path(evidence.removeprefix("evidence: ")).name == "20261125-142042"


def test_what_is_piped_has_no_escapes_and_no_line_is_wrapped(printed):
    text = printed(make_results(DDP_CELLS, {"gradients": "synced"}), None)
    assert "\x1b" not in text
    assert len(re.findall(r"^not as expected Mlp: .* gradients is local, expected synced$", text, re.M)) == 5


def test_columns_sets_the_width_of_a_pipe_too(printed):
    text = printed(make_results(DDP_CELLS), None, COLUMNS="80")
    assert table_rows(text)["wrapper × path"] == TITLES
    assert max(len(line) for line in text.splitlines() if "│" in line) <= 80


def test_no_color_leaves_the_words_and_takes_the_colors(printed):
    results = make_results(DDP_CELLS)
    assert re.search(r"\x1b\[[\d;]*3\d", printed(results, 80))
    text = printed(results, 80, NO_COLOR="1")
    assert not re.search(r"\x1b\[(?:[\d;]*;)?(?:3|4|9|10)\d", text)
    assert table_rows(text) == table_rows(printed(results, 80))


def test_many_cells_of_wrapper_and_path_are_a_matrix_with_one_line_a_wrapper(printed):
    results = make_results(ALL_CELLS)
    lines = Text.from_ansi(printed(results, 80)).plain.splitlines()
    assert max(len(line) for line in lines if not line.startswith(("every cell: ", "evidence: "))) <= 80
    by_wrapper = {line.split()[0]: line for line in lines if line.split()[0] in WRAPPERS}
    assert list(by_wrapper) == list(WRAPPERS)
    assert by_wrapper["ddp"].split() == [
        "ddp",
        "synced",
        "synced*",
        "local*",
        "local*",
        "local*",
        "local*",
        "local*",
    ]
    assert by_wrapper["tp"].split() == ["tp", "-", "-*", "-*", "-*", "-*"]
    # A path's name begins where its column does, on one of two lines.
    headings = lines[1:3]
    columns = {
        path: next(line.index(path) for line in headings if re.search(rf"\b{path}\b", line)) for path in SHIPPED
    }
    assert columns[CallPath.FORWARD] == by_wrapper["ddp"].index("synced*")
    assert by_wrapper["tp"][columns[CallPath.INNER_CALL] : columns[CallPath.INNER_METHOD]].isspace()
    assert "│" not in "".join(lines)
    every_cell = next(line for line in lines if line.startswith("every cell: ")).removeprefix("every cell: ")
    assert len(table_rows(Path(every_cell).read_text())) == len(ALL_CELLS) + 1


def test_a_matrix_marks_and_explains_only_what_is_not_as_expected(printed):
    results = make_results(ALL_CELLS)
    position = ALL_CELLS.index(Cell(wrapper="ddp", path="call"))
    (results[position],) = make_results([ALL_CELLS[position]], {"gradients": "local"})
    text = Text.from_ansi(printed(results, 80)).plain
    assert "synced!" in text
    explained = [line for line in text.splitlines() if line.startswith("not as expected")]
    assert explained == ["not as expected : ddp × call: gradients is synced, expected local"]
    assert f"1 of {len(results)} cells are not as expected" in text


def test_pairs_that_make_no_sense_are_one_line(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    reasons = [f"tp × {path} makes no sense: tp works in place" for path in ("inner_call", "inner_forward")]
    say_left_out(reasons[:1])
    say_left_out(reasons)
    say_left_out([])
    assert capsys.readouterr().out.splitlines() == [
        "left out: tp × inner_call makes no sense: tp works in place",
        "left out: 2 pairs that make no sense, such as tp × inner_call",
    ]


def test_a_sentence_wraps_between_words_and_a_long_path_stays_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    path = "/a/path/that/is/longer/than/the/terminal/is/wide"
    say(f"one sentence that wraps and names {path}")
    assert capsys.readouterr().out.splitlines() == ["one sentence that wraps and", "names", path]


def test_columns_are_dealt_out_in_order_and_each_fits():
    console = Console(width=30)
    header = ["name", *"abcdef"]
    rows = [["a row", *(letter * 8 for letter in "abcdef")]]
    assert list(split_columns(console, header, rows, 1)) == [[0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [0, 6]]
    assert list(split_columns(Console(width=31), header, rows, 1)) == [[0, 1, 2], [0, 3, 4], [0, 5, 6]]


def test_an_open_console_is_unlimited_only_where_nobody_set_a_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    with contextlib.redirect_stdout(io.StringIO()):
        assert open_console().width > 1_000
        monkeypatch.setenv("COLUMNS", "77")
        assert open_console().width == 77


def test_a_wide_terminal_gives_a_matrix_room(printed):
    lines = Text.from_ansi(printed(make_results(ALL_CELLS), 120)).plain.splitlines()
    row = next(line for line in lines if line.startswith("ddp "))
    assert row.index("synced*") - row.index("synced ") == 10
