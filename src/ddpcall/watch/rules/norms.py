"""DC112: the norm of gradients that are averaged already is summed over the ranks, and they are clipped by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddpcall.taps import CallSite, find_call_site, in_backward
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.clipping import Clipping
from ddpcall.watch.sensors.collectives import find_summed
from ddpcall.watch.sensors.reducer_state import ReducerState
from ddpcall.watch.sensors.steps import Step

ROUNDING = 1e-3
MOST_LINES = 8
"""Lines whose scalars are compared with the gradients' norm; one that sends something else is left alone then."""


@dataclass
class _Summed:
    """A scalar that is the norm of averaged gradients, or its square, and is summed over the ranks.

    Attributes:
        site: The line.
        scalar: The tensor that is summed in place.
        value: What it was before.
        factor: How many times too large the norm is afterwards.
        norms: Of each gradient.
    """

    site: CallSite
    scalar: Tensor
    value: float
    factor: float
    norms: Tensor

    def norm(self) -> float:
        """Return the total norm as it was."""
        return float(self.norms.norm())

    def is_summed(self) -> bool:
        """Say whether the scalar is the sum still: all ranks had the same, and nobody divided it since."""
        return math.isclose(float(self.scalar), dist.get_world_size() * self.value, rel_tol=ROUNDING)


class NormRule(Rule):
    """Gradients that DDP has averaged are the same on all ranks, and so is their norm.

    Summed over the ranks it is too large by the square root of their number. It is told once
    `clip_grads_with_norm_` has clipped gradients by it.

    Blind to: other norms than the Euclidean; models without DDP; clipping by hand, where the norm that was summed
    may be for the log alone: the gradients do not tell by which norm they were scaled.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._summed: _Summed | None = None
        self._matches: dict[CallSite, bool] = {}
        run.collectives.listeners.append(lambda name, args: run.contain(self._hear, name, args))

    def _hear(self, name: str, args: tuple[Any, ...]) -> None:
        """Compare a scalar that is summed over all ranks with the norms of averaged gradients."""
        scalar = find_summed(args) if name == "allreduce" else None
        if scalar is None or scalar.numel() != 1 or not scalar.is_floating_point() or in_backward():
            return
        averaged = [state for state in self._run.models.reducer_states if _is_averaged(state)]
        site = find_call_site() if averaged else None
        if site is None or not self._matches.get(site, len(self._matches) < MOST_LINES):
            return
        value = float(scalar)
        for state in averaged:
            gradients = [p.grad for p in state.parameters() if p.grad is not None]
            norms = torch.stack([gradient.norm() for gradient in gradients])
            norm, ranks = float(norms.norm()), dist.get_world_size()
            for factor, expected in ((math.sqrt(ranks), norm**2), (float(ranks), norm)):
                if value > 0 and math.isclose(value, expected, rel_tol=ROUNDING):
                    self._matches[site] = True
                    self._summed = _Summed(site, scalar, value, factor, norms)
                    return
        self._matches[site] = False

    def clipping(self, clipping: Clipping) -> None:
        """Compare the norm that gradients are clipped by with the one that was summed."""
        summed, self._summed = self._summed, None
        if summed is None or clipping.norm is None:
            return
        if not math.isclose(float(clipping.norm), summed.factor * summed.norm(), rel_tol=ROUNDING):
            # With a limit of infinity, clip_grad_norm_ gives the norm and cuts nothing.
            self._summed = None if clipping.coefficient() < 1 else summed
        elif clipping.coefficient() < 1 and summed.is_summed():
            self._report(summed, min(clipping.limit / summed.factor, summed.norm()), self._run.steps.preparing())

    def after_step(self, step: Step) -> None:
        """Forget what was summed for the step that has ended."""
        self._summed = None

    def _report(self, summed: _Summed, limit: float, step: int) -> None:
        ranks = dist.get_world_size()
        message = (
            f"The gradients are averaged already, and their norm is {summed.norm():.3g} on every rank. Summed "
            f"over {ranks} ranks here it is {summed.factor:.3g} times too large: in optimizer step {step} "
            f"gradients were clipped to {limit:.3g} instead of {min(limit * summed.factor, summed.norm()):.3g}."
        )
        self.report("DC112", "norm_summed", summed.site, message, step=step)


def _is_averaged(state: ReducerState) -> bool:
    ddp = state.ddp()
    if ddp is None or state.dirty or state.armed or not state.num_reductions:
        return False
    spans_world = dist.get_world_size(ddp.process_group) == dist.get_world_size()
    return spans_world and any(p.grad is not None for p in state.parameters())


RULES = (NormRule,)
