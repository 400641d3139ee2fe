"""Find the line that uses a model's weights directly, without any module's forward."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ddpcall import torch_internals as internals
from ddpcall.taps import CallSite, find_call_site, in_backward
from ddpcall.watch.sensors.reducer_state import ReducerState

_READS = frozenset({"__get__", "__set__", "backward", "zero_", "detach", "numel", "size", "dim", "requires_grad_"})


def has_compiled() -> bool:
    """Say whether dynamo has compiled anything in this process.

    It would trace a mode for torch functions too: other frames, and an error where graphs must not break.
    """
    return (internals.FRAME_COUNTER.if_imported() or 0) > 0


class WeightLocator(TorchFunctionMode):
    """Notes the first differentiable torch function that gets one of the wanted parameters outside the wrapper.

    Attributes:
        site: The line that called it, None while there was none.

    It is slow and is only put on for one step, after gradients were seen to arrive without any forward.
    """

    def __init__(self, keys: list[int], state: ReducerState) -> None:
        """Take the wanted parameters, by id, and the reducer state they belong to."""
        super().__init__()
        self._keys = frozenset(keys)
        self._state = state
        self.site: CallSite | None = None

    def start(self) -> None:
        """Look from now on."""
        self.__enter__()

    def stop(self) -> None:
        """Stop looking."""
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and note it."""
        outputs = func(*args, **(kwargs or {}))
        if self.site is None and self._is_use(func, args, kwargs or {}, outputs):
            self.site = find_call_site(self._state.contains)
        return outputs

    def _is_use(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> bool:
        if internals.is_ddp_running() or in_backward():
            return False
        if getattr(func, "__name__", "") in _READS:
            return False
        differentiable = isinstance(outputs, torch.Tensor) and outputs.grad_fn is not None
        return differentiable and any(id(value) in self._keys for value in (*args, *kwargs.values()))
