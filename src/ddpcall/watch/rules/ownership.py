"""DC102, DC103, DC109: parameters that no reducer owns, that a conversion took away, or that no optimizer has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from ddpcall.replicas import digest_tensor
from ddpcall.taps import NOWHERE, CallSite, find_call_site
from ddpcall.watch.rules.own_numbers import OwnNumbers
from ddpcall.watch.rules.rule import Rule, count_parameters, make_finding
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.reducer_state import ReducerState, nonzero
from ddpcall.watch.sensors.steps import Step

_PATIENCE_STEPS = 6
"""Steps within which a copy of the model is copied back."""


class OwnershipRule(Rule):
    """Parameters that an optimizer steps, and whose gradients no reducer averages.

    Of parameters outside every wrapper the mixing matrix tells. An optimizer of a copy of the wrapped model, whose
    parameters have the same shapes, is told some steps later, where nothing has moved the model.

    Blind to: parameters whose names are DDP's to ignore; optimizers that have some of the model's shapes alone.
    """

    def __init__(self, run: Run, numbers: OwnNumbers) -> None:
        super().__init__(run)
        self._numbers = numbers
        self._of_copies: dict[int, tuple[int, int, list[int]]] = {}

    def judge(self, step: Step) -> None:
        """Report gradients of parameters that were added, unfrozen or converted after wrapping."""
        if not dist.is_initialized():
            return
        for state in step.states:
            if state.detached:
                self._judge_detached(state, step)
        if step.view.unowned:
            self._judge_unowned(step)

    def after_step(self, step: Step) -> None:
        """Note a reduced model that this step's optimizer has a copy of; see some steps later whether it moved."""
        if step.states:
            return
        for state in self._run.models.reducer_states:
            if state.num_steps or not state.num_reductions:
                continue
            held = [parameter for key in step.view.parameters if (parameter := step.get(key)) is not None]
            if id(state) not in self._of_copies and _shapes(held) == _shapes(state.parameters()):
                digests = list(map(digest_tensor, state.parameters()))
                self._of_copies[id(state)] = (step.number, state.num_reductions, digests)
            first, num_reductions, digests = self._of_copies.get(id(state), (0, 0, []))
            has_run = step.number == first + _PATIENCE_STEPS and state.num_reductions > num_reductions
            if digests and has_run and digests == list(map(digest_tensor, state.parameters())):
                self._report_copy(state, step)

    def _report_copy(self, state: ReducerState, step: Step) -> None:
        names = tuple(state.names.values())
        if self._run.is_explained(names[0]):
            return
        message = (
            f"The optimizer that was made here holds a copy of {state.name}: the gradients of "
            f"{count_parameters(names)} were averaged in {state.num_reductions} backwards, no optimizer has them, "
            "and none has moved."
        )
        site = self._run.sites.optimizers.get(step.optimizer, NOWHERE)
        self.report("DC109", "copied", site, message, step=1, parameters=names)

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


def _shapes(parameters: Iterable[Tensor]) -> Counter[tuple[int, ...]]:
    return Counter(tuple(parameter.shape) for parameter in parameters)
