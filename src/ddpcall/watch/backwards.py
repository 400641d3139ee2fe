"""Backwards: prepare the ledgers for each, and see gradients that `torch.autograd.grad` hands out."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ddpcall.taps import Undo, find_call_site, in_backward, replace_attribute
from ddpcall.watch.events import EventKind, Guard
from ddpcall.watch.models import Models
from ddpcall.watch.reducer_ledger import Unreduced, address_of


class BackwardWatch:
    """Stands around every backward that Python starts.

    Source: `_engine_run_backward` in torch/autograd/graph.py; torch/autograd/__init__.py imports it by name.

    Blind to: `backward()` inside a TorchScript function, which starts the engine from C++.
    """

    def __init__(self, models: Models, guard: Guard) -> None:
        """Take the books."""
        self._models = models
        self._guard = guard

    def attach(self) -> Undo:
        """Watch from now on; returns the undo."""
        with ExitStack() as stack:
            stack.callback(self._patch_backward())
            stack.callback(self._patch_grad())
            return stack.pop_all().close

    def _patch_backward(self) -> Undo:
        run = torch.autograd.graph._engine_run_backward

        @functools.wraps(run)
        def _engine_run_backward(*args: Any, **kwargs: Any) -> Any:
            if in_backward():
                return run(*args, **kwargs)
            accumulates = kwargs.get("accumulate_grad", True)
            for ledger in self._models.ledgers:
                self._guard(ledger.begin_backward if accumulates else ledger.begin_taking)
            try:
                return run(*args, **kwargs)
            finally:
                for ledger in self._models.ledgers:
                    self._guard(ledger.end_backward if accumulates else ledger.end_taking)

        with ExitStack() as stack:
            for owner in (torch.autograd.graph, torch.autograd):
                stack.callback(replace_attribute(owner, "_engine_run_backward", _engine_run_backward))
            return stack.pop_all().close

    def _patch_grad(self) -> Undo:
        grad = torch.autograd.grad

        @functools.wraps(grad)
        def taking(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            taken = grad(outputs, inputs, *args, **kwargs)
            if not torch.compiler.is_compiling() and self._models.ledgers:
                self._guard(self._gradients_taken, [inputs] if isinstance(inputs, Tensor) else inputs)
            return taken

        return replace_attribute(torch.autograd, "grad", taking)

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
