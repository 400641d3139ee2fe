"""DC113: a gather that lets no gradient through, in a loss."""

from __future__ import annotations

from collections.abc import Callable

from ddpcall import torch_internals as internals
from ddpcall.taps import Undo
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.gathers import Gather, GatherSensor
from ddpcall.watch.sensors.steps import Step


class GatherRule(Rule):
    """Tells, at the step, of gathered tensors in a loss whose own part, this rank's, has no gradient.

    Blind to: a part that the loss masks out, which is told all the same; see `GatherSensor`.
    """

    part = "gathered objects"

    def __init__(self, run: Run, is_due: Callable[[], bool]) -> None:
        super().__init__(run)
        self.sensor = GatherSensor(run, is_due)

    def attach(self) -> Undo:
        """Attach its sensor; returns the undo."""
        return self.sensor.attach()

    def before_backward(self) -> None:
        """Everything that the loss is made of was computed."""
        self.sensor.stop()

    def before_step(self, step: Step) -> None:
        """Report what a backward went through."""
        for gather in self.sensor.take():
            self._report(gather, step)

    def close(self, in_order: bool) -> None:
        """Look no further."""
        self.sensor.stop()

    def _report(self, gather: Gather, step: Step) -> None:
        used = gather.used
        where = f"line {used.line}" if used is not None and used.file == gather.site.file else "the loss"
        where = "this line" if used == gather.site else where
        shape = " × ".join(map(str, gather.shape)) or "one number"
        message = (
            f"The tensor ({shape}) that is gathered from {gather.num_ranks} ranks here requires grad, and the "
            f"result does not. {where[0].upper()}{where[1:]} computes with it, this rank's own part included: "
            f"in the backward of optimizer step {step.number} nothing flowed back to it from there."
        )
        self.report("DC113", "gathered", gather.site, message, step=step.number, fix=advise(gather.by_lightning))


def advise(by_lightning: bool) -> str:
    """Return the line that gathers with a gradient, of this torch or of Lightning."""
    if by_lightning:
        return "Let Lightning gather with a gradient: `all_gather(features, sync_grads=True)`."
    functional = internals.FUNCTIONAL_COLLECTIVES
    name = "all_gather_single" if hasattr(functional.get(None), "all_gather_single") else "all_gather_tensor"
    return (
        f"Gather with a gradient: `gathered = {functional.path}.{name}(features.contiguous(), 0, "
        "dist.group.WORLD)`, all ranks' rows in one tensor."
    )
