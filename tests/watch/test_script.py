"""`python -m ddpcall watch script.py`: the script runs as it would have, and its findings are on disk."""

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.ranks.lab_process import clean_environment, torchrun

TIMEOUT_S = 240
WATCH = [sys.executable, "-m", "ddpcall", "watch"]


def run(command, directory, **extra):
    return subprocess.run(
        command,
        cwd=directory,
        env=clean_environment(**extra),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def on_two_ranks(directory, script, *options, arguments=()):
    watch = ["-m", "ddpcall", "watch", "--json", "f.json", *options]
    (directory / "train.py").write_text(textwrap.dedent(script))
    finished = run([*torchrun(2), *watch, "train.py", *arguments], directory)
    return finished, json.loads((directory / "f.json").read_text())["findings"]


PLAIN = '''
"""The script's docstring."""
import json, pickle, sys

class Thing:
    pass

import __main__
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": __file__, "doc": __doc__, "path": sys.path[0],
    "main": __main__.Thing is Thing, "pickled": type(pickle.loads(pickle.dumps(Thing()))) is Thing,
    "package": __package__, "spec": __spec__ is None,
}))
print("to stderr", file=sys.stderr)
'''


def test_a_script_sees_what_it_sees_without_the_watch(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "plain.py").write_text(PLAIN)
    arguments = ["sub/plain.py", "--json", "its own", "-m", "x"]
    bare = run([sys.executable, *arguments], tmp_path)
    watched = run([*WATCH, "--fail-on", "never", *arguments], tmp_path)
    assert (watched.returncode, watched.stdout) == (bare.returncode, bare.stdout) == (0, bare.stdout)
    assert json.loads(bare.stdout)["argv"] == arguments
    assert "to stderr" in watched.stderr
    assert "never imported torch" in watched.stderr


def test_a_module_sees_what_it_sees_without_the_watch(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    package.joinpath("__init__.py").write_text("")
    package.joinpath("__main__.py").write_text(
        "import sys\nfrom . import __name__ as up\nprint(sys.argv, __name__, __package__, up, __spec__.name)\n"
    )
    bare = run([sys.executable, "-m", "package", "a", "--b"], tmp_path)
    watched = run([*WATCH, "--fail-on", "never", "-m", "package", "a", "--b"], tmp_path)
    assert bare.returncode == 0, bare.stderr
    assert (watched.returncode, watched.stdout) == (0, bare.stdout)


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("sys.exit(3)", 3),
        ("sys.exit()", 0),
        ("sys.exit('text')", 1),
        ("sys.exit(0)", 0),
        ("raise SystemExit(7)", 7),
    ],
)
def test_the_exit_code_is_the_scripts(tmp_path, ending, code):
    (tmp_path / "leave.py").write_text(f"import sys\n{ending}\n")
    assert run([*WATCH, "--fail-on", "never", "leave.py"], tmp_path).returncode == code


def test_a_traceback_is_the_scripts(tmp_path):
    (tmp_path / "fail.py").write_text("def inner():\n    raise ValueError('own')\n\n\ninner()\n")
    bare = run([sys.executable, "fail.py"], tmp_path)
    watched = run([*WATCH, "fail.py"], tmp_path)
    assert bare.returncode == watched.returncode == 1
    trace = watched.stderr[: watched.stderr.index("ddpcall watch:")]
    assert trace == bare.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_as_without_the_watch(tmp_path, number):
    (tmp_path / "kill.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n")
    bare = run([sys.executable, "kill.py"], tmp_path)
    watched = run([*WATCH, "kill.py"], tmp_path)
    assert watched.returncode == bare.returncode == -number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which script"),
        (["absent.py"], "No such file"),
        (["-m", "absent_module"], "No module named absent_module"),
        (["--only", "DC999", "x.py"], "no finding 'DC999'"),
        (["--every", "-1", "x.py"], "every is -1"),
        (["--json", "x.py/f.json", "x.py"], "the findings cannot be written: [Errno 17]"),
    ],
)
def test_wrong_use_exits_with_2_and_says_so(tmp_path, arguments, message):
    (tmp_path / "x.py").write_text("")
    finished = run([*WATCH, *arguments], tmp_path)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_a_clean_script_leaves_an_empty_list(tmp_path):
    (tmp_path / "x.py").write_text("import torch\n")
    assert run([*WATCH, "--json", "out/f.json", "x.py"], tmp_path).returncode == 0
    assert json.loads((tmp_path / "out" / "f.json").read_text())["findings"] == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["f.json"]


HOOKED = """
import torch
layer = torch.nn.Linear(2, 2)
layer.register_forward_hook(lambda *_: None)
layer.forward(torch.ones(1, 2)){comment}
"""


@pytest.mark.parametrize(
    ("options", "comment", "code", "found"),
    [
        ([], "", 0, ["DC301"]),  # a warning does not reach --fail-on error
        (["--fail-on", "warning"], "", 1, ["DC301"]),
        (["--fail-on", "never"], "", 0, ["DC301"]),
        (["--fail-on", "warning", "--ignore", "DC301"], "", 0, []),
        (["--fail-on", "warning", "--only", "DC101"], "", 0, []),
        (["--fail-on", "warning"], "  # ddpcall: ignore[DC301] on purpose", 0, []),
    ],
)
def test_options_decide_what_is_reported_and_what_fails(tmp_path, options, comment, code, found):
    (tmp_path / "x.py").write_text(HOOKED.format(comment=comment))
    finished = run([*WATCH, "--json", "f.json", "--sarif", "f.sarif", *options, "x.py"], tmp_path)
    assert finished.returncode == code, finished.stderr
    assert [finding["code"] for finding in json.loads((tmp_path / "f.json").read_text())["findings"]] == found
    (sarif,) = json.loads((tmp_path / "f.sarif").read_text())["runs"]
    assert [result["ruleId"] for result in sarif["results"]] == found


def test_findings_do_not_hide_the_scripts_own_failure(tmp_path):
    (tmp_path / "x.py").write_text(HOOKED.format(comment="") + "import sys\nsys.exit(5)\n")
    assert run([*WATCH, "--fail-on", "warning", "x.py"], tmp_path).returncode == 5


TRAINING = """
import gc, signal, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def main(mode):
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for step in range(4):
        x = torch.randn(3, 4)
        if mode == "clean":
            outputs = model(x)
        else:
            outputs = model.module(x)  # the bypass
        optimizer.zero_grad()
        outputs.square().mean().backward()
        optimizer.step()
        if mode == "raises" and step == 1 and rank == 1:
            raise ValueError("the script's own error")

dist.init_process_group("gloo")
main(sys.argv[1])
gc.collect()
dist.destroy_process_group()
"""
BYPASS = 1 + TRAINING.splitlines().index("            outputs = model.module(x)  # the bypass")


def test_two_ranks_make_one_finding_and_one_message(tmp_path):
    finished, findings = on_two_ranks(tmp_path, TRAINING, arguments=["bypass"])
    (finding,) = findings
    assert (finding["code"], finding["line"], finding["function"]) == ("DC101", BYPASS, "main")
    assert (finding["ranks"], finding["step"], finding["count"]) == ([0, 1], 1, 4)
    assert Path(finding["file"]).name == "train.py"
    assert finished.returncode == 1
    assert finished.stderr.count("ddpcall: DC101") == 1
    assert finished.stderr.count("ddpcall watch: 1 error") == 1


def test_a_clean_run_on_two_ranks_is_silent_and_succeeds(tmp_path):
    finished, findings = on_two_ranks(tmp_path, TRAINING, "--fail-on", "warning", arguments=["clean"])
    assert (finished.returncode, findings) == (0, [])
    assert finished.stderr.count("ddpcall watch: no findings") == 1


def test_an_error_is_shown_by_torchrun_and_nothing_is_left_running(tmp_path):
    finished, findings = on_two_ranks(tmp_path, TRAINING, arguments=["raises"])
    assert [(finding["code"], finding["line"]) for finding in findings] == [("DC101", BYPASS)]
    assert finished.returncode == 1
    assert "ValueError: the script's own error" in finished.stderr
    assert not is_running(tmp_path)


def is_running(directory):
    """Say whether a process is left that was started in a directory."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == directory:
                return True
    return False


WAITING = TRAINING.replace(
    "        optimizer.step()",
    """        optimizer.step()
        if step == 1:
            print(f"rank {rank} is ready", flush=True)
            signal.pause()""",
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_ends_a_watched_run_by_a_signal(tmp_path, number):
    (tmp_path / "train.py").write_text(WAITING)
    with subprocess.Popen(
        [*torchrun(2), *WATCH[1:], "--json", "f.json", "train.py", "bypass"],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launched:
        assert launched.stdout is not None
        ready = sorted(launched.stdout.readline() for _ in range(2))
        assert ready == ["rank 0 is ready\n", "rank 1 is ready\n"]
        launched.send_signal(number)
        _, error = launched.communicate(timeout=TIMEOUT_S)
    assert launched.returncode == 1, error
    (finding,) = json.loads((tmp_path / "f.json").read_text())["findings"]
    assert (finding["code"], finding["line"], finding["ranks"]) == ("DC101", BYPASS, [0, 1])
    assert not is_running(tmp_path)


RESTARTED = """
import os, sys
import torch
layer = torch.nn.Linear(2, 2)
layer.register_forward_hook(lambda *_: None)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    layer.forward(torch.ones(1, 2))
    sys.exit(os.environ["RANK"] == "1")
layer.forward(torch.ones(1, 2))
"""


def test_what_was_found_before_a_restart_stays(tmp_path):
    (tmp_path / "train.py").write_text(RESTARTED)
    watch = ["-m", "ddpcall", "watch", "--json", "f.json", "--fail-on", "warning", "train.py"]
    finished = run([*torchrun(2), "--max-restarts", "1", *watch], tmp_path)
    findings = json.loads((tmp_path / "f.json").read_text())["findings"]
    lines = [number for number, line in enumerate(RESTARTED.splitlines(), 1) if "layer.forward" in line]
    assert [finding["line"] for finding in findings] == lines, finished.stderr
    assert finished.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "a.py"], "unrecognized arguments: --nonsense"),
        (["no.py"], "No such file or directory: 'no.py'"),
    ],
)
def test_wrong_use_on_two_ranks_is_said_once(tmp_path, arguments, message):
    finished = run([*torchrun(2), "-m", "ddpcall", "watch", *arguments], tmp_path)
    assert finished.returncode == 1  # torchrun's word for any failure
    assert finished.stderr.count(message) == finished.stderr.count("usage: ddpcall watch") == 1
    assert "exitcode  : 2" in finished.stderr
