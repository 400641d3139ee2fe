"""Losses that take a mean over targets: of how many, and what the backward multiplies each mean by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpcall import torch_internals as internals
from ddpcall.accelerator import is_capturing
from ddpcall.taps import CallSite, Undo, find_call_site, outside_dynamo, replace_attribute, undo_all
from ddpcall.targets import LOSSES, count_targets, wrap_loss
from ddpcall.watch.run import Run

_MAX_KEPT = 4096

Means = tuple[tuple[str, int, float, int], ...]
"""By line, `file:line`: targets, the sum of what the means were multiplied by, and means in one backward."""


@dataclass
class _Mean:
    """One mean that was computed, and each backward that went through it."""

    place: str
    num_targets: Tensor | int
    factors: list[tuple[int, Tensor]] = field(default_factory=list)


class LossSensor:
    """Sees the means that are computed for a measured step, on the functions of `ddpcall.targets.LOSSES`.

    What reaches a mean in the backward is what the script multiplies it by: a loss that nothing flows back through
    counts nothing, and one that is scaled by its own number of targets shows that it is.

    Args:
        run: What this rank knows.
        is_due: Says whether the step that is being prepared is measured.

    Attributes:
        sites: By place: the line, as it was seen last.
        is_paused: Whether the backward that runs hands no parameter a gradient.

    Blind to: losses in compiled code, under `torch.func`, of DTensors, and functions that were imported by name
    before the watch began.
    """

    def __init__(self, run: Run, is_due: Callable[[], bool]) -> None:
        self._contain = run.contain
        self._is_due = is_due
        self._is_busy = False
        self._means: list[_Mean] = []
        self.sites: dict[str, CallSite] = {}
        self.is_paused = False

    def attach(self) -> Undo:
        """See losses from now on; returns the undo."""
        return undo_all(replace_attribute(F, loss.__name__, wrap_loss(loss, self._call)) for loss in LOSSES)

    def take(self) -> Means:
        """Return what was seen since the last call; waits for the device where targets are on one."""
        means, self._means = self._means, []
        by_place: dict[str, list[_Mean]] = {}
        for mean in means:
            if mean.factors:
                by_place.setdefault(mean.place, []).append(mean)
        return tuple((place, *_sum_up(seen)) for place, seen in by_place.items())

    def _call(self, loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A mode for torch functions calls the loss once more from inside.
        if self._is_busy or not self._is_due():
            return loss(*args, **kwargs)
        self._is_busy = True
        try:
            mean = loss(*args, **kwargs)
            self._contain(self._see, mean, loss, args, kwargs)
        finally:
            self._is_busy = False
        return mean

    def _see(self, mean: Any, loss: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (mean, *args, *kwargs.values())
        if any(isinstance(value, Tensor) and type(value) not in (Tensor, torch.nn.Parameter) for value in values):
            return
        if mean.grad_fn is None or internals.FUNCTORCH_LEVEL.get(lambda: None)() is not None:
            return
        if is_capturing(mean):
            return
        with torch.no_grad():
            count = count_targets(loss, args, kwargs)
        if count is None:
            return
        site = find_call_site()
        seen = _Mean(f"{site.file}:{site.line}", count)
        self.sites[seen.place] = site
        self._means = [*self._means[1 - _MAX_KEPT :], seen]
        # On the node, not on the tensor: the script may divide the loss in place.
        mean.grad_fn.register_prehook(outside_dynamo(partial(self._note_factor, seen)))

    def _note_factor(self, mean: _Mean, gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None and not self.is_paused:
            mean.factors.append((internals.graph_task(), gradients[0].detach().clone()))


def _sum_up(means: list[_Mean]) -> tuple[int, float, int]:
    tasks = [task for mean in means for task, _ in mean.factors]
    return (
        sum(int(mean.num_targets) * len(mean.factors) for mean in means),
        sum(float(factor) for mean in means for _, factor in mean.factors),
        max(map(tasks.count, tasks)),
    )
