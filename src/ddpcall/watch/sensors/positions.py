"""What this rank does now and how far it came: read by a thread of the watch's own while the training hangs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ddpcall import torch_internals as internals
from ddpcall.taps import NOWHERE, TORCH, CallSite, find_call_frames_among, is_user_file, read_site, site_of
from ddpcall.watch.run import Run

RUNS, ENDED, FAILED, LEFT = "runs", "ended", "failed", "left"
_PASSING_ON = frozenset({"wrapper", "decorate_context", "inner"})
_COMMUNICATES = ("distributed/", "nn/parallel/distributed.py")
_ENGINE = "autograd/graph.py"


@dataclass(frozen=True)
class Position:
    """Where one rank is.

    Attributes:
        state: `runs`; how its script is over, `ended` or `failed`; `left` where only the watch is.
        forwards: Forwards of a wrapper with gradients, begun.
        backwards: Backwards, begun.
        steps: Steps of the leading optimizer; where none leads, of the one that did most.
        collectives: What the script itself sent: calls.
        silent_s: Seconds since any of these grew.
        call: The torch function that the script is in, as `backward` or `barrier`; empty in code of its own.
        operation: What it waits for, as torch's flight recorder has it; empty where it waits for nothing.
        sequence: That collective's number in its group; 0 where the recorder does not tell.
        group: The group's name in the recorder.
        is_of_all: Whether the group is the default one.
        site: The line.
    """

    state: str = RUNS
    forwards: int = 0
    backwards: int = 0
    steps: int = 0
    collectives: int = 0
    silent_s: float = 0.0
    call: str = ""
    operation: str = ""
    sequence: int = 0
    group: str = ""
    is_of_all: bool = False
    site: CallSite = NOWHERE

    @property
    def counts(self) -> tuple[int, ...]:
        """How far the rank came."""
        return self.forwards, self.backwards, self.steps, self.collectives

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Position:
        """Return what `to_json` was called on."""
        values = json.loads(text)
        return Position(**dict[str, Any](values, site=read_site(values["site"])))


class PositionSensor:
    """Counts what this rank does, and reads from outside which line it is at.

    Counting is an addition. Lines are looked for when somebody asks: a thread that waits in a collective stands
    still, and its stack tells.

    Blind to: which of several threads waits, other than the one that trained last; what a device's host thread
    waits for, where torch has no flight recorder for the backend; point-to-point calls of NCCL.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._thread = threading.main_thread().ident
        self._last: tuple[int, ...] = ()
        self._since = time.monotonic()
        self.forwards = self.backwards = 0
        run.collectives.listeners.append(self._hear)

    def _hear(self, name: str, args: tuple[Any, ...]) -> None:
        self._thread = threading.get_ident()

    def begin_forward(self) -> None:
        """Count a wrapper's forward."""
        self.forwards += 1

    def begin_backward(self) -> None:
        """Count a backward, and note which thread trains."""
        self.backwards += 1
        self._thread = threading.get_ident()

    def read(self, state: str = RUNS) -> Position:
        """Return where this rank is now."""
        lead = self._run.steps.lead_done()
        steps = self._run.steps.most if lead is None else lead
        counts = self.forwards, self.backwards, steps, self._run.collectives.num_called
        if counts != self._last:
            self._last, self._since = counts, time.monotonic()
        position = Position(state, *counts, silent_s=time.monotonic() - self._since)
        frame = sys._current_frames().get(self._thread or 0)  # pyright: ignore[reportPrivateUsage]
        if state != RUNS or frame is None:
            return position
        frames = [outer for outer, _ in traceback.walk_stack(frame)]
        call = _read_call(frames)
        position = dataclasses.replace(position, call=call, site=site_of(*find_call_frames_among(iter(frames))))
        has_recorder = internals.DUMP_FLIGHT_RECORDER.get(None) is not None
        pending = _read_pending() if has_recorder else None
        if pending and (call or not pending["profiling_name"].startswith("gloo")):
            group, description = pending["process_group"]
            return dataclasses.replace(
                position,
                operation=pending["profiling_name"].partition(":")[2] or call,
                sequence=0 if pending["is_p2p"] else pending["collective_seq_id"],
                group=group,
                is_of_all=description == "default_pg",
            )
        # The recorder knows no point-to-point calls of gloo; where there is none, the stack must do.
        sends = communicates(frames[0]) or (pending is None and not has_recorder and call == "backward")
        return dataclasses.replace(position, operation=call if call and sends else "")


def _read_call(frames: list[FrameType]) -> str:
    """Return the torch function that the user's line called; empty where it called none."""
    inside = itertools.takewhile(lambda frame: not is_user_file(frame.f_code.co_filename), frames)
    of_torch = [frame.f_code for frame in inside if frame.f_code.co_filename.startswith(TORCH)]
    public = (code for code in of_torch if code.co_name == "__init__" or not code.co_name.startswith("_"))
    names = [code.co_qualname for code in public if code.co_name not in _PASSING_ON]
    kind, _, name = (names[-1] if names else "").rpartition(".")
    return kind.rpartition(".")[2] if name == "__init__" else name


def communicates(frame: FrameType) -> bool:
    """Say whether a frame runs code of torch's that sends, or the engine, which may."""
    file = frame.f_code.co_filename
    return file.startswith(TORCH) and file.removeprefix(TORCH).startswith((*_COMMUNICATES, _ENGINE))


def _read_pending() -> dict[str, Any] | None:
    """Return the oldest collective that has begun and not ended, as the flight recorder has it."""
    entries = json.loads(internals.DUMP_FLIGHT_RECORDER.get()()).get("entries", [])
    pending = [each for each in entries if not each["retired"] and each["state"] != "completed"]
    return min(pending, key=lambda each: each["record_id"], default=None)
