"""A real run leaves its page, and the page says what the run measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ddpcall.lab.records import RunRecord
from ddpcall.lab.report.load import load
from ddpcall.lab.report.view import build_view

ROOT = Path(__file__).parents[2]


def train(directory: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "launch/train.py", "device=cpu", "steps=4", f"hydra.run.dir={directory}", *overrides]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    done = train(directory, "experiment=forward_bypass", "grid.path=[call,inner_call]", "tensorboard=false")
    assert done.returncode == 0, done.stderr
    assert f"report: {directory / 'report.html'}" in done.stdout
    return directory


def test_the_page_has_the_runs_verdicts_and_the_same_answer_as_a_report_made_later(run):
    record = load(run)
    assert isinstance(record, RunRecord)
    assert record.problems == ()
    view = build_view([record]).runs[0]
    page = (run / "report.html").read_text()
    assert view.table is not None
    shown = [[cell.word for cell in row.cells] for row in view.table.rows]
    summary = json.loads((run / "summary.json").read_text())
    assert shown == [[trial["verdicts"][name] for name, _ in view.table.columns] for trial in summary["trials"]]
    assert "<code>call</code> keeps the gradients synchronized, while <code>inner_call</code> leaves" in page
    assert view.command == (
        "torchrun --standalone --nproc-per-node 2 -m ddpcall train device=cpu steps=4 experiment=forward_bypass "
        "'grid.path=[call,inner_call]' tensorboard=false"
    )


def test_the_command_to_repeat_the_run_is_one_that_hydra_takes(run):
    view = build_view([load(run)]).runs[0]
    command = view.command.split(" -m ", 1)[1].replace("'", "").split()
    done = subprocess.run(
        [sys.executable, "-m", *command, "--cfg", "job"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0
    assert "steps: 4" in done.stdout


def test_no_report_when_none_is_wanted(tmp_path):
    done = train(tmp_path / "run", "ranks=1", "wrapper=none", "path=forward", "report=false", "tensorboard=false")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_run_that_failed_leaves_its_page_too(tmp_path):
    done = train(
        tmp_path / "run", "ranks=1", "wrapper=none", "path=call", "trial_timeout_s=0.001", "tensorboard=false"
    )
    assert done.returncode == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The run did not end well (hung)" in page
    assert "Where each rank was when the run was cut" in page
