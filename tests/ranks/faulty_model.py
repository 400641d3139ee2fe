"""A model with a fault of one rank, at one point of its third step: `FAULT=kill POINT=backward VICTIM=1`."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

STEP = int(os.environ.get("STEP", "3"))
FAULTS = {
    "none": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": lambda: fail(),
    "raise_bare": lambda: exec("raise ValueError"),
    "exit": lambda: sys.exit("enough"),
    "interrupt": lambda: exec("raise KeyboardInterrupt"),
    "close_out": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
    "hang": lambda: time.sleep(1000),
    "agent_gone": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "fill": lambda: fill(Path("run")),
    "terminate_all": lambda: os.kill(os.getppid(), signal.SIGTERM),
}


def fail() -> None:
    raise ValueError(f"the model's own error on rank {os.environ['RANK']}")


def fill(directory: Path) -> None:
    """Fill the disk that a directory lies on."""
    with contextlib.suppress(OSError), open(directory / "filling", "wb", buffering=0) as file:
        while file.write(b"x" * 1024):
            pass


def misbehave() -> None:
    """Let the fault happen, here and now."""
    FAULTS[os.environ["FAULT"]]()


def misbehave_soon() -> None:
    """Let the fault happen while the main thread is blocked."""
    threading.Timer(0.2, misbehave).start()


class Faulty(nn.Module):
    """A linear model; on the victim the fault happens in forward, backward, a collective, or as it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.calls = 0
        self.point = os.environ["POINT"] if os.environ["RANK"] == os.environ["VICTIM"] else "none"
        if self.point == "save":
            from torch.distributed.checkpoint import FileSystemWriter

            write = FileSystemWriter.write_data

            def write_and_misbehave(*args, **kwargs):
                misbehave()
                return write(*args, **kwargs)

            FileSystemWriter.write_data = write_and_misbehave

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        outputs = self.layer(inputs.flatten(1))
        if os.environ["POINT"] == "loss" and self.calls >= int(os.environ.get("FIRST_NAN", STEP)):
            outputs = outputs * float("nan")
        if self.calls == STEP:
            getattr(self, f"at_{self.point}", lambda _: None)(outputs)
        return outputs

    def at_forward(self, outputs: Tensor) -> None:
        misbehave()

    def at_backward(self, outputs: Tensor) -> None:
        outputs.register_hook(lambda gradient: misbehave())

    def at_collective(self, outputs: Tensor) -> None:
        misbehave_soon()
        dist.recv(torch.zeros(1), src=1 - dist.get_rank())
