"""A disk that fills up in mid-run, for real: what was found is printed, and nothing is green."""

import os
import subprocess

import pytest

from tests.watch.launched import Launched

TRAINING = """
import os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

kind, rank = sys.argv[1], int(os.environ["RANK"])
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank)
for step in range(1, 5):
    if step == 2:
        dist.barrier()
        if rank == 0:
            try:
                with open("disk/checkpoint", "wb", buffering=0) as file:
                    while file.write(b"x" * 4096):
                        pass
            except OSError as error:
                print(error.strerror)
        dist.barrier()
    x = torch.randn(3, 4)
    outputs = model.module(x) if step == 3 and kind == "bypass" else model(x)
    optimizer.zero_grad()
    outputs.square().mean().backward()
    optimizer.step()
del model
dist.destroy_process_group()
print(f"rank {rank} came to its end")
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB at `disk`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(("kind", "code"), [("bypass", 1), ("clean", 2)])
def test_a_disk_that_fills_up_loses_no_finding_and_is_never_green(launcher, small_disk, tmp_path, kind, code):
    ended = Launched(launcher, tmp_path, TRAINING, kind, options=["--json", "disk/f.json"])
    assert "No space left on device" in ended.out
    assert (sorted(ended.codes), ended.num_ended) == ([0, code], 2), ended.err
    assert ended.err.count("error[DC101]") == (kind == "bypass")
    assert "No space left on device); findings go to " in ended.err
    assert "no findings" not in ended.err
    assert not list(small_disk.glob(".f.json.*.*")), "what was half written is removed"
