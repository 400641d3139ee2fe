"""Modes for torch functions that the watch enters at one moment and leaves at another."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode

from ddpcall import torch_internals as internals


def put_in(mode: TorchFunctionMode) -> None:
    """Put a mode below all that a script has entered, so that it leaves its own; a default device stays lowest.

    Source: `DeviceContext.__enter__` in torch/utils/_device.py does the same.
    """
    pop, push = internals.POP_FUNCTION_MODE.get(), internals.PUSH_FUNCTION_MODE.get()
    modes = [pop() for _ in range(internals.NUM_FUNCTION_MODES.get()())]
    lowest = [modes.pop()] if modes and isinstance(modes[-1], internals.DEVICE_CONTEXT.get()) else []
    for each in (*lowest, mode, *reversed(modes)):
        push(each)


def take_out(mode: TorchFunctionMode) -> None:
    """Take a mode out again, wherever it is by now."""
    pop, push = internals.POP_FUNCTION_MODE.get(), internals.PUSH_FUNCTION_MODE.get()
    modes = [pop() for _ in range(internals.NUM_FUNCTION_MODES.get()())]
    for each in reversed(modes):
        if each is not mode:
            push(each)
