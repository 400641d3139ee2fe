import json
import math

from ddpcall.lab.run_directory import RunDirectory, json_safe, new_run_id


def make_directory(path) -> RunDirectory:
    directory = RunDirectory(path / "run")
    directory.create("steps: 1\n", {"torch": "2.13"}, {"outcome": "running", "trials": []})
    return directory


def test_a_run_directory_starts_as_running_and_leaves_no_temporary_files(tmp_path):
    directory = make_directory(tmp_path)
    assert directory.read_summary() == {"schema": 1, "outcome": "running", "trials": []}
    names = {path.name for path in directory.path.iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "evidence.jsonl",
        "steps.jsonl",
        "timeline.jsonl",
        "summary.json",
    }


def test_failing_keeps_the_trials_and_says_who_failed_first(tmp_path):
    directory = make_directory(tmp_path)
    directory.write_summary({"outcome": "running", "trials": [{"path": "call"}]})
    directory.fail("rank lost", "rank 1 disappeared", 1, stacks={0: "…"})
    summary = directory.read_summary()
    assert summary["trials"] == [{"path": "call"}]
    assert (summary["outcome"], summary["first_failing_rank"]) == ("rank lost", 1)
    assert summary["stacks"] == {"0": "…"}


def test_the_first_account_of_a_failure_stands(tmp_path):
    directory = make_directory(tmp_path)
    directory.fail("hung", "no end", None)
    directory.fail("failed", "something else", 0)
    assert directory.read_summary()["outcome"] == "hung"


def test_records_are_appended_one_a_line(tmp_path):
    directory = make_directory(tmp_path)
    directory.append("steps.jsonl", [{"step": 0}, {"step": 1}])
    directory.append("steps.jsonl", [{"step": 2}])
    lines = (directory.path / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_infinities_become_words_that_json_knows():
    assert json_safe({"a": [math.inf, -math.inf, math.nan, 1.5]}) == {"a": ["inf", "-inf", "nan", 1.5]}


def test_run_ids_differ_within_a_second():
    assert len({new_run_id() for _ in range(20)}) > 1
