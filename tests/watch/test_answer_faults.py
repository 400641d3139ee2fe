"""The watch's own files and streams fail: the training goes on, what was found is said, and nothing is green."""

import atexit
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpcall.watch.options import Options
from ddpcall.watch.output.findings_file import FindingsFile
from ddpcall.watch.output.streams import check_output
from ddpcall.watch.program.script import Ending
from ddpcall.watch.session import Session
from tests.ranks.lab_process import clean_environment
from tests.watch.launched import Launched

TRAINING = """
import gc, os, pathlib, shutil, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def stop_findings(rank):
    shutil.rmtree("sub", ignore_errors=True)
    pathlib.Path("sub").touch()

def stop_all_files(rank):
    stop_findings(rank)
    from ddpcall.watch.session import Session
    other = Session._running.launch.file
    other.with_name(f".{other.name}.lock").mkdir(exist_ok=True)

def stop_sarif(rank):
    pathlib.Path("f.sarif").mkdir(exist_ok=True)

def break_pipe(number):
    def breaking(rank):
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, number)
    return breaking

def fill(rank):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)

def close(rank):
    sys.stderr.close()

def silence(rank):
    break_pipe(1)(rank)
    break_pipe(2)(rank)

def drop_user(rank):
    os.setuid(65534)

FAULTS = {
    "findings": stop_findings, "files": stop_all_files, "sarif": stop_sarif, "pipe": break_pipe(2), "full": fill,
    "closed": close, "silent": silence, "user": drop_user, "none": lambda rank: None,
}

fault, kind, rank = sys.argv[1], sys.argv[2], int(os.environ["RANK"])
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank)
for step in range(1, 5):
    if step == 2:
        dist.barrier()  # both have written that they are there
        FAULTS[fault](rank)
        dist.barrier()
    x = torch.randn(3, 4)
    outputs = model.module(x) if step == 3 and kind == "bypass" else model(x)
    optimizer.zero_grad()
    outputs.square().mean().backward()
    optimizer.step()
del model
gc.collect()
dist.destroy_process_group()
if fault != "silent":
    print(f"rank {rank} came to its end")
"""


def run(launcher, directory, fault, kind, *options, **environment):
    return Launched(launcher, directory, TRAINING, fault, kind, options=options, environment=environment)


@pytest.mark.parametrize(("kind", "code"), [("bypass", 1), ("clean", 2)])
@pytest.mark.parametrize(
    ("fault", "options", "told"),
    [
        ("sarif", ["--sarif", "f.sarif"], "could not be written: "),
        ("findings", ["--json", "sub/f.json"], "findings go to "),
    ],
)
def test_a_file_that_cannot_be_written_is_an_error(launcher, tmp_path, fault, options, told, kind, code):
    ended = run(launcher, tmp_path, fault, kind, *options)
    assert (sorted(ended.codes), ended.num_ended) == ([0, code], 2), ended.err
    assert told in ended.err
    assert ended.err.count("error[DC101]") == (kind == "bypass")
    assert "no findings" not in ended.err


@pytest.mark.parametrize(("kind", "code"), [("bypass", 1), ("clean", 2)])
def test_where_no_file_can_be_written_each_rank_speaks_for_itself(launcher, tmp_path, kind, code):
    ended = run(launcher, tmp_path, "files", kind, "--json", "sub/f.json")
    (lock,) = {Path(name) for name in re.findall(r"cannot write findings to (\S+) \(Is a directory\)", ended.err)}
    lock.with_name(f".{lock.name}.lock").rmdir()
    assert ended.num_ended == 2, ended.err
    assert set(ended.codes) <= {code, -signal.SIGTERM}, "the launcher may end the one when the other has failed"
    assert code in ended.codes
    assert ended.err.count("error[DC101]") == (2 if kind == "bypass" else 0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_script_that_becomes_another_user_loses_no_finding(launcher, tmp_path):
    ended = run(launcher, tmp_path, "user", "bypass")
    assert (sorted(ended.codes), ended.num_ended) == ([0, 1], 2), ended.err
    assert ended.err.count("error[DC101]") == 1


@pytest.mark.parametrize("fault", ["pipe", "full", "closed"])
def test_without_stderr_the_training_goes_on_and_stdout_has_the_answer(launcher, tmp_path, fault):
    ended = run(launcher, tmp_path, fault, "bypass")
    assert (sorted(ended.codes), ended.num_ended) == ([0, 1], 2), ended.out
    assert ended.out.count("error[DC101]") == 1
    assert [code for code, _ in ended.found] == ["DC101"]


@pytest.mark.parametrize(("kind", "code"), [("bypass", 1), ("clean", 0)])
def test_without_any_stream_the_file_and_the_exit_code_tell(launcher, tmp_path, kind, code):
    ended = run(launcher, tmp_path, "silent", kind)
    assert sorted(ended.codes) == [0, code]
    assert len(ended.found) == (kind == "bypass")


def test_with_restarts_left_the_launcher_is_not_made_to_train_again(launcher, tmp_path):
    ended = run(launcher, tmp_path, "none", "bypass", TORCHELASTIC_MAX_RESTARTS="1")
    assert (ended.codes, ended.num_ended) == ([0, 0], 2)
    assert [code for code, _ in ended.found] == ["DC101"]
    assert "Exit code 1 is withheld" in ended.err
    assert not list(tmp_path.glob(".f.json*"))


def test_with_restarts_left_a_clean_run_says_nothing_of_them(launcher, tmp_path):
    ended = run(launcher, tmp_path, "none", "clean", TORCHELASTIC_MAX_RESTARTS="1")
    assert ended.codes == [0, 0]
    assert "withheld" not in ended.err


# ---- before the training begins -------------------------------------------------------------------------------


def watch(directory, *arguments, **streams):
    return subprocess.Popen(
        [sys.executable, "-m", "ddpcall", "watch", *arguments],
        cwd=directory,
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_second_run_with_the_same_file_is_refused_and_empties_nothing(tmp_path):
    (tmp_path / "wait.py").write_text("print('began', flush=True)\ninput()\n")
    with watch(tmp_path, "--json", "f.json", "wait.py") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "began\n"
        before = (tmp_path / "f.json").read_text()
        with watch(tmp_path, "--json", "f.json", "wait.py") as second:
            _, error = second.communicate("", 120)
        assert second.returncode == 2
        assert f"belongs to another watch that is still running (wait.py, process {first.pid})" in error
        assert (tmp_path / "f.json").read_text() == before
        first.communicate("go on\n", 120)
    with watch(tmp_path, "--json", "f.json", "--fail-on", "never", "wait.py") as third:
        third.communicate("go on\n", 120)
    assert third.returncode == 0, "the first has ended"


def test_a_run_that_was_killed_is_in_nobodys_way(tmp_path):
    (tmp_path / "wait.py").write_text("print('began', flush=True)\ninput()\n")
    with watch(tmp_path, "--json", "f.json", "wait.py") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "began\n"
        first.kill()
    with watch(tmp_path, "--json", "f.json", "--fail-on", "never", "wait.py") as second:
        second.communicate("go on\n", 120)
    assert second.returncode == 0


@pytest.fixture
def odd(tmp_path):
    (tmp_path / "target").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("option", ["json", "sarif"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("link", "symbolic link"), ("directory", "a directory"), ("pipe", "a pipe"), ("/dev/null", "a device")],
)
def test_what_is_no_plain_file_is_refused_and_left_alone(odd, option, name, kind):
    with pytest.raises(ValueError, match=rf"--{option} .* is {kind}|symbolic link"):
        Session(Options(**{option: odd / name})).open()
    assert (odd / "link").is_symlink()
    assert (odd / "target").read_text() == "kept"


def test_a_plain_file_is_looked_at_without_a_trace(tmp_path):
    (tmp_path / "f.json").write_text("old")
    check_output(tmp_path / "f.json", "--json")
    check_output(tmp_path / "new" / "f.json", "--json")
    assert (tmp_path / "f.json").read_text() == "old"
    assert list((tmp_path / "new").iterdir()) == []


def _stay_and_go(path, says_so):
    findings_file = FindingsFile(path, "run")
    findings_file.hold_presence("0/1", "train.py")
    findings_file.write("0/1", [], done=says_so)
    os._exit(0)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_rank_that_is_gone_without_a_word_is_not_waited_for(tmp_path, says_so):
    findings_file = FindingsFile(tmp_path / "f.json", "run")
    findings_file.hold_presence("0/0", "train.py")
    child = multiprocessing.get_context("spawn").Process(target=_stay_and_go, args=(findings_file.path, says_so))
    child.start()
    child.join(60)
    assert findings_file.write("0/0", [], done=True).done == {"0/0", "0/1"}
    findings_file.release_presence()
    assert json.loads(findings_file.path.read_text())["findings"] == []


def test_a_rank_that_cannot_leave_as_it_should_speaks_for_itself(tmp_path, monkeypatch, capsys):
    session = Session(Options(json=tmp_path / "f.json")).open()
    ending = Ending(session)

    def fail(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(FindingsFile, "write", fail)
    try:
        assert ending.finish(0) == 2
    finally:
        os._exit = ending._leave
        atexit.unregister(ending._depart)
    assert "an error of its own at the end: ZeroDivisionError('ours')" in capsys.readouterr().err
