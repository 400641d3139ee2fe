"""The runs below a directory: the latest, a sweep's jobs, the page that lists them, and how to repeat one."""

import os
from pathlib import Path

import pytest
import yaml

from ddpcall.evidence import Cell
from ddpcall.lab.report import command
from ddpcall.lab.report.load import load_run
from ddpcall.lab.report.repeat import repeat_command
from ddpcall.lab.runs import differing_overrides, list_jobs, list_runs, write_index
from ddpcall.lab.sweep import print_jobs
from tests.report.made import make_run

CELL = [Cell(wrapper="ddp", path="call", model="my.Mlp")]


def make_sweep(directory: Path, *steps: int) -> Path:
    for number, value in enumerate(steps):
        job = make_run(directory / str(number), CELL)
        (job / ".hydra").mkdir(exist_ok=True)
        (job / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["seed=1", f"steps={value}"]))
    return directory


def test_without_a_path_the_latest_run_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([], out=None, open_it=False, form="html") == 2
    assert "there is no run below" in capsys.readouterr().err
    older, newer = (make_run(tmp_path / "runs" / "a" / name, CELL) for name in ("2-older", "1-newer"))
    os.utime(older / "summary.json", (1, 1))
    assert [path.absolute() for path in list_runs(Path("runs"))] == [newer, older]
    assert command.main([], out=None, open_it=False, form="html") == 0
    assert capsys.readouterr().out == "report: runs/a/1-newer/report.html\n"


def test_a_sweeps_directory_is_its_jobs_side_by_side_in_their_order(tmp_path, capsys):
    sweep = make_sweep(tmp_path / "sweep", *range(2, 13))
    assert [path.name for path in list_jobs(sweep)] == list(map(str, range(11)))
    assert command.main([sweep], out=None, open_it=False, form="html") == 0
    page = (sweep / "report.html").read_text()
    assert "steps=2 and steps=3" in page
    assert list_jobs(sweep / "0") == []  # a run is no sweep
    assert list_jobs(tmp_path / "nothing") == []


def test_a_sweep_ends_in_one_table_of_all_jobs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    sweep = make_sweep(tmp_path / "sweep", 3, 5)
    summaries = [{"outcome": "ok", "trials": load_summary(job)["trials"]} for job in list_jobs(sweep)]
    summaries[1] = {"outcome": "rank lost", "trials": []}
    print_jobs(sweep, list_jobs(sweep), summaries)
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert rows[0][:5] == ["0", "steps=3", "ok", "ddp × call", "synced"]
    assert rows[1][:5] == ["1", "steps=5", "rank lost", "-", "-"]
    assert f"side by side: ddpcall report {sweep}" in out


def load_summary(job: Path) -> dict:
    return yaml.safe_load((job / "summary.json").read_text())


def test_jobs_are_named_by_what_not_all_of_them_have():
    assert differing_overrides([["a=1", "b=2"], ["a=1", "b=3"]]) == ["b=2", "b=3"]
    assert differing_overrides([["a=1"], ["a=1"]]) == ["", ""]
    assert differing_overrides([]) == []


def test_the_index_lists_runs_and_links_their_pages(tmp_path):
    run = make_run(tmp_path / "runs" / "forward_bypass" / "one", CELL)
    make_sweep(tmp_path / "runs" / "train" / "two", 3)
    (run / "report.html").write_text("a page")
    write_index(run)
    page = (tmp_path / "runs" / "index.html").read_text()
    assert '<a href="forward_bypass/one/report.html">forward_bypass/one</a>' in page
    assert "train/two/0" in page
    outside = make_run(tmp_path / "here", CELL)
    write_index(outside)
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("sources", "of_hydra", "expected"),
    [
        ([], [], "--nproc-per-node 2 -m ddpcall train seed=1 steps=3"),
        ([("command-line", "/my conf")], ["hydra.mode=RUN"], "train --config-dir '/my conf' seed=1 steps=3"),
        ([("main", "x")], ["hydra.searchpath=[file:///c]"], "train 'hydra.searchpath=[file:///c]' seed=1 steps=3"),
    ],
)
def test_the_command_that_repeats_a_run_says_where_its_configuration_lies(tmp_path, sources, of_hydra, expected):
    job = make_sweep(tmp_path, 3) / "0"
    found = [{"provider": provider, "path": path, "schema": "file"} for provider, path in sources]
    record = {"hydra": {"runtime": {"config_sources": found}, "overrides": {"hydra": of_hydra, "task": []}}}
    (job / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(record))
    assert repeat_command(load_run(job)).endswith(expected)
