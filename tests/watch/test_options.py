"""Options: what is reported, what fails, and what a comment on the line silences."""

import inspect
from dataclasses import replace

import pytest

import ddpcall
from ddpcall.findings import Place
from ddpcall.watch.options import Options, is_ignored_inline, parse_codes
from ddpcall.watch.output.sarif import to_sarif
from ddpcall.watch.output.text import describe_parameters, render_text
from ddpcall.watch.output.watched import Watched
from ddpcall.watch.session import watch
from tests.watch.test_findings_file import FINDING


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(
        "a(x)\n"
        "a(x)  # ddpcall: ignore[DC101] the probe is trained per rank\n"
        "a(x)  # ddpcall: ignore[DC104, replicas-diverged] not this one\n"
        "a(x)  # ddpcall: ignore\n"
    )
    return path


@pytest.mark.parametrize(
    ("line", "ignored"), [(1, False), (2, True), (3, False), (4, True), (0, False), (99, False)]
)
def test_a_comment_on_the_line_silences_the_codes_it_names(script, line, ignored):
    assert is_ignored_inline(replace(FINDING, file=str(script), line=line)) is ignored


def test_a_comment_on_the_users_line_silences_what_a_library_did_for_it(script):
    inside = replace(FINDING, file="/env/site-packages/foo/loop.py", line=7)
    callers = [Place(str(script), line, "main") for line in (1, 2, 3, 4)]
    assert [is_ignored_inline(replace(inside, called_from=caller)) for caller in callers] == [
        False,
        True,
        False,
        True,
    ]


def test_only_and_ignore_take_codes_and_names():
    assert parse_codes("DC101, hooks-skipped") == {"DC101", "DC301"}
    assert Options(only=parse_codes("DC101")).wants(FINDING)
    assert not Options(only=parse_codes("DC102")).wants(FINDING)
    assert not Options(ignore=parse_codes("gradients-not-synchronized")).wants(FINDING)


@pytest.mark.parametrize(
    ("fail_on", "failing"), [("error", {"error"}), ("warning", {"error", "warning"}), ("never", set())]
)
def test_fail_on_is_the_least_severity_that_fails(fail_on, failing):
    options = Options(fail_on=fail_on)
    assert {severity for severity in ("error", "warning", "note") if options.fails(severity)} == failing


@pytest.mark.parametrize("wrong", [{"on_finding": "shout"}, {"fail_on": "maybe"}, {"every": -1}])
def test_wrong_options_say_what_to_write(wrong):
    with pytest.raises(ValueError, match="write"):
        Options(**wrong)


def test_text_says_what_where_and_what_to_write():
    text = render_text(FINDING)
    assert "DC101 gradients-not-synchronized (error) at train.py:3 in main" in text
    assert "what happened" in text
    assert "write instead: write this" in text


def test_a_librarys_line_is_shown_from_where_it_is_installed_with_the_users_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caller = Place(str(tmp_path / "train.py"), 40, "main")
    file = str(tmp_path / ".venv/lib/python3.11/site-packages/lib/foo.py")
    text = render_text(replace(FINDING, file=file, line=12, function="compute_loss", called_from=caller))
    assert "at lib/foo.py:12 in compute_loss, called from train.py:40 in main\n" in text


def test_long_lists_of_parameters_are_cut():
    many = replace(FINDING, parameters=tuple(f"p{n}" for n in range(9)))
    assert describe_parameters(many) == "p0, p1, p2, p3, p4, p5 and 3 more"


def test_sarif_has_rule_level_and_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = to_sarif(
        [replace(FINDING, file=str(tmp_path / "src" / "train.py")), replace(FINDING, line=0)], Watched()
    )
    (run,) = log["runs"]
    placed, nowhere = run["results"]
    assert log["version"] == "2.1.0"
    assert run["tool"]["driver"]["rules"][placed["ruleIndex"]]["id"] == placed["ruleId"] == "DC101"
    assert placed["level"] == "error"
    assert placed["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "src/train.py"},
        "region": {"startLine": 3},
    }
    assert "locations" not in nowhere


def test_what_ddpcall_watch_takes_is_shown_to_an_editor():
    shown, real = inspect.signature(ddpcall.watch), inspect.signature(watch)
    assert shown == real
    assert {"model", "on_finding", "json", "every", "only"} <= shown.parameters.keys()
