"""Backwards: prepare the reducer states for each, and see gradients that `torch.autograd.grad` hands out."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ddpcall import torch_internals as internals
from ddpcall.taps import NOWHERE, Undo, find_call_site, in_backward, replace_attribute, undo_all
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.gradients import GradientSensor
from ddpcall.watch.sensors.losses import LossSensor

_INPUTS = 4  # the place of the inputs among the engine's arguments


class BackwardWatch:
    """Stands around every backward that Python starts, `torch.autograd.grad`'s included, and tells the rules.

    Source: `_engine_run_backward` in torch/autograd/graph.py; torch/autograd/__init__.py imports it by name.

    Blind to: `backward()` inside a TorchScript function, which starts the engine from C++.
    """

    def __init__(self, run: Run, gradients: GradientSensor, losses: LossSensor) -> None:
        self._run = run
        self._models = run.models
        self._gradients = gradients
        self._losses = losses
        self._contain = run.contain

    def attach(self) -> Undo:
        """Watch from now on; returns the undo."""
        run = internals.ENGINE_RUN_BACKWARD.get()

        @functools.wraps(run)
        def _engine_run_backward(*args: Any, **kwargs: Any) -> Any:
            accumulates = kwargs.get("accumulate_grad", True)
            self._contain(self._begin, accumulates, () if accumulates else args[_INPUTS])
            try:
                taken = run(*args, **kwargs)
            finally:
                self._contain(self._end, accumulates)
            if not accumulates:
                self._contain(self._gradients_taken, args[_INPUTS])
            return taken

        patched = internals.disable_dynamo(_engine_run_backward, recursive=False)
        owners = (torch.autograd.graph, torch.autograd)
        return undo_all(replace_attribute(owner, internals.ENGINE_RUN_BACKWARD.name, patched) for owner in owners)

    def _begin(self, accumulates: bool, inputs: Iterable[Any]) -> None:
        if not in_backward():  # else a checkpoint's, inside another
            # Of inputs alone (adversarial examples, penalties), a loss teaches the model nothing.
            self._losses.is_paused = not accumulates and not any(isinstance(x, nn.Parameter) for x in inputs)
            if accumulates:
                for rule in self._run.rules:
                    rule.before_backward()
            self._gradients.prepare()
            for state in self._models.reducer_states:
                state.begin_backward() if accumulates else state.begin_taking()

    def _end(self, accumulates: bool) -> None:
        if not in_backward():
            self._losses.is_paused = False
            for state in self._models.reducer_states:
                state.end_backward() if accumulates else state.end_taking()

    def _gradients_taken(self, inputs: Iterable[Any]) -> None:
        owner = self._models.owner
        parameters = [parameter for parameter in inputs if id(parameter) in owner]
        site = find_call_site() if parameters else NOWHERE
        for parameter in parameters:
            owner[id(parameter)].take(parameter, site)
