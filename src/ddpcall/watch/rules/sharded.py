"""DC306, and DC104 of sharded models: gradients that never reach the shards, and crashes that a bypass caused.

fully_shard computes with whole parameters and reduces their gradients into the shards after the backward. A
gradient that still lies on a whole parameter when the optimizer steps was not reduced, and the step goes without
it: synchronization was off, or the forward went past the hooks. Forwards past them only serve to name the line.
"""

from __future__ import annotations

import traceback
from types import FrameType
from typing import Any

from torch import nn

from ddpcall.taps import CallSite, came_through_call, find_call_frames_among, site_of
from ddpcall.watch.rules.rule import Rule, and_lines, count_parameters
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.sharded import ShardedSensor, find_unreduced
from ddpcall.watch.sensors.steps import Step

_MIXED = "mixed torch.Tensor and DTensor"
_MOST_OF_AN_ERROR = 200


class ShardedRule(Rule):
    """An optimizer steps shards without gradients that lie on the whole parameters still.

    Blind to: crashes that the script catches; FSDP1; weights used without any module's forward.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.sensor = ShardedSensor(run)

    def before_step(self, step: Step) -> None:
        """Report what the coming optimizer step goes without."""
        if step.view.is_sharded:
            self.sensor.num_steps = max(self.sensor.num_steps, step.number)
        entries, groups = self.sensor.take_entries(), self.sensor.groups()
        off = [group for group in groups if not group.reduce_grads]
        if off:
            self._report_switched_off(off, step)
        if entries:
            on = [group for group in groups if group.reduce_grads]
            self._report_bypassed(on, entries, step)

    def _report_switched_off(self, groups: list[Any], step: Step) -> None:
        names, site = _find_names(groups, step), self.sensor.switched_at(groups[0])
        if names:
            message = (
                f"Gradient synchronization of {self.sensor.name()} was switched off here, and still off when "
                f"optimizer step {step.number} ran: gradients of {count_parameters(names)} were kept unreduced, "
                "and the step went without them."
            )
            self.report("DC104", "sharded_sync_off", site, message, step=step.number, parameters=names)

    def _report_bypassed(self, groups: list[Any], entries: dict[CallSite, nn.Module], step: Step) -> None:
        names, (site, *others) = _find_names(groups, step), entries
        if names:
            message = (
                f"{self.sensor.name(entries[site])} is sharded and was entered here"
                f"{and_lines(site, tuple(others))} past its hooks, while its parameters happened to be gathered: "
                f"nothing reduced their gradients, and optimizer step {step.number} went without those of "
                f"{count_parameters(names)}."
            )
            self.report("DC306", "sharded_unreduced", site, message, step=step.number, parameters=names)

    def explain_crash(self, error: BaseException) -> None:
        """Report the bypass that caused the exception which ends the script, if one did.

        The crash is a bypass's when the module that met a shard lies below a sharded module whose `__call__`, and
        with it the hook that gathers the parameters, is not on the stack.
        """
        if _MIXED not in str(error) or not self.sensor.has_hooked():
            return
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]  # outermost first
        modules = [self_ for frame in frames if isinstance(self_ := frame.f_locals.get("self"), nn.Module)]
        gatherer = self.sensor.find_gatherer(modules[-1] if modules else None)
        if gatherer is None or any(_gathers(frame, gatherer) for frame in frames):
            return
        below = {id(module) for module in gatherer.modules()}
        site = site_of(*find_call_frames_among(frames[::-1], lambda candidate: id(candidate) in below))
        message = (
            f"{type(gatherer).__name__} is sharded and was entered here past the hooks that gather its parameters"
            f": {str(error).splitlines()[0][:_MOST_OF_AN_ERROR]}"
        )
        self.report("DC306", "sharded_bypassed", site, message)


def _find_names(groups: list[Any], step: Step) -> tuple[str, ...]:
    is_stepped = step.view.parameters.__contains__
    return tuple(name for group in groups for name in find_unreduced(group, is_stepped))


def _gathers(frame: FrameType, gatherer: nn.Module) -> bool:
    if "torch/distributed/fsdp" in frame.f_code.co_filename:  # register_fsdp_forward_method's wrapper
        return True
    return came_through_call(frame) and frame.f_locals.get("self") is gatherer
