"""Backwards: prepare the ledgers for each, and see gradients that `torch.autograd.grad` hands out."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch

from ddpcall import torch_internals as internals
from ddpcall.taps import Undo, find_call_site, in_backward, replace_attribute
from ddpcall.watch.events import EventKind, Guard
from ddpcall.watch.models import Models
from ddpcall.watch.sensors.gradients import GradientSensor
from ddpcall.watch.sensors.reducer_state import Unreduced, address_of

_INPUTS = 4  # the place of the inputs among the engine's arguments


class BackwardWatch:
    """Stands around every backward that Python starts, `torch.autograd.grad`'s included.

    Source: `_engine_run_backward` in torch/autograd/graph.py; torch/autograd/__init__.py imports it by name.

    Blind to: `backward()` inside a TorchScript function, which starts the engine from C++.
    """

    def __init__(self, models: Models, gradients: GradientSensor, guard: Guard) -> None:
        """Take the books, and what measures gradients."""
        self._models = models
        self._gradients = gradients
        self._guard = guard

    def attach(self) -> Undo:
        """Watch from now on; returns the undo."""
        run = internals.ENGINE_RUN_BACKWARD.get()

        @functools.wraps(run)
        def _engine_run_backward(*args: Any, **kwargs: Any) -> Any:
            accumulates = kwargs.get("accumulate_grad", True)
            self._guard(self._begin, accumulates)
            try:
                taken = run(*args, **kwargs)
            finally:
                self._guard(self._end, accumulates)
            if not accumulates:
                self._guard(self._gradients_taken, args[_INPUTS])
            return taken

        patched = internals.disable_dynamo(_engine_run_backward, recursive=False)
        with ExitStack() as stack:
            for owner in (torch.autograd.graph, torch.autograd):
                stack.callback(replace_attribute(owner, internals.ENGINE_RUN_BACKWARD.name, patched))
            return stack.pop_all().close

    def _begin(self, accumulates: bool) -> None:
        if not in_backward():  # else a checkpoint's, inside another
            self._gradients.prepare()
            for ledger in self._models.ledgers:
                ledger.begin_backward() if accumulates else ledger.begin_taking()

    def _end(self, accumulates: bool) -> None:
        if not in_backward():
            for ledger in self._models.ledgers:
                ledger.end_backward() if accumulates else ledger.end_taking()

    def _gradients_taken(self, inputs: Iterable[Any]) -> None:
        parameters = [parameter for parameter in inputs if id(parameter) in self._models.owner]
        if not parameters:
            return
        site = find_call_site()
        for parameter in parameters:
            ledger = self._models.owner[id(parameter)]
            blame = Unreduced(EventKind.AUTOGRAD_GRAD, site, gradient=address_of(parameter.grad))
            if id(parameter) not in ledger.dirty:
                ledger.dirty[id(parameter)] = blame
