"""Findings on disk: merged from all ranks at any time, whoever writes and whoever dies."""

import fcntl
import json
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ddpcall.findings import Finding, Place
from ddpcall.watch.launch import current_launch
from ddpcall.watch.options import Options
from ddpcall.watch.output.findings_file import FindingsFile, merge_findings
from ddpcall.watch.session import Session

FINDING = Finding(
    code="DC101",
    name="gradients-not-synchronized",
    severity="error",
    message="what happened",
    file="train.py",
    line=3,
    function="main",
    ranks=(0,),
    step=2,
    parameters=("w",),
    cause="bypassed",
    fix="write this",
)


def read(path: Path) -> list[dict]:
    record = json.loads(path.read_text())
    assert record.keys() == {"schema", "watched", "findings"}
    assert record["schema"] == 1
    return record["findings"]


def test_one_site_and_cause_is_one_finding_over_ranks_and_steps():
    other = replace(FINDING, ranks=(1,), step=1, parameters=("b",), count=7)
    (merged,) = merge_findings([FINDING, other])
    assert (merged.ranks, merged.step, merged.parameters, merged.count) == ((0, 1), 1, ("w", "b"), 7)


@pytest.mark.parametrize(
    "change", [{"line": 4}, {"cause": "raw_weights"}, {"code": "DC104"}, {"file": "other.py"}]
)
def test_other_sites_and_causes_stay_apart(change):
    assert len(merge_findings([FINDING, replace(FINDING, **change)])) == 2


def test_an_empty_run_leaves_an_empty_list(tmp_path):
    FindingsFile(tmp_path / "new" / "findings.json", "run").write("0", [])
    assert read(tmp_path / "new" / "findings.json") == []


def test_the_line_that_led_there_is_in_the_file_and_comes_back_from_it(tmp_path):
    findings_file = FindingsFile(tmp_path / "findings.json", "run")
    inside = replace(FINDING, called_from=Place("main.py", 40, "main"))
    findings_file.write("0", [inside])
    assert read(findings_file.path)[0]["called_from"] == {"file": "main.py", "line": 40, "function": "main"}
    assert findings_file.read().findings == {"0": [inside]}


def test_what_a_rank_withdraws_is_gone_and_what_others_said_stays(tmp_path):
    findings_file = FindingsFile(tmp_path / "f.json", "run")
    findings_file.write("0", [FINDING])
    findings_file.write("1", [replace(FINDING, ranks=(1,)), replace(FINDING, line=9, ranks=(1,))])
    assert [(f["line"], f["ranks"]) for f in read(tmp_path / "f.json")] == [(3, [0, 1]), (9, [1])]
    findings_file.write("1", [])
    assert [(f["line"], f["ranks"]) for f in read(tmp_path / "f.json")] == [(3, [0])]


def test_another_run_starts_anew(tmp_path):
    FindingsFile(tmp_path / "f.json", "yesterday").write("0", [FINDING], done=True)
    today = FindingsFile(tmp_path / "f.json", "today")
    assert today.read().findings == {}
    assert today.write("1", []).done == set()
    assert read(tmp_path / "f.json") == []


def _write_many(path: Path, rank: int) -> None:
    findings_file = FindingsFile(path, "run")
    told = []
    for line in range(1, 21):
        found = [replace(FINDING, line=n, ranks=(rank,)) for n in range(1, line + 1)]
        told.append(findings_file.write(str(rank), found, done=line == 20))
    is_last = told[-1].done == {"0", "1", "2"}
    path.with_name(f"told{rank}").write_text(json.dumps([sum(len(said.new) for said in told), is_last]))


def test_ranks_that_write_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(tmp_path / "f.json", rank)) for rank in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [(f["line"], f["ranks"]) for f in read(tmp_path / "f.json")] == [(n, [0, 1, 2]) for n in range(1, 21)]
    told = [json.loads((tmp_path / f"told{rank}").read_text()) for rank in range(3)]
    assert sum(new for new, _ in told) == 20, "each finding was news to one rank alone"
    assert sum(is_last for _, is_last in told) == 1


def test_the_ranks_own_files_are_removed_at_the_end(tmp_path):
    findings_file = FindingsFile(tmp_path / "f.json", "run")
    findings_file.write("0", [FINDING], done=True)
    findings_file.remove_state(keep=True)
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
    findings_file.remove_state(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_was_stopped_while_writing_holds_nobody_up(tmp_path):
    findings_file = FindingsFile(tmp_path / "f.json", "run", patience_s=0.2)
    findings_file.write("0", [FINDING])
    with open(tmp_path / ".f.json.lock") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        begun = time.monotonic()
        assert findings_file.write("1", [replace(FINDING, ranks=(1,))]).new == set()
        assert time.monotonic() - begun >= 0.2, "it was waited for first"
    assert [f["ranks"] for f in read(tmp_path / "f.json")] == [[0, 1]]


def test_findings_that_cannot_be_written_are_said_once_and_kept(tmp_path, capsys):
    session = Session(Options(json=tmp_path / "out" / "f.json", on_finding="record")).open()
    assert read(tmp_path / "out" / "f.json") == []
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("in its place")
    for line in (1, 2):
        session.book.report(replace(FINDING, line=line))
    session.close()
    assert [finding.line for finding in session.all_findings()] == [1, 2]
    assert capsys.readouterr().err.count("ddpcall watch: cannot write findings to") == 1


ENVIRONMENT = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29400",
}


def launch(monkeypatch, **changed):
    for name, value in {**ENVIRONMENT, **changed}.items():
        monkeypatch.setenv(name, value)
    return current_launch()


def test_hosts_that_share_a_file_add_to_each_other(monkeypatch, tmp_path):
    """Two launchers, four ranks: what one host's ranks said is not lost when the other's have all left."""
    ranks = [
        launch(monkeypatch, RANK=str(rank), LOCAL_RANK=str(rank % 2), TORCHELASTIC_RESTART_COUNT="0")
        for rank in range(4)
    ]
    assert [(each.writer, sorted(each.on_host), each.spans_hosts) for each in ranks[1:3]] == [
        ("0/1", ["0/0", "0/1"], True),
        ("0/2", ["0/2", "0/3"], True),
    ]
    sessions = [Session(Options(json=tmp_path / "f.json", on_finding="record"), each) for each in ranks]
    sessions[0].open()
    last = []
    for rank, session in enumerate(sessions):
        session.book.report(replace(FINDING, ranks=(rank,)))
        session.close()
        last.append(session.is_last())
    assert last == [False, True, False, True], "the last of each host reports"
    assert [f["ranks"] for f in read(tmp_path / "f.json")] == [[0, 1, 2, 3]]
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_a_restart_is_another_writer_of_the_same_run(monkeypatch):
    first, second = (launch(monkeypatch, TORCHELASTIC_RESTART_COUNT=count) for count in ("0", "1"))
    assert (first.run, first.writer, second.writer) == (second.run, "0/3", "1/3")


def test_launches_on_one_host_have_ids_of_their_own(monkeypatch):
    here = launch(monkeypatch, WORLD_SIZE="2", RANK="1")
    assert here.run != launch(monkeypatch, WORLD_SIZE="2", RANK="1", TORCHELASTIC_RUN_ID="other").run
    assert not here.spans_hosts
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    alone = current_launch()
    assert (alone.writer, alone.on_host, alone.everywhere) == ("0/0", {"0/0"}, {"0/0"})
    assert alone.run != here.run
