"""DC111: gradients that are clipped while they are a rank's own, and averaged afterwards."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from ddpcall import torch_internals as internals
from ddpcall.taps import NOWHERE, CallSite, find_call_site
from ddpcall.watch.rules.rule import Rule, count_parameters
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.clipping import Clipping
from ddpcall.watch.sensors.collectives import Mark
from ddpcall.watch.sensors.reducer_state import address_of, nonzero
from ddpcall.watch.sensors.steps import Step


@dataclass(frozen=True)
class _Gradient:
    """One rank's own gradient, as it was when it was clipped."""

    parameter: weakref.ref[Tensor]
    address: int
    version: int

    def current(self) -> Tensor | None:
        """Return the gradient if it is the same tensor still."""
        parameter = self.parameter()
        gradient = None if parameter is None else parameter.grad
        return gradient if gradient is not None and address_of(gradient) == self.address else None


@dataclass
class _Clipped:
    """One clipping of gradients that were this rank's own.

    Attributes:
        site: The line.
        cut: What it did, in words.
        mark: When it was, in the log of collectives.
        gradients: By id of the parameter.
    """

    site: CallSite
    cut: str
    mark: Mark
    gradients: dict[int, _Gradient]


class ClippingRule(Rule):
    """A rank's own gradients, clipped and then averaged: every rank scales by a factor of its own.

    It is told at the step that uses them: only then it is known that they were averaged, by a reducer or by hand.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._clipped: list[_Clipped] = []
        self._told: set[CallSite] = set()

    def clipping(self, clipping: Clipping) -> None:
        """Note gradients that are about to be clipped while they are this rank's own."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        if clipping.is_given and self._run.collectives.num_sent():
            return  # a norm that the ranks agreed on: all scale by the same factor
        own = self._own(clipping.parameters)
        site = find_call_site() if own else NOWHERE
        if not own or site in self._told or not clipping.cuts(own):
            return
        gradients = {
            id(p): _Gradient(weakref.ref(p), address_of(p.grad), internals.TENSOR_VERSION.of(p.grad)) for p in own
        }
        limit = f"{clipping.limit:.3g}"
        cut = f"cut what is larger than {limit}"
        if clipping.norm is not None:
            cut = f"scaled them by {clipping.coefficient():.2g} (norm {float(clipping.norm):.3g}, limit {limit})"
        self._clipped.append(_Clipped(site, cut, self._run.collectives.mark(), gradients))

    def _own(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return the parameters whose gradients no reducer has averaged yet, and that the script did not send."""
        owner, outside = self._run.models.owner, list[Tensor]()
        own = list[Tensor]()
        for parameter in parameters:
            state = owner.get(id(parameter))
            if state is None:
                outside.append(parameter)
            elif any(id(parameter) in each.dirty for each in (state, *state.sharing)):
                own.append(parameter)
        sent = [p.grad for p in (outside + own) if p.grad is not None]
        return [] if self._run.collectives.covers(sent) else outside + own

    def before_backward(self) -> None:
        """Forget what was clipped and then dropped: per-sample gradients are clipped one after the other."""
        if self._clipped:
            living = [[g.current() for g in clipped.gradients.values()] for clipped in self._clipped]
            pairs = zip(self._clipped, living, strict=True)
            self._clipped = [clipped for clipped, gradients in pairs if nonzero(gradients)]

    def judge(self, step: Step) -> None:
        """Report what was clipped, if the step uses it and it was averaged since."""
        for clipped in self._clipped:
            keys = self._averaged(clipped, step)
            if keys and clipped.site not in self._told:
                self._told.add(clipped.site)
                self._report(clipped, keys, step)

    def after_step(self, step: Step) -> None:
        """Forget what the step has used up."""
        stepped = step.view.parameters.keys()
        self._clipped = [clipped for clipped in self._clipped if not clipped.gradients.keys() & stepped]

    def _averaged(self, clipped: _Clipped, step: Step) -> list[int]:
        """Return the parameters, by id, whose clipped gradients were averaged before this step."""
        models, collectives = self._run.models, self._run.collectives
        used = {key: g for key, gradient in clipped.gradients.items() if (g := gradient.current()) is not None}
        used = {key: gradient for key, gradient in used.items() if step.get(key) is not None}
        reduced = [
            key
            for key in used
            if (state := models.owner.get(key)) is not None
            and not any(key in each.dirty for each in (state, *state.sharing))
        ]
        by_hand = [key for key in used if key not in set(reduced)]
        gradients = [used[key] for key in by_hand]
        written = all(internals.TENSOR_VERSION.of(used[key]) > clipped.gradients[key].version for key in by_hand)
        if by_hand and (
            collectives.sent(gradients, clipped.mark) or (written and collectives.covers(gradients, clipped.mark))
        ):
            return reduced + by_hand
        return reduced

    def _report(self, clipped: _Clipped, keys: list[int], step: Step) -> None:
        owner = self._run.models.owner
        names = tuple(state.names[key] for key in keys if (state := owner.get(key)) is not None)
        count = count_parameters(names) if names else f"{len(keys)} parameter{'s' * (len(keys) != 1)}"
        message = (
            f"Gradients of {count} were clipped here before the ranks averaged them for optimizer step "
            f"{step.number}: rank {dist.get_rank()} {clipped.cut}, and every rank clips by its own gradients."
        )
        cause = "clipped_before_reduction"
        self.report("DC111", cause, clipped.site, message, step=step.number, parameters=names)


RULES = (ClippingRule,)
