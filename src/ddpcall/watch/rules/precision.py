"""DC304: calls that miss the mixed precision a model was prepared for."""

from __future__ import annotations

from torch import nn

from ddpcall.taps import CallSite
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.precision import PrecisionSensor


class PrecisionRule(Rule):
    """A submodule of a prepared model was entered with gradients on, outside its autocast.

    Blind to: other libraries' autocast; parameters that are used without a forward.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.sensor = PrecisionSensor(run, self.lost)

    def lost(self, root: nn.Module, precision: str, site: CallSite) -> None:
        """Report a call that missed its root's autocast."""
        message = (
            f"{type(root).__name__} was prepared for {precision}, but ran outside its autocast when reached from "
            "here."
        )
        self.report("DC304", "precision_lost", site, message)
