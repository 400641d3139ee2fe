"""Models a user might bring, most of them broken."""

import ctypes
import os
import signal
import time

from torch import Tensor, nn

STEP = 3


class Good(nn.Module):
    """Works, and is no chain of its children; has no compute_loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == STEP and os.environ.get("RANK") == os.environ.get("VICTIM", "1"):
            self.misbehave()
        return self.layer(inputs.flatten(1))

    def misbehave(self) -> None:
        """Do nothing."""


class Raising(Good):
    """Raises on all ranks alike."""

    def forward(self, inputs: Tensor) -> Tensor:
        raise ValueError("my model is broken")


class RaisingOnOne(Good):
    """Raises on one rank; the others wait for it in a collective."""

    def misbehave(self) -> None:
        raise ValueError("rank one is broken")


class Killed(Good):
    """Is killed, as by the out-of-memory killer."""

    def misbehave(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Crashing(Good):
    """Reads memory that is not there."""

    def misbehave(self) -> None:
        ctypes.string_at(0)


class Exiting(Good):
    """Exits with 0, which a launcher takes for success."""

    def misbehave(self) -> None:
        os._exit(0)


class Hanging(Good):
    """Never returns."""

    def misbehave(self) -> None:
        while True:
            time.sleep(0.05)
