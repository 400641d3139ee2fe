"""Passes over data loaders: which indices their samplers gave, and whether the model was trained meanwhile."""

from __future__ import annotations

import functools
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FrameType, ModuleType
from typing import Any, Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ddpcall import torch_internals as internals
from ddpcall.taps import (
    NOWHERE,
    CallSite,
    Undo,
    find_call_frames,
    find_call_site,
    hear_calls,
    replace_attribute,
    site_of,
    undo_all,
)
from ddpcall.watch.run import Run

MAX_KEPT = 2**16
"""Indices of a pass that are kept: half a megabyte."""
_MAX_NAMES = 2000
_MAX_DEPTH = 6


@dataclass(frozen=True)
class Share:
    """What a sampler was told that gives each rank a share of the data.

    Attributes:
        sampler: torch's `DistributedSampler`, or accelerate's `BatchSamplerShard`.
        of: Its name.
        num_samples: Samples that are shared out.
        num_replicas: Into how many shares; where one sampler divides another's share, their product.
        rank: Which of them this is.
        order: Seed and epoch of the permutation; None where nothing is shuffled, or it is not known.
        num_given: Indices in this share; None where that is not known before they are drawn.
        num_spare: Samples that are given twice so that all shares are of one size, at most.
        made, told: The line that made the DistributedSampler, and the one that last told it an epoch.
    """

    sampler: weakref.ref[Any]
    of: str
    num_samples: int
    num_replicas: int
    rank: int
    order: tuple[int, int] | None = None
    num_given: int | None = None
    num_spare: int = 0
    made: CallSite = NOWHERE
    told: CallSite = NOWHERE


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
        times_told: How often it was told one.
        share: What makes it this rank's share of the data; None where nothing known does.
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
    times_told: int = 0
    share: Share | None = None
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


@runtime_checkable
class PassListener(Protocol):
    """Hears of passes: a rule that has these is told."""

    def taken(self, current: Pass) -> None:
        """A batch was taken."""
        ...

    def ended(self, current: Pass) -> None:
        """The loader had no more to give."""
        ...


class LoaderSensor:
    """Follows the passes over every `DataLoader`. What a sampler gives is handed on as it is.

    Samplers run in the main process, ahead of the batches where there are workers: indices are noted as they are
    drawn, steps as batches are taken.

    Blind to: loaders that are not torch's (torchdata's StatefulDataLoader); samplers that are iterated by hand.

    Source: `_BaseDataLoaderIter` in torch/utils/data/dataloader.py.
    """

    def __init__(
        self, run: Run, listeners: Sequence[PassListener], taking: Callable[[], None] = lambda: None
    ) -> None:
        self._run = run
        self._listeners = listeners
        self._taking = taking
        self._made: weakref.WeakKeyDictionary[Any, CallSite] = weakref.WeakKeyDictionary()
        self._told: weakref.WeakKeyDictionary[Any, tuple[int, CallSite]] = weakref.WeakKeyDictionary()
        self._passes: weakref.WeakKeyDictionary[Any, tuple[Any, Pass | None]] = weakref.WeakKeyDictionary()
        self._drawn: list[tuple[weakref.ref[Any], Any]] = []
        self._clock = 0

    def attach(self) -> Undo:
        """Follow from now on; returns the undo."""
        internals.require(internals.NEXT_INDEX, internals.SAMPLER_ITERATOR, internals.INDEX_SAMPLER)
        iterator_class = internals.LOADER_ITERATOR.get()
        take, contain = iterator_class.__next__, self._run.contain

        @functools.wraps(take)
        def taking(iterator: Any) -> Any:
            self._taking()
            try:
                batch = take(iterator)
            except StopIteration:
                contain(self._end, iterator)
                raise
            contain(self._take, iterator)
            return batch

        heard = (
            # Noted with the batch: to leave dynamo costs a microsecond.
            (
                iterator_class,
                internals.NEXT_INDEX.name,
                lambda given, it: self._drawn.append((weakref.ref(it), given)),
            ),
            (DistributedSampler, "__init__", partial(contain, self._note_made)),
            (DistributedSampler, "set_epoch", partial(contain, self._note_told)),
        )
        heard_calls = (hear_calls(owner, name, after=note) for owner, name, note in heard)
        return undo_all((replace_attribute(iterator_class, "__next__", taking), *heard_calls))

    def _note_made(self, _: None, sampler: Any, *args: Any, **kwargs: Any) -> None:
        self._made[sampler] = find_call_site()

    def _note_told(self, _: None, sampler: Any, *args: Any, **kwargs: Any) -> None:
        times, _site = self._told.get(sampler, (0, NOWHERE))
        self._told[sampler] = (times + 1, find_call_site())

    def _draw(self, iterator: Any, given: Any) -> None:
        drawn_from = internals.SAMPLER_ITERATOR.of(iterator)  # another one in every pass of persistent workers
        known, current = self._passes.get(iterator, (None, None))
        if known is not drawn_from:
            current = None if given is None else self._begin(iterator)  # an IterableDataset has no indices
            self._passes[iterator] = (drawn_from, current)
        if current is not None:
            current.draw(given)

    def _note_drawn(self) -> None:
        drawn, self._drawn = self._drawn, []
        for reference, given in drawn:
            iterator = reference()
            if iterator is not None:
                self._draw(iterator, given)

    def _take(self, iterator: Any) -> None:
        self._note_drawn()
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
        for listener in self._listeners:
            listener.taken(current)

    def _end(self, iterator: Any) -> None:
        self._note_drawn()
        current = self._passes.get(iterator, (None, None))[1]
        if current is not None and not current.is_over:
            self._note_steps(current)
            current.is_over = True
            for listener in self._listeners:
                listener.ended(current)

    def _note_steps(self, current: Pass) -> None:
        """Count the steps since this pass's last batch: an evaluation has none."""
        self._clock += 1
        current.last = self._clock
        if current.num_taken:
            current.num_steps = self._run.steps.preparing() - current.first_step
            current.optimizer = self._run.steps.latest

    def _begin(self, iterator: Any) -> Pass | None:
        samplers = _find_samplers(iterator)
        source = _reference(internals.LOADER_DATASET.of(iterator)) or _reference(samplers[-1])
        if source is None:
            return None
        told = [sampler for sampler in samplers if hasattr(sampler, "set_epoch")]
        epochs = [epoch for sampler in told if isinstance(epoch := getattr(sampler, "epoch", None), int)]
        return Pass(
            source,
            type(samplers[-1]).__name__,
            _shuffles(samplers, told),
            bool(told),
            epochs[-1] if epochs else None,
            sum(
                self._told[each][0] for each in told if isinstance(each, DistributedSampler) and each in self._told
            ),
            self._find_share(samplers),
        )

    def _find_share(self, samplers: list[Any]) -> Share | None:
        """Return the share that the samplers give: torch's own division, or accelerate's of what is inside it."""
        inner = samplers[-1]
        if isinstance(inner, WeightedRandomSampler) or getattr(inner, "replacement", False):
            return None
        kinds = {f"{type(sampler).__module__}.{type(sampler).__name__}": sampler for sampler in samplers}
        shard = kinds.get("accelerate.data_loader.BatchSamplerShard")
        if shard is not None:
            within = inner.num_replicas if isinstance(inner, DistributedSampler) else 1
            count, num = shard.num_processes, len(inner) * within
            spare = count * (shard.batch_size or 1) * shard.even_batches
            made = self._made.get(inner, NOWHERE)
            return Share(
                weakref.ref(shard),
                "BatchSamplerShard",
                num,
                count * within,
                shard.process_index,
                num_spare=spare,
                made=made,
            )
        if type(inner).__iter__ is not DistributedSampler.__iter__:
            return None
        num = len(inner.dataset)
        return Share(
            weakref.ref(inner),
            "DistributedSampler",
            num,
            inner.num_replicas,
            inner.rank,
            (inner.seed, inner.epoch) if inner.shuffle else None,
            inner.num_samples,
            max(0, inner.total_size - num),
            self._made.get(inner, NOWHERE),
            self._told.get(inner, (0, NOWHERE))[1],
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
        # Of a module, some values warn when they are looked at.
        is_left_out = issubclass(type(value), type | DataLoader | ModuleType)
        inside = held.items() if isinstance(held, dict) and not is_left_out else ()
        for spelling, candidate in ((name, value), *((f"{name}.{key}", each) for key, each in inside)):
            if candidate is told:
                return spelling
            if issubclass(type(candidate), DataLoader):
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
