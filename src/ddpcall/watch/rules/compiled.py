"""DC302 and DC303: compiled modules that run eager, and hooks that were registered too late to be compiled in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ddpcall.taps import CallSite, Undo
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.compiled import CompiledRoot, CompiledSensor
from ddpcall.watch.sensors.steps import Step

_MOST_WAITING = 16


class CompiledRule(Rule):
    """A part of a compiled module that is reached from outside runs as it was written.

    Blind to: eager parts after a graph break; compiled functions that are no modules.
    """

    part = "torch.compile"

    def __init__(self, run: Run, adopted: Callable[[nn.Module], None]) -> None:
        super().__init__(run)
        self.sensor = CompiledSensor(run, adopted, self.ran_eagerly)

    def attach(self) -> Undo:
        """Attach its sensor; returns the undo."""
        return self.sensor.attach()

    def ran_eagerly(self, root: CompiledRoot, site: CallSite, is_whole: bool) -> None:
        """Report an eager entry; without gradients it is harm only if the compiled call is never used.

        Args:
            root: The compiled module.
            site: The line that entered it, or a part of it.
            is_whole: Whether all of it was entered, of a module that was compiled in place.
        """
        if is_whole or torch.is_grad_enabled():
            self._report_bypassed(root, site)
        elif len(root.waiting) < _MOST_WAITING:
            root.waiting.append(site)

    def before_step(self, step: Step) -> None:
        """Judge what happened since the last step."""
        self._judge_late_hooks()
        for root in self.sensor.roots:
            state = (root.calls, root.entries)
            parameters = [] if (module := root.module()) is None else module.parameters()
            if state == root.seen and root.methods and step.gradients(map(id, parameters)):
                self._report_bypassed(root, root.methods[-1])
            root.seen, root.methods = state, []

    def close(self, in_order: bool) -> None:
        """Judge what was left for the end."""
        self._judge_late_hooks()
        for late in self.sensor.late:
            late.undo()
        for root in self.sensor.roots:
            if not root.calls:
                for site in dict.fromkeys(root.waiting):
                    self._report_bypassed(root, site)

    def _report_bypassed(self, root: CompiledRoot, site: CallSite) -> None:
        message = f"{root.name} was compiled, and runs eager when it is reached from here."
        self.report("DC302", "compiled_bypassed", site, message)

    def _judge_late_hooks(self) -> None:
        for late in list(self.sensor.late):
            has_fired = bool(late.counter)
            if not has_fired and late.root.calls <= late.calls:
                continue
            self.sensor.late.remove(late)
            late.undo()
            if not has_fired:
                message = (
                    f"The hook registered here on {late.module}, after its first compiled call, has not fired "
                    "since."
                )
                self.report("DC303", "late_hook", late.site, message)
