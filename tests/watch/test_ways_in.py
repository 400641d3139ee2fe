"""The ways in that need processes: spawned ranks, data loaders' workers, accelerate, a chain of modules."""

import json
import subprocess
import sys

import pytest

from tests.ranks.lab_process import clean_environment

TIMEOUT_S = 300
PYTHON = [sys.executable, "-u"]
WATCH = ["-m", "ddpcall", "watch"]
METHODS = ["fork", "spawn", "forkserver"]

SPAWNING = """
import gc, sys, tempfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

def train(index, file, mode):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=index, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(index)
    dataset = TensorDataset(torch.randn(6, 4))
    loader = DataLoader(dataset, batch_size=3, num_workers=2 if mode == "forked again" else 0)
    for (x,) in loader:
        optimizer.zero_grad()
        if mode == "forked":
            outputs = model.module(x)  # when forked
        elif mode == "forked again":
            outputs = model(x)
        else:
            outputs = model.module(x)  # when spawned
        outputs.square().mean().backward()
        optimizer.step()
    if mode == "fails" and index == 1:
        raise LookupError("the rank's own")
    gc.collect()
    dist.destroy_process_group()

if __name__ == "__main__":
    for mode in sys.argv[1:]:
        file = tempfile.mktemp()
        mp.start_processes(train, (file, mode), nprocs=2, start_method="fork" if "forked" in mode else "spawn")
    print("both came back", __name__)
"""


def run(command, directory):
    return subprocess.run(
        command,
        cwd=directory,
        env=clean_environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def line_of(source, mark):
    (line,) = [number for number, line in enumerate(source.splitlines(), 1) if line.rstrip().endswith(f"# {mark}")]
    return line


def findings_of(directory):
    return json.loads((directory / "f.json").read_text())["findings"]


def test_forked_ranks_are_watched_and_their_parent_reports(tmp_path):
    (tmp_path / "train.py").write_text(SPAWNING)
    finished = run([*PYTHON, *WATCH, "--json", "f.json", "train.py", "forked", "forked again"], tmp_path)
    found = [(finding["code"], finding["line"], finding["ranks"]) for finding in findings_of(tmp_path)]
    assert found == [("DC101", line_of(SPAWNING, "when forked"), [0, 1])], finished.stderr
    assert (finished.returncode, finished.stdout) == (1, "both came back __main__\n")
    assert finished.stderr.count("ddpcall: DC101") == 1
    assert finished.stderr.count("ddpcall watch: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "train.py"]


def test_spawned_ranks_are_watched_and_their_error_is_shown(tmp_path):
    (tmp_path / "spawns.py").write_text(SPAWNING)
    finished = run([*PYTHON, *WATCH, "--json", "f.json", "spawns.py", "fails"], tmp_path)
    found = [(finding["code"], finding["line"], finding["ranks"]) for finding in findings_of(tmp_path)]
    assert found == [("DC101", line_of(SPAWNING, "when spawned"), [0, 1])], finished.stderr
    assert (finished.returncode, finished.stdout) == (1, "")
    assert json.loads((tmp_path / "f.json").read_text())["watched"]["script"] == "spawns.py"
    assert "ProcessRaisedException: \n\n-- Process 1 terminated with the following error:\n" in finished.stderr
    assert "LookupError: the rank's own" in finished.stderr
    assert "ddpcall/watch" not in finished.stderr, "none of the watch's frames"


BY_HAND = """
import multiprocessing, os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def train(rank):
    store = "file://" + os.path.abspath("store")
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        outputs = model.module(torch.randn(3, 4))  # the bypass
        optimizer.zero_grad()
        outputs.square().mean().backward()
        optimizer.step()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ranks = [context.Process(target=train, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    print([rank.exitcode for rank in ranks])
"""


@pytest.mark.parametrize("method", METHODS)
def test_ranks_that_multiprocessing_starts_are_watched(tmp_path, method):
    (tmp_path / "train.py").write_text(BY_HAND)
    finished = run([*PYTHON, *WATCH, "--json", "f.json", "train.py", method], tmp_path)
    found = [(finding["code"], finding["line"], finding["ranks"]) for finding in findings_of(tmp_path)]
    assert found == [("DC101", line_of(BY_HAND, "the bypass"), [0, 1])], finished.stderr
    assert (finished.returncode, finished.stdout) == (1, "[0, 0]\n")
    assert finished.stderr.count("ddpcall: DC101") == 1
    assert "2 of 2 ranks" in finished.stderr.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "store") == ["f.json", "train.py"]


ACCELERATED = """
import gc, sys
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 2)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
torch.manual_seed(accelerator.process_index)
for _ in range(2):
    outputs = accelerator.unwrap_model(model)(torch.randn(3, 4))  # the bypass
    optimizer.zero_grad()
    accelerator.backward(outputs.square().mean())
    optimizer.step()
accelerator.print(sys.argv, __name__, accelerator.num_processes)
gc.collect()
accelerator.end_training()
"""


def test_accelerate_launches_the_watch_as_a_module(tmp_path):
    pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(ACCELERATED)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    settled = [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    watch = ["-m", "ddpcall", "watch", "--json", "f.json", "train.py", "--its", "own"]
    finished = run([*launch, *settled, *watch], tmp_path)
    found = [(finding["code"], finding["line"], finding["ranks"]) for finding in findings_of(tmp_path)]
    assert found == [("DC101", line_of(ACCELERATED, "the bypass"), [0, 1])], finished.stderr
    assert finished.stdout == "['train.py', '--its', 'own'] __main__ 2\n"
    assert finished.returncode == 1
