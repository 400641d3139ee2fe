"""`ddpcall lab grade` as a user starts it: torchrun, terminal, gradebook, exit codes, the time limit."""

import hashlib
import json
import subprocess
import sys

import pytest

from ddpcall.teach import command
from ddpcall.teach.exercises import EXERCISES
from ddpcall.teach.grade import find_faults
from ddpcall.teach.question import find
from tests.labs.solutions import mended
from tests.ranks.lab_process import clean_environment

NAME = "module_bypass"


def lab(directory, *arguments: str, timeout_s: float = 480):
    return subprocess.run(
        [sys.executable, "-m", "ddpcall", "lab", *arguments],
        cwd=directory,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("full")
    (directory / "mine.py").write_text(mended(NAME))
    done = lab(directory, "grade", NAME, "mine.py", "--json", "book.json", "--time-limit", "240")
    return done, json.loads((directory / "book.json").read_text()), directory


def test_a_mended_script_exits_with_0_and_shows_every_criterion(full):
    done, record, _ = full
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 of 100 points" in done.stdout
    for criterion in find(NAME, EXERCISES, "exercise").criteria:
        assert criterion.text in done.stdout
    assert record["outcome"] == "full marks"


def test_the_gradebook_has_every_criterion_with_its_sentence(full):
    _, record, _ = full
    assert (record["schema"], record["exercise"], record["points"], record["of"]) == (1, NAME, 100, 100)
    criteria = find(NAME, EXERCISES, "exercise").criteria
    assert [one["key"] for one in record["criteria"]] == [one.key for one in criteria]
    assert all(one["passed"] and one["sentence"].endswith(".") for one in record["criteria"])
    assert record["sha256"] == hashlib.sha256(mended(NAME).encode()).hexdigest()
    assert (record["ranks"], record["timed_out"], record["findings"]) == (2, False, [])
    assert set(record["environment"]) == {"ddpcall", "torch", "python"}


def test_grading_leaves_nothing_in_the_directory(full):
    _, _, directory = full
    assert sorted(path.name for path in directory.iterdir()) == ["book.json", "mine.py"]


def test_a_broken_script_exits_with_1_and_names_line_and_hint(tmp_path):
    assert lab(tmp_path, "start", NAME).returncode == 0
    done = lab(tmp_path, "grade", NAME, f"{NAME}.py", "--json", "book.json")
    assert done.returncode == 1
    assert "ddpcall explain DC101" in done.stdout
    record = json.loads((tmp_path / "book.json").read_text())
    (finding,) = record["findings"]
    bypass = (tmp_path / f"{NAME}.py").read_text().splitlines()[finding["line"] - 1]
    assert (finding["code"], bypass.strip()) == ("DC101", "logits = model.module(x.to(device))")
    assert record["outcome"] == "points missing"
    assert record["points"] < 50


def test_a_script_without_end_is_killed_at_the_limit(tmp_path):
    (tmp_path / "mine.py").write_text("while True:\n    print('x' * 100_000)\n")
    done = lab(tmp_path, "grade", NAME, "mine.py", "--time-limit", "15", "--json", "book.json", timeout_s=120)
    assert done.returncode == 1
    record = json.loads((tmp_path / "book.json").read_text())
    assert record["timed_out"] is True
    assert record["points"] == 0
    assert 15 <= record["seconds"] < 60
    assert len(record["output"]) < 40_000
    assert "had not ended after 15 s" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grade", "nothing", "mine.py"), "there is no exercise 'nothing'; write one of: module_bypass"),
        (("grade", NAME, "nothing.py"), "there is no file nothing.py"),
        (("grade", NAME, "mine.py", "--ranks", "1"), "write --ranks 2"),
        (("grade", NAME, "mine.py", "--time-limit", "0"), "write a number of seconds above 0"),
        (("grade", NAME, "mine.py", "--json", "."), "is a directory"),
        (("grade", NAME, "mine.py", "--json", "no/where.json"), "there is no directory"),
        (("start", NAME, "mine.py"), "mine.py is there already"),
        (("start", "nothing"), "there is no exercise 'nothing'"),
        (("run", "nothing"), "there is no lesson 'nothing'"),
        (("run", "arming"), "there is no terminal to ask at"),
        (("run", "arming", "--predict", "synced"), "asks 4 questions, and --predict gives 1 answers"),
        (("run", "arming", "--predict", "a", "b", "c", "d"), "'a' is no answer"),
        (("run", "arming", "--ranks", "1"), "compares ranks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_use_exits_with_2_and_says_what_to_write(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    assert command.main(list(arguments)) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_an_unknown_command_exits_with_2_without_a_traceback(tmp_path):
    done = lab(tmp_path, "dance")
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid choice: 'dance'" in done.stderr
    assert "Traceback" not in done.stderr


def test_under_torchrun_one_rank_says_to_leave_it_out(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "ddpcall", "lab", "run", "arming"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1  # torchrun's word for any failure
    assert done.stderr.count("starts its own ranks") == 1


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import ddpcall", 1),
        ("x = 1\nfrom ddpcall.watch import watch", 2),
        ("import sys\nsys.modules['ddpcall.watch.session']", 2),
        ("import ddpcaller\n# ddpcall: ignore\nprint('I love ddpcall')", None),
        ("no python at all", None),
    ],
)
def test_reaching_for_ddpcall_is_seen_in_the_text(source, line):
    faults = list(find_faults(source.encode()))
    assert len(faults) == (line is not None)
    assert all(f"Line {line} " in fault for fault in faults)
