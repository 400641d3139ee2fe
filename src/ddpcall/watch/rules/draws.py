"""DC404: every rank draws the same random numbers for batches that differ."""

from __future__ import annotations

import math
from collections.abc import Callable

from ddpcall.watch.rules.rule import and_lines, make_finding
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.draws import Draw, DrawSensor

_LOOKED_AT = (2, 4, 8, 16)
"""Steps whose draws are looked at; all ranks' generators are compared after them and after the one before."""
_LEAST_DRAWN = 32


class DrawRule:
    """Looks at the draws of a few steps, and at what comparisons say of the ranks' generators around them.

    What is drawn for a batch has its size: noise on weights, which has to be the same everywhere, has not.

    Args:
        run: What this rank knows.
        is_compiled: Says whether anything is compiled: then nothing is looked at, since compiled code would be
            compiled anew where torch's functions are replaced.

    Blind to: draws whose first dimension is not that of an input of the wrapper, or whose shape is a parameter's.
    """

    def __init__(self, run: Run, is_compiled: Callable[[], bool]) -> None:
        self._run = run
        self._is_compiled = is_compiled
        self.sensor = DrawSensor(run)
        self._alike: list[int] = []
        self._looked: dict[int, list[Draw]] = {}

    def compared(self, step: int, num_ranks: int, is_alike: bool) -> None:
        """Take what a comparison says of a step.

        Args:
            step: The optimizer step.
            num_ranks: Those that were compared.
            is_alike: Whether the generators' states are equal on all ranks, and their batches are not.
        """
        self._alike = [*self._alike, step] if is_alike else []
        draws = self._looked.pop(step, [])
        if draws and step - 1 in self._alike and is_alike:
            self._looked.clear()
            self._report(draws, num_ranks)

    def look_at(self, step: int) -> None:
        """Hear of the draws of a step that is about to be prepared, if it is one of those."""
        if step in _LOOKED_AT and not self._is_compiled():
            self.sensor.open()

    def looked(self, step: int, batch_sizes: set[int], weights: set[tuple[int, ...]], device: str) -> None:
        """Take the draws of a step that is done.

        Args:
            step: The optimizer step.
            batch_sizes: The first dimensions of what the wrapper was called with.
            weights: The shapes of the model's parameters.
            device: The type of the device whose generator is compared.
        """
        drawn = [draw for draw in self.sensor.close() if draw.device == device and draw.shape]
        drawn = [draw for draw in drawn if draw.shape[0] in batch_sizes and draw.shape not in weights]
        if sum(math.prod(draw.shape) for draw in drawn) >= _LEAST_DRAWN:
            self._looked[step] = drawn

    def _report(self, draws: list[Draw], num_ranks: int) -> None:
        num = sum(math.prod(draw.shape) for draw in draws)
        sites = list(dict.fromkeys(draw.site for draw in draws))
        lines = and_lines(sites[0], tuple(sites[1:]))
        message = (
            f"All {num_ranks} ranks drew the same {num} random numbers here{lines} in one step, each for a batch "
            "of its own: their default generators were in the same state before and after."
        )
        ranks = tuple(range(num_ranks))
        self._run.report(make_finding("DC404", "same_draws", sites[0], message, step=self._alike[0], ranks=ranks))
