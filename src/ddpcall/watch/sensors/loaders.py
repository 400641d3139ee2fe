"""Passes over data loaders: which indices their samplers gave, and whether the model was trained meanwhile."""

from __future__ import annotations

import functools
import weakref
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from ddpcall import torch_internals as internals
from ddpcall.taps import NOWHERE, CallSite, Undo, find_call_frames, replace_attribute, site_of
from ddpcall.watch.run import Run

MAX_KEPT = 2**16
"""Indices of a pass that are kept: half a megabyte."""
_MAX_NAMES = 2000
_MAX_DEPTH = 6


@dataclass(eq=False)
class Pass:
    """One pass over a loader: an epoch, or a part of one.

    Attributes:
        source: Two passes with the same one are of the same data: the dataset; the sampler where the dataset is a
            plain list.
        sampler: The innermost sampler's class.
        shuffles: Whether the sampler is known to shuffle.
        is_told_epochs: Whether it has a `set_epoch`.
        epoch: The epoch that it was told, None where it knows of none.
        indices: The first `MAX_KEPT` that the sampler gave.
        num_drawn: How many it gave.
        is_readable: Whether the indices are whole numbers.
        site: The line that took the first batch.
        spelling: The sampler, or a loader that passes `set_epoch` on, as that line can call it.
        begun, last: When the first and the last batch was taken, by a clock that counts batches of all loaders.
        first_step: The optimizer step, from 1, that the first batch was taken for.
        num_steps: Optimizer steps between batches of this pass.
        optimizer: The last one that stepped.
        num_taken: Batches that were taken.
        is_over: Whether the loader had no more to give.
    """

    source: weakref.ref[Any]
    sampler: str
    shuffles: bool
    is_told_epochs: bool
    epoch: int | None
    indices: array[int] = field(default_factory=lambda: array("q"))
    num_drawn: int = 0
    is_readable: bool = True
    site: CallSite = NOWHERE
    spelling: str = ""
    begun: int = 0
    last: int = 0
    first_step: int = 0
    num_steps: int = 0
    optimizer: weakref.ref[Optimizer] | None = None
    num_taken: int = 0
    is_over: bool = False

    @property
    def is_training(self) -> bool:
        """Whether an optimizer stepped between two batches."""
        return self.num_steps > 0

    def draw(self, given: Any) -> None:
        """Note what the sampler gave for one batch: a list of indices, or one."""
        batch = given if isinstance(given, list | tuple) else (given,)
        self.num_drawn += len(batch)
        if self.is_readable and len(self.indices) < MAX_KEPT:
            try:
                self.indices.extend(batch)
            except TypeError:  # keys, or indices with something beside them
                self.is_readable = False


class LoaderSensor:
    """Follows the passes over every `DataLoader`. What a sampler gives is handed on as it is.

    Samplers run in the main process, ahead of the batches where there are workers: indices are noted as they are
    drawn, steps as batches are taken.

    Blind to: loaders that are not torch's (torchdata's StatefulDataLoader); samplers that are iterated by hand.

    Source: `_BaseDataLoaderIter` in torch/utils/data/dataloader.py.
    """

    def __init__(self, run: Run, ended: Callable[[Pass], None], taken: Callable[[Pass], None]) -> None:
        """Take the run, and what hears of a pass that ended and of one of which a batch was taken."""
        self._run = run
        self._ended = ended
        self._taken = taken
        self._passes: weakref.WeakKeyDictionary[Any, tuple[Any, Pass | None]] = weakref.WeakKeyDictionary()
        self._clock = 0

    def attach(self) -> Undo:
        """Follow from now on; returns the undo."""
        internals.require(internals.NEXT_INDEX, internals.SAMPLER_ITERATOR, internals.INDEX_SAMPLER)
        iterator_class = internals.LOADER_ITERATOR.get()
        next_index, take = internals.NEXT_INDEX.get(), iterator_class.__next__

        @functools.wraps(next_index)
        def drawing(iterator: Any) -> Any:
            given = next_index(iterator)
            self._run.contain(self._draw, iterator, given)
            return given

        @functools.wraps(take)
        def taking(iterator: Any) -> Any:
            try:
                batch = take(iterator)
            except StopIteration:
                self._run.contain(self._end, iterator)
                raise
            self._run.contain(self._take, iterator)
            return batch

        with ExitStack() as stack:
            stack.callback(replace_attribute(iterator_class, next_index.__name__, drawing))
            stack.callback(replace_attribute(iterator_class, "__next__", taking))
            return stack.pop_all().close

    def _draw(self, iterator: Any, given: Any) -> None:
        drawn_from = internals.SAMPLER_ITERATOR.of(iterator)  # another one in every pass of persistent workers
        known, current = self._passes.get(iterator, (None, None))
        if known is not drawn_from:
            current = None if given is None else _begin(iterator)  # an IterableDataset has no indices
            self._passes[iterator] = (drawn_from, current)
        if current is not None:
            current.draw(given)

    def _take(self, iterator: Any) -> None:
        current = self._passes.get(iterator, (None, None))[1]
        if current is None:
            return
        self._note_steps(current)
        current.num_taken += 1
        if current.num_taken == 1:
            frame, caller = find_call_frames()
            current.site = site_of(frame, caller)
            current.spelling = "" if frame is None else _spell(frame, _find_samplers(iterator))
            current.begun = self._clock
            current.first_step = self._run.steps.preparing()
        self._taken(current)

    def _end(self, iterator: Any) -> None:
        current = self._passes.get(iterator, (None, None))[1]
        if current is not None and not current.is_over:
            self._note_steps(current)
            current.is_over = True
            self._ended(current)

    def _note_steps(self, current: Pass) -> None:
        """Count the steps since this pass's last batch: an evaluation has none."""
        self._clock += 1
        current.last = self._clock
        if current.num_taken:
            current.num_steps = self._run.steps.preparing() - current.first_step
            current.optimizer = self._run.steps.latest


def _begin(iterator: Any) -> Pass | None:
    samplers = _find_samplers(iterator)
    source = _reference(internals.LOADER_DATASET.of(iterator)) or _reference(samplers[-1])
    if source is None:
        return None
    told = [sampler for sampler in samplers if hasattr(sampler, "set_epoch")]
    epochs = [epoch for sampler in told if isinstance(epoch := getattr(sampler, "epoch", None), int)]
    return Pass(
        source, type(samplers[-1]).__name__, _shuffles(samplers, told), bool(told), epochs[-1] if epochs else None
    )


def _shuffles(samplers: list[Any], told: list[Any]) -> bool:
    if told:
        return all(getattr(sampler, "shuffle", True) for sampler in told)
    is_random = isinstance(samplers[-1], RandomSampler | SubsetRandomSampler | WeightedRandomSampler)
    return is_random or any(getattr(sampler, "shuffle", False) is True for sampler in samplers)


def _reference(value: Any) -> weakref.ref[Any] | None:
    try:
        return weakref.ref(value)
    except TypeError:
        return None


def _find_samplers(iterator: Any) -> list[Any]:
    """Return an iterator's samplers, the outermost first."""
    samplers = [internals.INDEX_SAMPLER.of(iterator)]
    while len(samplers) < _MAX_DEPTH:
        inner = getattr(samplers[-1], "batch_sampler", None) or getattr(samplers[-1], "sampler", None)
        if not hasattr(inner, "__iter__"):
            break
        samplers.append(inner)
    return samplers


def _spell(frame: FrameType, samplers: list[Any]) -> str:
    """Return how a line can call the sampler that is told the epoch; empty where no name in scope leads there."""
    told = next((sampler for sampler in reversed(samplers) if hasattr(sampler, "set_epoch")), None)
    if told is None:
        return ""
    found: list[str] = []
    names = [*list(frame.f_locals.items())[:_MAX_NAMES], *list(frame.f_globals.items())[:_MAX_NAMES]]
    for name, value in names:
        held = getattr(value, "__dict__", None)
        inside = held.items() if isinstance(held, dict) and not isinstance(value, type | DataLoader) else ()
        for spelling, candidate in ((name, value), *((f"{name}.{key}", each) for key, each in inside)):
            if candidate is told:
                return spelling
            if isinstance(candidate, DataLoader):
                found += _spell_inside(spelling, candidate, told, samplers[0])
    return found[0] if found else ""


def _spell_inside(spelling: str, loader: Any, told: Any, outermost: Any) -> Iterator[str]:
    if loader.batch_sampler is outermost or loader.sampler is outermost:
        if hasattr(loader, "set_epoch"):
            yield spelling
        elif loader.sampler is told:
            yield f"{spelling}.sampler"
        elif loader.batch_sampler is told:
            yield f"{spelling}.batch_sampler"
