"""The collector: hears of a rank's own gradients and of what its optimizers use, and keeps sketches of both.

It runs no collective and changes no number. Where something goes wrong in it, it switches itself off, says why in
its record, and the training goes on.

* *Own*: a tensor hook on the parameter, which runs before the gradient is accumulated and before any reduction.
* *Used*: what lies in `.grad` when the innermost optimizer step that holds the parameter begins, after all other
  pre-hooks; with a closure, when the closure returns.
* *Window*: what belongs to one step of one parameter, from the step before it to its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ddpcall import torch_internals as internals
from ddpcall.mixing.places import SHARDED, Place, ranks_along
from ddpcall.mixing.record import FOREIGN, NO_GRADIENT, NOT_FINITE, PRESENT, UNREAD, Column, RankSketches
from ddpcall.mixing.result import name_some
from ddpcall.mixing.shapes import find_eta, fit
from ddpcall.mixing.shards import find_places
from ddpcall.replicas import digest_tensor
from ddpcall.sketch import NUM_BUCKETS, SketchQueue
from ddpcall.taps import Undo, outside_dynamo, replace_attribute

_KEPT_WINDOWS = 3


@dataclass
class _Own:
    """One own gradient: sketches, and the backward that made it."""

    task: int
    last: Tensor | None = None
    first: Tensor | None = None
    captured: bool = False


@dataclass
class _Window:
    """What happened to one parameter between two of its steps."""

    own: list[_Own] = field(default_factory=list)
    carry: Tensor | None = None
    unreduced_from: int | None = None  # the first of `own` after the last that a reducer took
    reduced: Tensor | None = None  # what lay in `.grad` then
    used: Tensor | None = None
    digest: int = 0
    state: int = UNREAD
    before: int = 0
    closed: bool = False


@dataclass
class _Watched:
    """One parameter, its place in the model and its last windows."""

    place: Place
    windows: deque[_Window] = field(default_factory=lambda: deque([_Window()], maxlen=_KEPT_WINDOWS))
    num_steps: int = 0
    dtype: str = ""
    reduced_in: str = ""
    own_parts: tuple[int, ...] = ()
    own_sum: tuple[int, ...] = ()
    own_unit: tuple[int, ...] = ()
    used_parts: tuple[int, ...] = ()

    def close_window(self) -> None:
        self.num_steps += 1
        self.windows[-1].closed = True

    def compare(self, used: Tensor) -> Tensor:
        """Return a sketch of what lies in `.grad`, and those of what it may be made of.

        Of backwards that no reducer took: their sum, the last of them, and what lay there before.
        """
        window = self.windows[-1]
        zero = torch.zeros_like(used)
        first, before = window.unreduced_from, window.reduced
        if first is None:
            first, before = 0, window.carry
        own = [each.last if each.first is None else each.first for each in window.own[first:]]
        seen = [each for each in own if each is not None and not window.closed] or [zero]
        before = zero if window.closed or before is None else before
        return torch.stack([used, torch.stack(seen).sum(0), seen[-1], before])

    def open_window(self) -> _Window:
        """Return the current window; a new one if a step has ended the last."""
        if self.windows[-1].closed:
            self.windows.append(_Window())
        return self.windows[-1]


class MixingCollector:
    """Collects a rank's sketches, step after step; may be started again after it was stopped.

    Args:
        places: The parameters to watch, as `ddpcall.mixing.shards.find_places` finds them.
        optimizers: One or several that hold them. Optimizers inside them, and others that step the same
            parameters, are heard too.
        stepped: Is called when a step that stands inside no other has ended, and was read.
        reduces: Says of a parameter whether a reducer will average the gradient that is being computed.

    Blind to: gradients that never pass through autograd's leaves (`torch.func`); optimizers that are no
    `torch.optim.Optimizer`; compiled autograd, under which it stays off.
    """

    def __init__(
        self,
        places: Iterable[Place],
        optimizers: Sequence[Optimizer],
        stepped: Callable[[Optimizer], None] = lambda optimizer: None,
        reduces: Callable[[Tensor], bool] = lambda parameter: False,
    ) -> None:
        # Without these the sketches would say what is not so.
        internals.require(internals.WILL_ENGINE_EXECUTE_NODE, internals.TENSOR_BACKWARD_HOOKS)
        self._optimizers = list(optimizers)
        self._watched = [_Watched(place) for place in places]
        self._model: nn.Module | None = None
        self._held_at_first = self._held()
        self._stepped = stepped
        self._reduces = reduces
        self._sketches = SketchQueue()
        self._by_id: dict[int, list[_Watched]] = {}  # a flat parameter stands for many
        for watched in self._watched:
            watched.place.sketch = self._sketches.add
            self._by_id.setdefault(id(watched.place.stepped), []).append(watched)
        self._undos: list[Undo] = []
        self._reading: dict[int, tuple[Optimizer, Any]] = {}
        self._stepping: list[int] = []
        self._closures: set[int] = set()
        self._read_now: set[int] = set()
        self._num_steps = self._num_skipped = 0
        self._failure = ""
        self._on = False

    @classmethod
    def of_model(cls, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> MixingCollector:
        """Return a collector of the model's parameters, wrapped or inner, as far as the optimizers hold them.

        Raises:
            ValueError: the optimizers hold none of the model's parameters.
        """
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        collector = cls(find_places(model, optimizers), optimizers)
        collector._model = model
        return collector

    # ---- on and off --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Put the hooks on."""
        self._on = True
        try:
            for watched in self._watched:
                see = outside_dynamo(partial(self._guard, self._see_own, watched))
                self._undos.append(watched.place.hook(see))
            before = outside_dynamo(self._before_step)
            after = outside_dynamo(partial(self._guard, self._after_step))
            self._undos += [
                register_optimizer_step_pre_hook(before).remove,
                register_optimizer_step_post_hook(after).remove,
                replace_attribute(torch.amp.GradScaler, "step", self._wrap_scaler_step()),
            ]
        except BaseException:
            self.stop()
            raise

    def forget(self) -> None:
        """Forget what was seen of earlier steps: what comes next does not follow them."""
        for watched in self._watched:
            watched.windows = deque([_Window()], maxlen=_KEPT_WINDOWS)
            watched.num_steps = 0
        self._num_steps = self._num_skipped = 0

    def stop(self) -> None:
        """Take everything off again. May be called twice."""
        self._on = False
        handles = [handle for _, handle in self._reading.values()]
        self._reading.clear()
        for undo in [*[handle.remove for handle in handles], *reversed(self._undos)]:
            undo()
        self._undos.clear()

    def _guard(self, function: Callable[..., None], *args: Any) -> None:
        """Call one of ours from torch: it returns nothing and raises nothing."""
        if self._on:
            try:
                function(*args)
            except Exception as error:
                self._failure = f"{type(error).__name__}: {error}"
                self._on = False

    # ---- own ---------------------------------------------------------------------------------------------------

    def _see_own(self, watched: _Watched, first: bool, gradient: Tensor) -> None:
        """Sketch a gradient at once: what a tensor holds later may be reduced in place."""
        window = watched.open_window()
        task = internals.graph_task()
        if not window.own:
            window.carry = watched.place.sketch_carry()
            if len(watched.windows) == 1 and (pending := watched.place.sketch_pending()) is not None:
                watched.windows.appendleft(_Window([_Own(-1, pending)], closed=True))
        if not window.own or window.own[-1].task != task:
            if self._reduces(watched.place.stepped):
                window.unreduced_from = window.reduced = None
            elif window.unreduced_from is None:
                window.unreduced_from = len(window.own)
                window.reduced = watched.place.sketch_carry() if window.own else window.carry
            window.own.append(_Own(task, captured=watched.place.is_captured()))
        own, number = window.own[-1], watched.place.sketch_own(gradient)
        if first:
            own.first = number
        elif own.last is None:
            own.last = number
        else:
            self._sketches.flush()
            own.last = own.last + number
        watched.dtype = str(gradient.dtype).removeprefix("torch.")
        watched.own_parts = ranks_along(gradient, SHARDED)
        watched.own_sum = ranks_along(gradient, (*SHARDED, "Partial"))
        watched.own_unit = ranks_along(gradient, None)

    def are_own(self, parameters: Iterable[Tensor]) -> bool | None:
        """Say whether what this rank computed is in its gradients times one factor: nobody has reduced it.

        Of several backwards those count that came after the last which a reducer took: their sum, or the last one.
        What lay there before may be reduced.

        Returns:
            None where the gradients were not seen, or are not finite.
        """
        watched = [each for parameter in parameters for each in self._by_id.get(id(parameter), ())]
        there = [(each, gradient) for each in watched if (gradient := each.place.used_gradient()) is not None]
        if not (self._on and there):
            return None
        used_by = [(each, each.place.sketch_used(gradient)) for each, gradient in there]
        self._sketches.flush()
        rows = [each.compare(sketched) for each, sketched in used_by]
        used, *basis = torch.cat(rows, dim=1).double().cpu().numpy()
        if not np.isfinite(used).all():
            return None
        tolerance = 5 * max(find_eta(each.dtype, 1) for each in watched) * np.linalg.norm(used)
        _, rest = fit(np.stack(basis), used)
        _, without_own = fit(np.stack(basis[-1:]), used)
        return bool(np.linalg.norm(rest) <= tolerance < np.linalg.norm(without_own) or not used.any())

    # ---- used --------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Prepare for a step; a closure is replaced, the one thing that a pre-hook may return."""
        self._guard(self._begin_step, optimizer)
        closures = [value for value in (*args, *kwargs.values()) if callable(value)]
        if not (self._on and closures and any(self._held_by(optimizer))):
            return None
        self._closures.add(id(optimizer))
        watch = partial(self._watch_closure, optimizer)
        return tuple(map(watch, args)), {name: watch(value) for name, value in kwargs.items()}

    def _watch_closure(self, optimizer: Optimizer, closure: Any) -> Any:
        """Return a closure that lets what is used be read when it returns."""
        if not callable(closure):
            return closure

        @wraps(closure)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self._guard(self._read, optimizer)
            return result

        return call

    def _begin_step(self, optimizer: Optimizer) -> None:
        self._closures.discard(id(optimizer))
        if id(optimizer) in self._stepping:  # an earlier step of its raised
            del self._stepping[self._stepping.index(id(optimizer)) :]
        if not any(self._held_by(optimizer)):
            return
        self._stepping.append(id(optimizer))
        # Last of the instance's own hooks, which run after the global ones: somebody may reduce in one of them.
        self._stop_reading(optimizer)
        read = outside_dynamo(partial(self._guard, self._read_before))
        self._reading[id(optimizer)] = (optimizer, optimizer.register_step_pre_hook(read))

    def _stop_reading(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._reading:
            self._reading.pop(id(optimizer))[1].remove()

    def _read_before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._closures:
            self._read(optimizer)

    def _read(self, optimizer: Optimizer) -> None:
        """Sketch what an optimizer is about to use. Of nested steps the last one counts."""
        for watched in self._held_by(optimizer):
            window = watched.open_window()
            gradient = watched.place.used_gradient()
            window.before = watched.place.digest()
            window.used, window.digest, window.state = None, 0, NO_GRADIENT
            if gradient is not None:
                window.used = watched.place.sketch_used(gradient)
                window.digest = digest_tensor(gradient)
                watched.reduced_in = watched.place.reduced_in(gradient)
                window.state = FOREIGN if watched.place.is_foreign else PRESENT
            watched.used_parts = watched.place.used_parts(gradient)
            self._read_now.add(id(watched.place.stepped))
        self._sketches.flush()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._stepping:
            return
        del self._stepping[self._stepping.index(id(optimizer)) :]
        self._stop_reading(optimizer)
        self._closures.discard(id(optimizer))
        if self._stepping:
            return
        for key in self._read_now:
            for watched in self._by_id[key]:
                watched.close_window()
                watched.place.rehook()
        if self._read_now:
            self._num_steps += 1
            self._read_now.clear()
            self._stepped(optimizer)

    def _held_by(self, optimizer: Optimizer) -> Iterator[_Watched]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield from self._by_id.get(id(parameter), ())

    def _wrap_scaler_step(self) -> Callable[..., Any]:
        """Return a `GradScaler.step` that ends the window where the scaler skips the step."""
        original = torch.amp.GradScaler.step

        @wraps(original)
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._num_steps
            result = original(scaler, optimizer, *args, **kwargs)
            if self._num_steps == before and isinstance(optimizer, Optimizer):
                self._guard(self._skip, optimizer)
            return result

        return step

    def _skip(self, optimizer: Optimizer) -> None:
        held = list(self._held_by(optimizer))
        for watched in held:
            watched.open_window()
            watched.close_window()
        self._num_skipped += bool(held)

    def _held(self) -> set[int]:
        return {
            id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]
        }

    def _find_unwatched(self) -> str:
        """Name the model's parameters that the optimizers were given later: nobody has looked at those."""
        late = self._held() - self._held_at_first
        named = self._model.named_parameters() if self._model is not None else ()
        names = [name for name, parameter in named if id(parameter) in late]
        why = "the optimizer got parameters after measuring began, which nobody measured; add them before"
        return f"{why}: {name_some(names)}" if names else ""

    # ---- the record --------------------------------------------------------------------------------------------

    def take(self) -> RankSketches:
        """End the step and return its record: each parameter's last window that a step has read."""
        # What no step has used since the last record says nothing of this one.
        self._sketches.flush()
        windows = [_find_read(watched) if watched.num_steps else (_Window(), None) for watched in self._watched]
        columns, own = _number_columns(windows)
        used = _to_array([window.used for window, _ in windows])
        is_finite: list[bool] = np.isfinite(used).all(axis=1, keepdims=True).ravel().tolist()
        record = RankSketches(
            rank=dist.get_rank() if dist.is_initialized() else 0,
            names=tuple(watched.place.name for watched in self._watched),
            numel=tuple(watched.place.numel for watched in self._watched),
            dtypes=tuple(w.reduced_in or w.dtype or w.place.dtype for w in self._watched),
            used=used,
            used_digests=np.array([window.digest for window, _ in windows], np.int64),
            states=tuple(
                w.state if finite else NOT_FINITE for (w, _), finite in zip(windows, is_finite, strict=True)
            ),
            own=own,
            columns=columns,
            carry=_to_array([window.carry for window, _ in windows]),
            before=np.array([window.before for window, _ in windows], np.int64),
            after=np.array([watched.place.digest() for watched in self._watched], np.int64),
            own_parts=tuple(watched.own_parts for watched in self._watched),
            own_sum=tuple(watched.own_sum for watched in self._watched),
            own_unit=tuple(watched.own_unit for watched in self._watched),
            used_parts=tuple(watched.used_parts for watched in self._watched),
            weight_parts=tuple(watched.place.weight_parts() for watched in self._watched),
            steps_of=tuple(watched.num_steps for watched in self._watched),
            num_steps=self._num_steps,
            num_skipped=self._num_skipped,
            is_waiting=any(w.windows[-1].own and not w.windows[-1].closed for w in self._watched),
            failure=self._failure or self._find_unwatched(),
        )
        self._num_steps = self._num_skipped = 0
        for watched in self._watched:
            watched.num_steps = 0
            if watched.windows[-1].state != UNREAD:
                watched.windows[-1].closed = True
        return record


def _find_read(watched: _Watched) -> tuple[_Window, _Window | None]:
    """Return the last window that a step has read, and the one before it."""
    windows = list(watched.windows)
    for index in reversed(range(len(windows))):
        if windows[index].state != UNREAD:
            return windows[index], windows[index - 1] if index else None
    return windows[-1], None


def _to_array(sketches: Sequence[Tensor | None]) -> np.ndarray:
    rows = np.zeros((len(sketches), NUM_BUCKETS))
    known = [index for index, row in enumerate(sketches) if row is not None]
    if known:
        rows[known] = torch.stack([row.cpu() for row in sketches if row is not None]).numpy()
    return rows


def _number_columns(windows: Sequence[tuple[_Window, _Window | None]]) -> tuple[tuple[Column, ...], np.ndarray]:
    """Number the backwards of the current windows from 0, those of the windows before down from -1."""
    columns: list[Column] = []
    rows: list[Tensor] = []
    for which in (0, 1):
        seen = [(index, item) for index, pair in enumerate(windows) for item in getattr(pair[which], "own", ())]
        numbers = _number_backwards([(item.task, index) for index, item in seen])
        for index, item in seen:
            number = numbers[item.task]
            backward = number - max(numbers.values()) - 1 if which else number
            for row, first in ((item.last, False), (item.first, True)):
                if row is not None:
                    columns.append(Column(index, backward, first, item.captured))
                    rows.append(row)
    own = _to_array(rows)
    kept = np.flatnonzero(np.isfinite(own).all(axis=1)).tolist()
    return tuple(columns[row] for row in kept), own[kept]


def _number_backwards(seen: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Number autograd's graph tasks in order; those that reach different parameters are one backward.

    Reentrant checkpoints run tasks inside a task, each for the parameters of one segment.
    """
    reached: dict[int, set[int]] = {}
    for task, parameter in seen:
        reached.setdefault(task, set()).add(parameter)
    numbers: dict[int, int] = {}
    current: set[int] = set()
    number = 0
    for task in sorted(reached):
        if current & reached[task]:
            number, current = number + 1, set()
        numbers[task] = number
        current |= reached[task]
    return numbers
