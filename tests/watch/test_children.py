"""Ranks that a script starts itself are watched, and processes that are no ranks are as without the watch."""

import json
import os
import subprocess
import sys

import pytest

from tests.ranks.lab_process import clean_environment

TIMEOUT_S = 300
WATCH = ["-m", "ddpcall", "watch"]


def run(directory, *arguments, **extra):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=clean_environment(OMP_NUM_THREADS="1", **extra),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def findings_of(directory):
    return json.loads((directory / "f.json").read_text())["findings"]


# Starts rank 1 as Lightning does: rank 0 is this process, though its environment did not say so when it began.
OWN_LAUNCHER = """
import gc, os, subprocess, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

rank = int(os.environ.get("LOCAL_RANK", "0"))
if "LOCAL_RANK" not in os.environ:
    os.environ |= {"LOCAL_RANK": "0", "STORE": os.path.abspath("store")}
    child = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "1"})
dist.init_process_group("gloo", init_method="file://" + os.environ["STORE"], rank=rank, world_size=2)
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank)
for step in range(1, 9):
    outputs = model(torch.randn(3, 4))
    if step == 6 and rank == 1 and "late" in sys.argv:
        with torch.no_grad():
            model.module.bias.add_(1)
    optimizer.zero_grad()
    outputs.square().mean().backward()
    optimizer.step()
model.register_forward_hook(lambda *_: None)
if rank == 1:
    model.forward(torch.randn(3, 4))  # only on the child
del model
gc.collect()
dist.destroy_process_group()
print(f"rank {rank}: {sys.argv} {__name__} {os.path.basename(__file__)}")
if rank == 0:
    sys.exit(child.wait())
sys.exit(7)
"""
LINE = 1 + OWN_LAUNCHER.splitlines().index("    model.forward(torch.randn(3, 4))  # only on the child")


def test_a_rank_that_rank_0_starts_is_watched_and_compared(tmp_path):
    (tmp_path / "train.py").write_text(OWN_LAUNCHER)
    watched = run(tmp_path, *WATCH, "--json", "f.json", "train.py", "late")
    found = [(finding["code"], finding["line"], finding["ranks"]) for finding in findings_of(tmp_path)]
    assert ("DC301", LINE, [1]) in found, watched.stderr
    assert "DC201" in [code for code, _, _ in found]
    assert sorted(watched.stdout.splitlines()) == [
        f"rank {r}: ['train.py', 'late'] __main__ train.py" for r in (0, 1)
    ]
    assert watched.returncode == 7, "the child's own exit code, handed on by the script"
    assert watched.stderr.count("ddpcall: DC301") == 1, "said by the child when it happens"
    assert watched.stderr.count("ddpcall watch: ") == 1, "one answer, the parent's"


# One process shows this one, without a process group.
SKIPS_HOOKS = """
import sys
import torch

layer = torch.nn.Linear(4, 2)
layer.register_forward_hook(lambda *_: None)
layer.forward(torch.randn(3, 4))
sys.exit(int(sys.argv[1]))
"""
SHELL = """
RANK=0 WORLD_SIZE=2 {python} -u rank.py 0 &
RANK=1 WORLD_SIZE=2 {python} -u -m rank 0 &
wait
"""
LAUNCH = """
import subprocess, sys
subprocess.run(["sh", "launch.sh"], check=True)
print("launched", "torch" in sys.modules)
"""


def test_ranks_below_a_shell_script_are_watched_where_the_launcher_never_imports_torch(tmp_path):
    (tmp_path / "rank.py").write_text(SKIPS_HOOKS)
    (tmp_path / "launch.sh").write_text(SHELL.format(python=sys.executable))
    (tmp_path / "launch.py").write_text(LAUNCH)
    options = ["--fail-on", "warning", "--json", "f.json"]
    watched = run(tmp_path, *WATCH, *options, "launch.py")
    (finding,) = findings_of(tmp_path)
    assert (finding["code"], finding["line"], finding["ranks"]) == ("DC301", 7, [0, 1])
    assert (watched.returncode, watched.stdout) == (1, "launched False\n"), watched.stderr
    assert watched.stderr.count("ddpcall watch: ") == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == sorted(
        ["f.json", "launch.py", "launch.sh", "rank.py"]
    )


ONE = """
import os, subprocess, sys
subprocess.run([sys.executable, "rank.py", "0"], env={**os.environ, "RANK": "1"}, check=True)
"""


def test_no_children_leaves_them_alone(tmp_path):
    (tmp_path / "rank.py").write_text(SKIPS_HOOKS)
    (tmp_path / "launch.py").write_text(ONE)
    watched = run(tmp_path, *WATCH, "--no-children", "--json", "f.json", "launch.py")
    assert findings_of(tmp_path) == [], watched.stderr


LEAVES = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "rank.py", "0"], env={**os.environ, "RANK": "1"})
os.kill(os.getpid(), 9)
"""


def test_a_rank_that_outlives_its_dead_parent_gives_the_answer(tmp_path):
    (tmp_path / "rank.py").write_text(SKIPS_HOOKS)
    (tmp_path / "launch.py").write_text(LEAVES)
    (tmp_path / "scratch").mkdir()
    watched = run(
        tmp_path, *WATCH, "launch.py", TMPDIR=str(tmp_path / "scratch")
    )  # its output ends when the rank has ended too
    assert watched.returncode == -9
    assert "warning[DC301] hooks-skipped" in watched.stderr
    assert not list((tmp_path / "scratch").iterdir()), "no findings file is left"


# Every process is asked what it sees; the watch's own two variables are left out, for they are documented.
SEES = """
import os, sys
names = sorted(name for name in os.environ if name not in ("DDPCALL_WATCH", "PYTHONPATH"))
print(sys.argv, sys.path, sys.flags, names, sorted(map(str, sys.meta_path)).__len__(), os._exit, sys.exit)
print("torch" in sys.modules, [name for name in sys.modules if name.startswith(("ddpcall", "json"))])
"""
FAILS = """
def fail():
    raise LookupError("the child's own")
fail()
"""
ASKS = """
import json, multiprocessing, os, subprocess, sys
from concurrent.futures import ProcessPoolExecutor
python = sys.executable
rank = {**os.environ, "RANK": "1"}
path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), "theirs"]))}
commands = [
    ([python, "sees.py", "--its", "own"], None), ([python, "-u", "-m", "sees"], None),
    ([python, "-c", open("sees.py").read()], rank), ([python, "-I", "sees.py"], rank),
    ([python, "-E", "sees.py"], rank), ([python, "-S", "fails.py"], rank), ([python, "fails.py"], None),
    ([python, "fails.py"], rank), ([python, "-c", "raise SystemExit(3)"], rank),
    ([python, "-m", "pip", "--version"], rank),
    ([python, "-"], rank), ([python, "-c", "import sitecustomize; print(sitecustomize.__file__)"], path),
    ([python, "-m", "sitecustomized"], {**path, "RANK": "1"}),
]
if __name__ == "__main__":
    for command, environment in commands:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        print(json.dumps([done.returncode, done.stdout, done.stderr]))
    os.environ["RANK"] = "3"
    for method in ("fork", "spawn", "forkserver"):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
            print(pool.submit(len, "abc").result())
"""


def test_processes_that_are_no_ranks_are_as_without_the_watch(tmp_path):
    for name, text in {"sees.py": SEES, "fails.py": FAILS, "asks.py": ASKS}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text("import sys\nsys.customized = True\n")
    (tmp_path / "sitecustomized.py").write_text(
        "import sys; print(sys.customized, 'sitecustomize' in sys.modules)"
    )
    bare = run(tmp_path, "asks.py")
    watched = run(tmp_path, *WATCH, "--fail-on", "never", "asks.py")
    assert bare.returncode == 0, bare.stderr
    for theirs, ours in zip(bare.stdout.splitlines(), watched.stdout.splitlines(), strict=True):
        assert ours == theirs
    assert "theirs/sitecustomize.py" in watched.stdout
    assert "LookupError" in watched.stdout


def test_a_childs_sitecustomize_that_fails_is_reported_as_by_the_interpreter(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text("raise ValueError('theirs')\n")
    (tmp_path / "launch.py").write_text(
        "import subprocess, sys\n"
        "print(subprocess.run([sys.executable, '-c', ''], stderr=subprocess.PIPE).stderr)\n"
    )
    theirs = {"PYTHONPATH": str(tmp_path / "theirs")}
    bare = run(tmp_path, "launch.py", **theirs)
    watched = run(tmp_path, *WATCH, "--fail-on", "never", "launch.py", **theirs)
    assert watched.stdout == bare.stdout
    assert "ValueError: theirs" in bare.stdout


def test_what_is_added_to_the_environment_is_two_variables(tmp_path):
    (tmp_path / "asks.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    bare = json.loads(run(tmp_path, "asks.py", PYTHONPATH="mine").stdout)
    watched = json.loads(run(tmp_path, *WATCH, "--fail-on", "never", "asks.py", PYTHONPATH="mine").stdout)
    assert watched.keys() - bare.keys() == {"DDPCALL_WATCH"}
    assert [name for name in bare if watched[name] != bare[name]] == ["PYTHONPATH"]
    first, second = watched["PYTHONPATH"].split(os.pathsep)
    assert (os.listdir(first).count("sitecustomize.py"), second) == (1, "mine")
    alone = json.loads(run(tmp_path, *WATCH, "--fail-on", "never", "--no-children", "asks.py").stdout)
    assert "PYTHONPATH" not in alone


# A worker of Ray Train's or Spark's: a plain process whose environment says which rank it is, and a function.
WORKER = """
import ddpcall, gc, os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def train():
    store, rank = "file://" + os.path.abspath("store"), int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        outputs = model.module(torch.randn(3, 4))  # the bypass
        optimizer.zero_grad()
        outputs.square().mean().backward()
        optimizer.step()
    del model, outputs
    gc.collect()
    dist.destroy_process_group()

with ddpcall.watch(json="worker.json") as session:
    train()
print(sorted({finding.code for finding in session.all_findings()}))
"""
WORKERS = """
import os, subprocess, sys
place = [{**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"} for r in (0, 1)]
workers = [subprocess.Popen([sys.executable, "worker.py"], env=environment) for environment in place]
print([worker.wait() for worker in workers])
"""


@pytest.mark.parametrize("outer", [[], [*WATCH, "--fail-on", "never"]], ids=["plain", "below a watch"])
def test_a_watch_inside_the_function_of_a_plain_worker(tmp_path, outer):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "launch.py").write_text(WORKERS)
    done = run(tmp_path, *outer, "launch.py")
    assert done.stdout.splitlines()[-1] == "[0, 0]", done.stderr
    (finding,) = json.loads((tmp_path / "worker.json").read_text())["findings"]
    line = 1 + WORKER.splitlines().index("        outputs = model.module(torch.randn(3, 4))  # the bypass")
    assert (finding["code"], finding["line"], finding["ranks"]) == ("DC101", line, [0, 1])
    assert done.stdout.count("DC101") == 2
