"""Parameters that no reducer owns any more, or ever did: re-stored, unfrozen, added or replaced after wrapping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ddpcall import torch_internals as internals
from ddpcall.taps import Undo, find_call_site, hear_calls, remove_handles, replace_attribute, undo_all
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.reducer_state import ReducerState


class ParameterWatch:
    """Patches what converts, unfreezes and registers parameters: calls that are rare in a training step."""

    def __init__(self, run: Run, tap: Callable[[Iterable[nn.Module], ReducerState], None]) -> None:
        self._models = run.models
        self._contain = run.contain
        self._tap = tap
        self._applying = 0

    def attach(self) -> Undo:
        """Watch from now on; returns the undo."""
        return undo_all(
            patch() for patch in (self._patch_conversion, self._patch_unfreezing, self._hook_registrations)
        )

    def _patch_conversion(self) -> Undo:
        apply = internals.APPLY.get()

        @functools.wraps(apply)
        def _apply(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
            if self._applying:
                return apply(module, *args, **kwargs)
            touched = [state for state in self._models.reducer_states if self._touches(module, state)]
            before = [(state, _accumulators(state.parameters())) for state in touched]
            self._applying += 1
            try:
                return apply(module, *args, **kwargs)
            finally:
                self._applying -= 1
                for state, nodes in before:
                    self._contain(self._compare_accumulators, state, nodes)

        return replace_attribute(nn.Module, internals.APPLY.name, _apply)

    def _touches(self, module: nn.Module, state: ReducerState) -> bool:
        return state.contains(module) or any(child is state.ddp() for child in module.modules())

    def _compare_accumulators(self, state: ReducerState, before: list[Any]) -> None:
        """A conversion that changes dtype or device makes a new AccumulateGrad; the reducer hangs on the old one.

        Source: `VariableHooks::set_data` in torch/csrc/autograd/variable.cpp.
        """
        parameters = state.parameters()
        if len(parameters) != len(before):
            return
        for parameter, old in zip(parameters, before, strict=True):
            if old is not None and _accumulators([parameter])[0] is not old:
                state.detach(parameter, find_call_site())

    def _patch_unfreezing(self) -> Undo:
        slot = internals.TENSOR_REQUIRES_GRAD.get()

        def set_requires_grad(parameter: Tensor, value: bool) -> None:
            slot.__set__(parameter, value)
            note(parameter, value)

        def note(parameter: Tensor, requires_grad: bool = True) -> None:
            if requires_grad and self._models.is_frozen(parameter):
                self._models.note_origin(parameter)

        changed = property(slot.__get__, set_requires_grad)
        patches = (
            lambda: replace_attribute(nn.Parameter, "requires_grad", changed),
            lambda: hear_calls(nn.Parameter, "requires_grad_", before=note),
        )
        return undo_all(patch() for patch in patches)

    def _hook_registrations(self) -> Undo:
        """See modules and parameters that are put into a wrapped model."""

        def registered_module(parent: nn.Module, name: str, child: nn.Module | None) -> None:
            state = next(iter(self._models.states_with(parent)), self._models.state_of(parent))
            if state is None or child is None:
                return
            self._tap(child.modules(), state)
            for parameter in child.parameters():
                if id(parameter) not in state.names:
                    self._models.note_origin(parameter)

        def registered_parameter(parent: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            state = next(iter(self._models.states_with(parent)), None)
            if state is not None and parameter is not None and id(parameter) not in state.names:
                self._models.note_origin(parameter)

        return remove_handles(
            module_hooks.register_module_module_registration_hook(registered_module),
            module_hooks.register_module_parameter_registration_hook(registered_parameter),
        )


def _accumulators(parameters: Iterable[Tensor]) -> list[Any]:
    get_edge = torch.autograd.graph.get_gradient_edge
    return [get_edge(parameter).node if parameter.requires_grad else None for parameter in parameters]
