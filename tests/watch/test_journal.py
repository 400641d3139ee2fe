"""Findings on disk: merged from all ranks at any time, whoever writes and whoever dies."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from ddpcall.findings import Finding
from ddpcall.watch.journal import Journal, merge_findings

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
    assert record.keys() == {"schema", "findings"}
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
    Journal(tmp_path / "new" / "findings.json", "run").write("0", [])
    assert read(tmp_path / "new" / "findings.json") == []


def test_what_a_rank_withdraws_is_gone_and_what_others_said_stays(tmp_path):
    journal = Journal(tmp_path / "f.json", "run")
    journal.write("0", [FINDING])
    journal.write("1", [replace(FINDING, ranks=(1,)), replace(FINDING, line=9, ranks=(1,))])
    assert [(f["line"], f["ranks"]) for f in read(tmp_path / "f.json")] == [(3, [0, 1]), (9, [1])]
    journal.write("1", [])
    assert [(f["line"], f["ranks"]) for f in read(tmp_path / "f.json")] == [(3, [0])]


def test_another_run_starts_anew(tmp_path):
    Journal(tmp_path / "f.json", "yesterday").write("0", [FINDING], done=True)
    today = Journal(tmp_path / "f.json", "today")
    assert today.read() == []
    assert today.write("1", []).done == set()
    assert read(tmp_path / "f.json") == []


def _write_many(path: Path, rank: int) -> None:
    journal = Journal(path, "run")
    told = []
    for line in range(1, 21):
        found = [replace(FINDING, line=n, ranks=(rank,)) for n in range(1, line + 1)]
        told.append(journal.write(str(rank), found, done=line == 20))
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
    journal = Journal(tmp_path / "f.json", "run")
    journal.write("0", [FINDING], done=True)
    journal.remove_state(keep=True)
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
    journal.remove_state(keep=False)
    assert list(tmp_path.iterdir()) == []
