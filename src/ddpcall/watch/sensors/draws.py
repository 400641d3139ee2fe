"""Random numbers that the script draws from torch's default generators, for one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpcall import torch_internals as internals
from ddpcall.replicas import is_unreadable
from ddpcall.taps import CallSite, Undo, find_call_site, find_tensors, hear_calls, undo_all
from ddpcall.watch.run import Run

# A permutation of one's own data does no harm where it is the same on all ranks: torch.randperm is left out.
_FUNCTIONS = (
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like"),
    *("normal", "bernoulli", "multinomial", "poisson"),
)
_METHODS = ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_", "geometric_")
_MOST = 256


@dataclass(frozen=True)
class Draw:
    """One call that drew random numbers.

    Attributes:
        site: The line.
        shape: What it gave.
        device: The device's type, which has a generator of its own.
        address: Of the storage that they were put in.
    """

    site: CallSite
    shape: tuple[int, ...]
    device: str
    address: int


class DrawSensor:
    """Stands around torch's random functions while it is `open`, and hears of draws from when a batch is taken.

    Blind to: draws in compiled code, after `torch.jit.script` was called in the step, in other threads, by
    Python's and numpy's generators; `torch.randperm`; functions that were imported by name before it opened.
    """

    def __init__(self, run: Run) -> None:
        """Take the run; what is sent to other ranks is no draw of this rank's own."""
        self._run = run
        self._undo: Undo | None = None
        self._draws: list[Draw] = []
        self._has_batch = False
        run.collectives.listeners.append(self._forget_sent)
        run.keep(self._close)

    @property
    def is_open(self) -> bool:
        """Whether draws are heard of now."""
        return self._undo is not None

    def open(self) -> None:
        """Hear of draws from the next batch on."""
        self._undo = undo_all(self._hear())

    def _hear(self) -> Iterator[Undo]:
        for owner, names in ((torch, _FUNCTIONS), (Tensor, _METHODS)):
            for name in names:
                yield hear_calls(owner, name, after=self._drawn)
        script = internals.SCRIPT_IMPL
        if script.get(None) is not None:
            # `torch.jit.script` knows torch's functions by identity: give them back before it looks them up.
            yield hear_calls(script.owner(), script.name, before=lambda *_, **__: self._close())

    def close(self) -> list[Draw]:
        """Return what was drawn since the first batch that was taken; torch is left as it was."""
        self._close()
        draws, self._draws, self._has_batch = self._draws, [], False
        return draws

    def _close(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def taking(self) -> None:
        """A batch is about to be taken: what was drawn before the first of a step is not for it."""
        self._has_batch = self.is_open

    def _drawn(self, drawn: Any, *args: Any, **kwargs: Any) -> None:
        if self._has_batch and kwargs.get("generator") is None:
            self._run.contain(self._note, drawn)

    def _note(self, drawn: Any) -> None:
        in_transform = internals.FUNCTORCH_LEVEL.get(lambda: None)() is not None
        if type(drawn) is Tensor and not in_transform and len(self._draws) < _MOST and not is_unreadable(drawn):
            address = drawn.untyped_storage().data_ptr()
            self._draws.append(Draw(find_call_site(), tuple(drawn.shape), drawn.device.type, address))

    def _forget_sent(self, name: str, args: tuple[Any, ...]) -> None:
        if self._draws:
            sent = {tensor.untyped_storage().data_ptr() for value in args for tensor in find_tensors(value, 3)}
            self._draws = [draw for draw in self._draws if draw.address not in sent]
