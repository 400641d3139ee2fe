"""DC102 and DC103: parameters that no reducer owns, or that a conversion took away from theirs."""

from __future__ import annotations

import torch.distributed as dist

from ddpcall.taps import NOWHERE, CallSite, find_call_site
from ddpcall.watch.rules.own_numbers import OwnNumbers
from ddpcall.watch.rules.rule import Rule, count_parameters, make_finding
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.reducer_state import ReducerState, nonzero
from ddpcall.watch.sensors.steps import Step


class OwnershipRule(Rule):
    """Parameters that an optimizer steps, and whose gradients no reducer averages.

    Of parameters outside every wrapper the mixing matrix tells.

    Blind to: parameters whose names are DDP's to ignore.
    """

    def __init__(self, run: Run, numbers: OwnNumbers) -> None:
        super().__init__(run)
        self._numbers = numbers

    def judge(self, step: Step) -> None:
        """Report gradients of parameters that were added, unfrozen or converted after wrapping."""
        if not dist.is_initialized():
            return
        for state in step.states:
            if state.detached:
                self._judge_detached(state, step)
        if step.view.unowned:
            self._judge_unowned(step)

    def _judge_detached(self, state: ReducerState, step: Step) -> None:
        by_site: dict[CallSite, list[int]] = {}
        for key, site in state.detached.items():
            if nonzero(step.gradients([key])):
                by_site.setdefault(site, []).append(key)
        for site, used in by_site.items():
            names = tuple(state.names[key] for key in used)
            message = (
                f"This conversion replaced the storage of {count_parameters(names)} of {state.name} after "
                "wrapping; the reducer's hooks hang on nodes that no backward reaches. In optimizer step "
                f"{step.number} their gradients were used unreduced."
            )
            found = make_finding("DC103", "detached", site, message, step=step.number, parameters=names)
            harm = ("detached", site, id(state))
            if self._numbers.weigh(harm, found, step, used, state.unarmed_since):
                self._run.book.report(found, harm)

    def _judge_unowned(self, step: Step) -> None:
        by_origin: dict[tuple[CallSite, int], list[int]] = {}
        for key, (_, state) in step.view.unowned.items():
            if nonzero(step.gradients([key])):
                by_origin.setdefault((self._run.models.origins.get(key, NOWHERE), id(state)), []).append(key)
        for (origin, model), keys in by_origin.items():
            is_seen = origin != NOWHERE
            names = tuple(step.view.unowned[key][0] for key in keys)
            where = ", here" if is_seen else " and before the watch could see it"
            message = (
                f"{count_parameters(names)} of the wrapped model became trainable after wrapping{where}; no "
                f"reducer owns them. In optimizer step {step.number} they were stepped with this rank's own "
                "gradients."
            )
            site = origin if is_seen else find_call_site()
            found = make_finding("DC102", "unowned", site, message, step=step.number, parameters=names)
            harm = ("unowned", origin, model)
            if self._numbers.weigh(harm, found, step, keys):
                self._run.book.report(found, harm)
