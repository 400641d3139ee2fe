"""The lab, whose ranks are killed: in each attempt of torchrun's another one, at another point."""

import os
import signal
from typing import Any

from ddpcall.lab import train
from ddpcall.lab.checkpoint import Checkpoints
from ddpcall.lab.run_directory import RunDirectory
from ddpcall.lab.trial import Trial

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(owner: type, name: str, is_time: Any) -> None:
    """Kill this process before a method runs, the first time that `is_time` says so of its arguments."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_time(self, *args):
            die()
        return original(self, *args, **kwargs)

    setattr(owner, name, method)


if __name__ == "__main__":
    match ATTEMPT, RANK:
        case 0, 1:  # in a step of the first trial
            kill_before(Trial, "_compute_gradients", lambda self, *_: self._step == 7 and self._observe)
        case 1, 0:  # when the files of a checkpoint of the second trial are there, and its name is not
            kill_before(Checkpoints, "_commit", lambda self, draft, step, *_: "trial1" in str(draft) and step == 8)
        case 2, 0:  # when part of the second trial's records are written, and it does not stand yet
            kill_before(
                RunDirectory, "append", lambda self, name, _: "timeline" in name and self.sizes()[name] > 0
            )
    train.main()
