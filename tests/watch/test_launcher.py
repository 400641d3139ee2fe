"""`ddpcall watch -n 2`: it starts the ranks, the answer comes last, exit codes and signals arrive as they are."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ddpcall.cli import main
from tests.ranks.lab_process import clean_environment
from tests.watch.test_children import SKIPS_HOOKS

TIMEOUT_S = 300
NEVER = ["--fail-on", "never"]  # most scripts here import no torch, which is quick


def start(directory, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "ddpcall", "watch", *arguments],
        cwd=directory,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(directory, *arguments):
    process = start(directory, *arguments)
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except BaseException:
        process.kill()
        raise
    return process.returncode, out, err


def test_the_answer_is_the_last_thing_that_is_said(tmp_path):
    (tmp_path / "train.py").write_text(SKIPS_HOOKS)
    options = ["--json", "f.json", "--sarif", "f.sarif", "--github", "--fail-on", "warning"]
    code, out, err = run(tmp_path, "-n", "2", *options, "train.py", "0")
    (finding,) = json.loads((tmp_path / "f.json").read_text())["findings"]
    assert (finding["code"], finding["line"], finding["ranks"]) == ("DC301", 7, [0, 1]), err
    assert (code, out) == (1, "")
    assert err.count("ddpcall: DC301") == 1, "when it happens"
    assert err.count("warning[DC301]") == 1, "at the end"
    assert err.count("ddpcall watch: ") == 1
    lines = err.splitlines()
    last = lines[-1]
    assert last.startswith("ddpcall watch: 1 warning; ")
    assert (
        sum(line.startswith("::warning file=train.py,line=7,title=DC301 hooks-skipped::") for line in lines) == 1
    )
    assert "Error" not in err, "no traceback of the launcher's"
    assert len(json.loads((tmp_path / "f.sarif").read_text())["runs"][0]["results"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "f.sarif", "train.py"]


FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), 9) if "9" in sys.argv else sys.exit(int(sys.argv[1]))
time.sleep(60)
"""


@pytest.mark.parametrize(("ending", "code"), [("3", 3), ("9", 137)])
def test_the_exit_code_of_the_rank_that_failed_arrives(tmp_path, ending, code):
    (tmp_path / "train.py").write_text(FAILS)
    ended, _, err = run(tmp_path, "-n", "2", "train.py", ending)
    assert ended == code
    how = "was ended by SIGKILL" if ending == "9" else "ended with exit code 3"
    assert f"ddpcall watch: rank 1 of this host {how}\n" in err
    assert "Traceback" not in err
    assert "torch/distributed" not in err


SEES = """
import os, sys
names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RESTART_COUNT")
sys.stdout.write(f"{[os.environ[name] for name in names]} {sys.argv[1:]}\\n")
sys.exit(int(os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"))
"""


def test_options_after_two_dashes_are_torchruns_and_what_follows_the_module_is_its_own(tmp_path):
    (tmp_path / "train.py").write_text(SEES)
    command = ["-n", "2", *NEVER, "--", "--max-restarts", "1", "-m", "train", "--its", "--", "own"]
    code, out, err = run(tmp_path, *command)
    assert code == 0, err
    last = [f"['{rank}', '2', '1', '1'] ['--its', '--', 'own']" for rank in (0, 1)]
    assert set(last) <= set(out.splitlines())


def test_the_scripts_own_two_dashes_are_its_own(tmp_path):
    (tmp_path / "train.py").write_text("import sys; print(sys.argv)")
    _, out, err = run(tmp_path, "-n", "1", *NEVER, "-m", "train", "--", "-n", "own")
    assert out == f"{[str(tmp_path / 'train.py'), '--', '-n', 'own']}\n", err


WAITS = """
import os, signal, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGINT, lambda *_: open("heard" + os.environ["RANK"], "w").close())
with open(f"pid{os.environ['RANK']}.part", "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, file.name.removesuffix(".part"))
while True:
    time.sleep(60)
"""


def is_gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{process}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def await_true(condition, message):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "manner"), [(signal.SIGINT, "willing"), (signal.SIGTERM, "willing"), (signal.SIGINT, "stubborn")]
)
def test_a_signal_ends_everything_and_the_answer_is_still_given(tmp_path, number, manner):
    (tmp_path / "train.py").write_text(WAITS)
    process = start(tmp_path, "-n", "2", *NEVER, "train.py", manner)
    try:
        files = [tmp_path / "pid0", tmp_path / "pid1"]
        await_true(lambda: all(file.exists() for file in files), "the ranks have not begun")
        ranks = [int(file.read_text()) for file in files]
        process.send_signal(number)
        if manner == "stubborn":  # the ranks go on, and the launcher waits for them
            await_true((tmp_path / "heard0").exists, "the launcher does not pass it on")
            process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == -number, err
    await_true(lambda: all(map(is_gone, ranks)), "a rank is left behind")
    assert err.count("ddpcall watch: ") == 1, err
    assert "SignalException" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "2", "missing.py"], "missing.py"),
        (["-n", "2", "-m", "missing_module"], "missing_module"),
        (["-n", "many", "train.py"], "many"),
        (["-n", "2", "--", "--no-python", "train.py"], "--no-python"),
        (["-n", "2", "--", "--unknown-option", "train.py"], "--unknown-option"),
        (["-n", "2"], "which script"),
        (["-n", "2", "--"], "training_script"),
    ],
)
def test_wrong_use_exits_with_2_and_starts_no_rank(tmp_path, monkeypatch, capfd, arguments, message):
    (tmp_path / "train.py").write_text("print('started')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGLEVEL", "CRITICAL")  # otherwise logging would stay switched off in this process
    with pytest.raises(SystemExit) as exit_:
        main(["watch", *arguments])
    out, err = capfd.readouterr()
    assert (exit_.value.code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
