"""Checkpoints as they are written: what a file is given, not what `state_dict()` was called for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ddpcall.taps import Undo, find_tensors, hear_calls, undo_all
from ddpcall.watch.run import Run

SAVERS = {
    "torch": ("save",),
    "torch.serialization": ("save",),
    "torch.distributed.checkpoint": ("save", "async_save", "save_state_dict"),
    "safetensors.torch": ("save", "save_file", "save_model"),
}
_DEPTH = 6


class SaveWatch:
    """Tells of every wrapped model whose buffers are written to a checkpoint.

    Blind to: buffers that were copied first (`.cpu()` from another device, a deep copy), as an EMA's are; other
    libraries' writers that do not go through these.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def attach(self, module: ModuleType) -> Undo:
        """Hear of what one of the modules of `SAVERS` writes; returns the undo."""
        names = [name for name in SAVERS[module.__name__] if hasattr(module, name)]
        return undo_all(hear_calls(module, name, before=partial(self._run.contain, self._look)) for name in names)

    def _look(self, *args: Any, **kwargs: Any) -> None:
        content = next(iter((*args, *kwargs.values())), None)
        wrappers = [ddp for state in self._run.models.reducer_states if (ddp := state.ddp()) is not None]
        buffers = {id(ddp): {b.data_ptr() for b in ddp.modules_buffers} for ddp in wrappers}
        if any(buffers.values()):
            written = {tensor.data_ptr() for tensor in _tensors_in(content)}
            for ddp in wrappers:
                if buffers[id(ddp)] & written:
                    self._run.sites.use_buffers(ddp, "saved")


def _tensors_in(content: Any) -> Iterator[Tensor]:
    for part in content.values() if isinstance(content, Mapping) else (content,):
        yield from part.buffers() if isinstance(part, nn.Module) else find_tensors(part, _DEPTH)
