"""`ddpcall report` from the outside: where it writes, what it says, how it exits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ddpcall.lab.report import command
from tests.report.made import make_finding, make_findings, make_run


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ddpcall", "report", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)


def make(capsys, *paths: Path, form: str = "html", out: Path | None = None) -> tuple[int, str, str]:
    code = command.main(paths, out=out, open_it=False, form=form)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_page_of_one_run_lies_in_its_directory(tmp_path):
    run = make_run(tmp_path / "run")
    done = report(run)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"report: {run / 'report.html'}\n", "")
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert not list(run.glob(".*part"))


def test_the_page_of_findings_lies_beside_them(tmp_path, capsys):
    file = make_findings(tmp_path / "found.json", make_finding())
    assert make(capsys, file)[0] == 0
    assert "DC101" in (tmp_path / "found.html").read_text()


def test_several_runs_go_into_one_page_in_the_working_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / name) for name in "ab"]
    assert make(capsys, *runs) == (0, "report: report.html\n", "")
    assert "What differs</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("form", "begins"), [("md", "## forward"), ("json", '{\n  "schema": 2')])
def test_text_formats_go_to_standard_output_unless_a_file_is_named(tmp_path, capsys, form, begins):
    run = make_run(tmp_path / "run")
    code, out, _ = make(capsys, run, form=form)
    assert code == 0
    assert out.startswith(begins)
    assert make(capsys, run, form=form, out=tmp_path / "new" / "file")[0] == 0
    assert (tmp_path / "new" / "file").read_text() == out


def test_the_page_can_go_to_standard_output(tmp_path, capsys):
    code, out, _ = make(capsys, make_run(tmp_path / "run"), out=Path("-"))
    assert code == 0
    assert out.startswith("<!doctype html>")


def test_two_only_when_nothing_can_be_shown(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    code, _, err = make(capsys, tmp_path / "empty", tmp_path / "missing")
    assert code == 2
    assert [line.split(": ")[0] for line in err.splitlines()] == ["ddpcall", "ddpcall"]
    code, out, err = make(capsys, tmp_path / "empty", run, form="json")
    assert code == 0
    assert "is empty" in err
    assert "is empty" in json.loads(out)["problems"][0]


def test_what_could_not_be_read_is_said_and_the_rest_is_shown(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text("{")
    code, _, err = make(capsys, run)
    assert code == 0
    assert err.startswith(f"ddpcall: {run}: summary.json cannot be read (")
    assert "How the run ended is not known" in (run / "report.html").read_text()


def test_a_place_that_cannot_be_written_is_wrong_use(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = make(capsys, make_run(tmp_path / "run"), out=tmp_path / "file" / "report.html")
    assert code == 2
    assert "Write another place: --out FILE" in err


def test_wrong_use_is_explained(tmp_path):
    done = report("--format", "pdf", tmp_path)
    assert done.returncode == 2
    assert "invalid choice: 'pdf'" in done.stderr


def test_a_trace_is_made_of_one_run_with_a_timeline(tmp_path, capsys):
    pytest.importorskip("ddpcall.lab.perfetto")
    run = make_run(tmp_path / "run")
    code, out, _ = make(capsys, run, form="perfetto")
    assert code == 0
    assert out.startswith(f"trace: {run / 'trace.json'}")
    assert json.loads((run / "trace.json").read_text())["traceEvents"]
    (run / "timeline.jsonl").unlink()
    code, _, err = make(capsys, run, form="perfetto")
    assert code == 2
    assert "probes.timeline=true" in err


def test_a_report_that_cannot_be_made_costs_a_run_one_line(tmp_path, capsys):
    command.leave_report(tmp_path / "missing", wanted=True)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("ddpcall: no report.html: NothingToShow: ")
    command.leave_report(tmp_path / "missing", wanted=False)
    assert capsys.readouterr() == ("", "")


def test_without_the_labs_packages_the_command_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['jinja2'] = None; from ddpcall.cli import main; main(['report', sys.argv[1]])"
    run = make_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", code, run], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "pip install 'ddpcall[lab]'" in done.stderr
