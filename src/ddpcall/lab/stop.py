"""A run that is told to stop: the ranks agree on a step, and save what they have after it."""

from __future__ import annotations

import contextlib
import threading

from ddpcall.lab.world import RankLost, World

SAVE_SECONDS = 10.0  # torchrun, SLURM and Kubernetes kill 30 s after SIGTERM
_STEPS_AHEAD = 2
_ANSWER_SECONDS = 5.0


class Stop:
    """Between the guard's thread, which hears of a signal, and the training, which saves.

    Rank 0 names a step that is still to come once every rank has heard of the stop, so that no rank is past it
    while another waits for it in a collective.

    Attributes:
        can_save: Whether a trial runs that would save.
        is_over: Set once the trial has saved, or cannot.
        saved_step: The steps that the checkpoint holds; None where there is none.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._asked = threading.Event()
        self.can_save = False
        self.is_over = threading.Event()
        self.saved_step: int | None = None

    def ask(self) -> None:
        """Ask all ranks to stop, and hear of it here."""
        if self._world.store is not None:
            self._world.store.set("stopping", "yes")
        self.listen()

    def listen(self) -> None:
        """Hear whether some rank asked."""
        world = self._world
        if not self._asked.is_set() and (world.store is None or world.store.check(["stopping"])):
            world.publish("stop_heard", True)
            self._asked.set()

    def is_due(self, done: int) -> bool:
        """Say whether this rank is to stop after so many steps; then all are there. Costs nothing until asked."""
        if not self._asked.is_set():
            return False
        world = self._world
        if world.store is None:
            return True
        if world.rank == 0 and not world.has("stop_after", 0) and not world.wait_for("stop_heard", 0.0):
            world.publish("stop_after", done + _STEPS_AHEAD)
        if not world.has("stop_after", 0) or done < world.read("stop_after", 0):
            return False
        is_there = False
        with contextlib.suppress(RankLost):
            is_there = all(world.collect("stop_at", done == world.read("stop_after", 0), _ANSWER_SECONDS))
        if not is_there:
            self.is_over.set()
        return is_there

    def finish(self) -> None:
        """Wait until every rank is done with saving: rank 0 is the last, and the first that leaves ends all."""
        with contextlib.suppress(RankLost):
            self.saved_step = self._world.collect("stop_saved", self.saved_step, _ANSWER_SECONDS)[0]
        self.is_over.set()
