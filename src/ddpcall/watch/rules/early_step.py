"""DC105: an optimizer that steps inside the backward, before the reducer has averaged."""

from __future__ import annotations

import torch.distributed as dist

from ddpcall import torch_internals as internals
from ddpcall.taps import find_call_site, in_backward
from ddpcall.watch.rules.rule import Rule, count_parameters
from ddpcall.watch.sensors.steps import Step


class EarlyStepRule(Rule):
    """A step in a hook of a gradient's is early while the reducer is armed.

    Silent on `_apply_optimizer_in_backward`: DDP knows of such optimizers, and steps them after the reduction.
    """

    def before_step(self, step: Step) -> None:
        """Report a step inside a backward whose gradients are still to be reduced."""
        if not in_backward() or not dist.is_initialized():
            return
        in_backward_optimizers = internals.IN_BACKWARD_OPTIMIZERS
        for state in step.states:
            if not state.armed:
                continue
            if any(in_backward_optimizers.of(parameter, None) is not None for parameter in state.parameters()):
                continue
            names = tuple(name for key, name in state.names.items() if key in step.view.parameters)
            message = (
                f"The optimizer stepped inside the backward (step {step.number}), before the reducer had averaged "
                f"the gradients of {count_parameters(names)}."
            )
            self.report("DC105", "stepped_early", find_call_site(), message, step=step.number, parameters=names)


RULES = (EarlyStepRule,)
