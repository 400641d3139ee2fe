"""Sharded models: did a bypass cause the "mixed torch.Tensor and DTensor" crash?"""

from __future__ import annotations

import weakref
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from ddpcall.taps import came_through_call, find_call_site_among
from ddpcall.watch.events import Event, EventKind

_MIXED = "mixed torch.Tensor and DTensor"
_SHARDING = ("torch.distributed.fsdp", "torch.distributed._composable", "torch.distributed.tensor")


class ShardedWatch:
    """Remembers modules that fully_shard and parallelize_module hook, and looks at a crash afterwards.

    Blind to: crashes that the script catches; FSDP1.
    """

    def __init__(self) -> None:
        """Start with no sharded module."""
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def hook_registered(self, module: nn.Module, kind: str, hook: Any) -> None:
        """Remember a module that torch's sharding puts a pre-forward hook on."""
        owner = getattr(hook, "__module__", None) or ""
        if kind == "forward_pre" and owner.startswith(_SHARDING):
            self._hooked.add(module)

    def explain(self, error: BaseException, step: int) -> Event | None:
        """Return the event that caused a crash, None where no bypass did.

        The crash is a bypass's when the module that met a shard lies below a sharded module whose `__call__`, and
        with it the hook that gathers the parameters, is not on the stack.
        """
        if _MIXED not in str(error) or not self._hooked:
            return None
        frames = _frames_of(error.__traceback__)
        modules = [self_ for frame in frames if isinstance(self_ := frame.f_locals.get("self"), nn.Module)]
        gatherer = self._gatherer(modules[-1]) if modules else self._anyone()
        if gatherer is None or any(_gathers(frame, gatherer) for frame in frames):
            return None
        below = {id(module) for module in gatherer.modules()}
        site = find_call_site_among(frames[::-1], lambda candidate: id(candidate) in below)
        message = str(error).splitlines()[0]
        facts = {"module": type(gatherer).__name__, "error": message[:200]}
        return Event(EventKind.SHARDED_BYPASSED, site, step, (), (), facts)

    def _gatherer(self, module: nn.Module) -> nn.Module | None:
        """Return the nearest sharded module that holds another: the one with the fewest modules below."""
        holders = [hooked for hooked in self._hooked if any(child is module for child in hooked.modules())]
        return min(holders, key=lambda holder: sum(1 for _ in holder.modules()), default=None)

    def _anyone(self) -> nn.Module | None:
        return next(iter(self._hooked), None)


def _frames_of(trace: TracebackType | None) -> list[FrameType]:
    """Return the frames of a traceback, outermost first."""
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames


def _gathers(frame: FrameType, gatherer: nn.Module) -> bool:
    if "torch/distributed/fsdp" in frame.f_code.co_filename:  # register_fsdp_forward_method's wrapper
        return True
    return came_through_call(frame) and frame.f_locals.get("self") is gatherer
