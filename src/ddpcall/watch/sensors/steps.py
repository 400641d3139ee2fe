"""Optimizer steps: what each of them steps, and when its gradients are those that it uses."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpcall import torch_internals as internals
from ddpcall.taps import Undo, in_backward, remove_handles
from ddpcall.watch.models import Models
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.reducer_state import ReducerState


@dataclass(frozen=True)
class OptimizerView:
    """An optimizer's parameters as the reducers see them; made anew when the structure changes.

    Attributes:
        signature: What it was made for.
        parameters: Its parameters by id.
        states: The reducers that own some of them.
        unowned: Those in a wrapped model that no reducer owns: name and model, by id.
        is_sharded: Whether any is a DTensor.
    """

    signature: tuple[int, ...]
    parameters: dict[int, weakref.ref[Tensor]]
    states: list[ReducerState]
    unowned: dict[int, tuple[str, ReducerState]]
    is_sharded: bool


@dataclass(frozen=True)
class Step:
    """One step of an optimizer.

    Attributes:
        optimizer: The one that steps.
        number: Its steps so far, this one included.
        view: Its parameters.
        is_nested: Whether another optimizer's step is running, as one that wraps this one.
    """

    optimizer: Optimizer
    number: int
    view: OptimizerView
    is_nested: bool = False

    @property
    def states(self) -> list[ReducerState]:
        """The reducers that own some of its parameters."""
        return self.view.states

    def get(self, key: int) -> Tensor | None:
        """Return a parameter by id, None when this optimizer has none such."""
        reference = self.view.parameters.get(key)
        return None if reference is None else reference()

    def gradients(self, keys: Iterable[int]) -> list[Tensor]:
        """Return the gradients that are there, of parameters by id."""
        parameters = [parameter for key in keys if (parameter := self.get(key)) is not None]
        return [parameter.grad for parameter in parameters if parameter.grad is not None]


class StepSensor:
    """Hears of every optimizer's steps, counts them, and tells the rules.

    Args:
        run: What this rank knows.
        models_used: Hears of models that an optimizer steps.

    Attributes:
        numel: Elements of the largest optimizer's parameters.
    """

    def __init__(self, run: Run, models_used: Callable[[list[ReducerState]], None]) -> None:
        self._run = run
        self._models_used = models_used
        self._views: dict[int, OptimizerView] = {}
        self._stepping: list[int] = []
        self._judged_after: set[int] = set()
        self.numel = 0

    def attach(self) -> Undo:
        """Hear of every optimizer's steps; returns the undo."""
        return remove_handles(
            register_optimizer_step_pre_hook(partial(self._run.contain, self._before_step)),
            register_optimizer_step_post_hook(partial(self._run.contain, self._after_step)),
        )

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._run.steps.begin(optimizer)
        self._leave(optimizer)  # an earlier step of its may have raised
        self._stepping.append(id(optimizer))
        step = self._step(optimizer)
        if step.number == 1:
            parameters = (each for group in optimizer.param_groups for each in group["params"])
            self.numel = max(self.numel, sum(each.numel() for each in parameters if not is_lazy(each)))
        for state in step.states:
            state.count_step(step.number)
        self._models_used(step.states)
        for rule in self._run.rules:
            rule.before_step(step)
        if in_backward():
            return
        if _is_judged_after(optimizer, args, kwargs):
            self._judged_after.add(id(optimizer))
        else:
            self._judge(step)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._leave(optimizer)
        if in_backward():
            return
        step = self._step(optimizer)
        if id(optimizer) in self._judged_after:
            self._judged_after.discard(id(optimizer))
            self._judge(step)
        for state in step.states:
            state.end_step()
        self._run.collectives.end_step()
        for rule in self._run.rules:
            rule.after_step(step)

    def _judge(self, step: Step) -> None:
        for rule in self._run.rules:
            rule.judge(step)

    def _leave(self, optimizer: Optimizer) -> None:
        with suppress(ValueError):
            del self._stepping[self._stepping.index(id(optimizer)) :]

    def _step(self, optimizer: Optimizer) -> Step:
        models, groups = self._run.models, optimizer.param_groups
        signature = (models.structure, *(len(group["params"]) for group in groups))
        view = self._views.get(id(optimizer))
        if view is None or view.signature != signature:
            parameters = [parameter for group in groups for parameter in group["params"]]
            view = self._views[id(optimizer)] = _look_at(parameters, models, signature)
        return Step(optimizer, self._run.steps.of(optimizer), view, self._stepping not in ([], [id(optimizer)]))


def _look_at(parameters: list[Tensor], models: Models, signature: tuple[int, ...]) -> OptimizerView:
    states = {id(state): state for p in parameters if (state := models.owner.get(id(p))) is not None}
    stepped = {id(parameter) for parameter in parameters}
    unowned: dict[int, tuple[str, ReducerState]] = {}
    for state in models.reducer_states:
        ddp = state.ddp()
        if ddp is None:
            continue
        for name, parameter in ddp.module.named_parameters():
            is_owned = id(parameter) in models.owner or name in ddp.parameters_to_ignore
            if id(parameter) in stepped and not is_owned:
                unowned[id(parameter)] = (name, state)
    return OptimizerView(
        signature,
        {id(parameter): weakref.ref(parameter) for parameter in parameters},
        list(states.values()),
        unowned,
        any(type(parameter).__name__ == "DTensor" for parameter in parameters),
    )


def _is_judged_after(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether gradients are made or may be reduced in the step: by a closure, a hook, an optimizer's own way.

    Torch calls the optimizer's own hooks after the global ones. Source: `profile_hook_step` in
    torch/optim/optimizer.py.
    """
    has_own_way = not type(optimizer).step.__module__.startswith("torch.")
    # torch hands the hook the arguments of `step` with the optimizer itself in front.
    values = [value for value in args if not isinstance(value, Optimizer)] + [kwargs.get("closure")]
    has_hooks = bool(internals.OPTIMIZER_STEP_PRE_HOOKS.of(optimizer, ()))
    return has_own_way or has_hooks or any(map(callable, values))
