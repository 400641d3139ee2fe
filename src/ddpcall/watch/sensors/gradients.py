"""Own and used gradients of every parameter that an optimizer steps, wrapped or not, in measured steps.

What one rank computed and what its optimizer used are kept as sketches (`ddpcall.mixing`); the ranks' records of a
step, put together, tell who learned from whom. Hooks are on the parameters in measured steps alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from ddpcall.mixing.collect import MixingCollector
from ddpcall.mixing.places import Place, clean_name
from ddpcall.mixing.record import RankSketches
from ddpcall.mixing.shards import FlatPlace, ShardedPlace, find_copied, find_sharded
from ddpcall.taps import is_lazy
from ddpcall.watch.run import OF_OTHER, Run
from ddpcall.watch.sensors.earlier import find_living, find_roots
from ddpcall.watch.sensors.reducer_state import ReducerState

EVERY_STEP_UNTIL = 16
SPARSER = 100
"""Vitals are taken every `every` steps; measuring costs more, and is done every 100th time.

Before the first of these it is done at every power of two, so that short runs are measured beyond their start.
"""
MOST_ASKED = 16
"""Further steps that are measured since the script sent much before them, and as many since a sensor asked."""
MAX_PARAMETERS = 4_000
"""A record has about 1.5 kB a parameter."""


class GradientSensor:
    """Measures the steps that are due, numbered over all optimizers: the same on ranks that step alike.

    Args:
        run: What this rank knows; the names of wrapped and sharded parameters are noted in it.
        every: Steps between vitals, as the user chose; 0 for never: then ranks are not compared.
        find_roots: Returns the inner modules of the wrapped models that are known.
        measured: Gets what was measured of a step, with its number and the optimizer that stepped.

    Attributes:
        num_steps: Steps of any optimizer that began outside every other's.
        failure: Why nothing is measured any more; empty where nothing went wrong.

    Blind to: parameters that were put into an optimizer after the backward of a measured step; steps whose
    backward was not started from Python.
    """

    def __init__(
        self,
        run: Run,
        every: int,
        find_roots: Callable[[], Iterable[nn.Module]],
        measured: Callable[[int, Optimizer, RankSketches], None],
    ) -> None:
        self._run = run
        self._every = every
        self._find_roots = find_roots
        self._roots: list[weakref.ref[nn.Module]] = []
        self._measured = measured
        self._numel = 0
        self._num_after_sending = self._num_asked = 0
        self._is_asked = False
        self._further = 0
        self._optimizers: dict[int, weakref.ref[Optimizer]] = {}
        self._num_optimizers = 0
        self._collector: MixingCollector | None = None
        self._signature: tuple[int, ...] = ()
        self._is_on = False
        self._copied: list[ReducerState] = []
        self.num_steps = 0
        self.failure = ""

    def is_due(self, step: int) -> bool:
        """Say whether a step, numbered from 1 over all optimizers, is measured; the same on every rank."""
        if self.failure:
            return False
        if self._is_scheduled(step) or step == self._further:
            self._is_asked = False
            return True
        # The script may have averaged the weights: whether they are equal shows before the step.
        has_sent = 0 < self._numel <= self._run.collectives.num_sent()
        if self._every > 0 and has_sent and self._num_after_sending < MOST_ASKED:
            self._num_after_sending += 1
            self._further = step
        elif self._is_asked and self._num_asked < MOST_ASKED:
            self._num_asked += 1
            self._further = step
        return step == self._further

    def ask(self) -> bool:
        """Have the next step measured too, since a sensor saw something; say whether that is possible."""
        self._is_asked = not self.failure and self._num_asked < MOST_ASKED
        return self._is_asked

    def is_compared(self) -> bool:
        """Say whether the ranks' records are put together."""
        return self._every > 0 and not self.failure

    def are_own(self, parameters: Iterable[Tensor]) -> bool | None:
        """Say whether what this rank computed is in its gradients unreduced; None where that is not measured."""
        return self._collector.are_own(parameters) if self._is_on and self._collector is not None else None

    def _is_scheduled(self, step: int) -> bool:
        period = SPARSER * self._every
        is_power_of_two = step & (step - 1) == 0
        return step <= EVERY_STEP_UNTIL or (
            period > 0 and (step % period == 0 or (step < period and is_power_of_two))
        )

    def expects_measuring(self) -> bool:
        """Say, before its backward, whether the step that is being prepared is one of those known in advance."""
        is_measured = self._every > 0 and not self.failure and self._is_scheduled(self.num_steps + 1)
        return is_measured and dist.is_initialized() and dist.get_world_size() > 1

    def add(self, optimizer: Optimizer) -> None:
        """Take an optimizer that was made, or is seen for the first time."""
        if not any(known() is optimizer for known in self._optimizers.values()):
            self._optimizers[self._num_optimizers] = weakref.ref(optimizer)
            self._num_optimizers += 1

    def prepare(self) -> None:
        """A backward begins: put the hooks on if the coming step is due, else take them off."""
        if not (self.is_due(self.num_steps + 1) and dist.is_initialized() and dist.get_world_size() > 1):
            self.stop()
            return
        # Numbered as they were made: which of them are garbage by now may differ between ranks.
        living = {
            number: optimizer for number, each in self._optimizers.items() if (optimizer := each()) is not None
        }
        self._optimizers = {number: self._optimizers[number] for number in living}
        optimizers = {number: each for number, each in living.items() if hasattr(each, "param_groups")}
        signature = _sign(optimizers.values())
        if self._is_on and signature == self._signature:
            return
        self.stop()
        if signature != self._signature or self._collector is None:
            self._signature = signature
            places = self._find_places(optimizers)
            if len(places) > MAX_PARAMETERS:
                self.failure = f"more than {MAX_PARAMETERS:,} parameters"
                return
            self._numel = sum(place.numel for place in places)
            self._collector = MixingCollector(
                places, list(optimizers.values()), self._take, self._run.models.reduces
            )
        self._collector.forget()
        self._collector.start()
        self._is_on = True

    def _find_places(self, optimizers: dict[int, Optimizer]) -> list[Place]:
        roots = list(self._find_roots())
        known = {id(parameter) for root in roots for parameter in root.parameters()}
        held = {
            id(p) for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]
        }
        if not held <= known:
            with suppress(TimeoutError):  # parameters go without their names, then
                roots = [*roots, *find_roots(find_living(nn.Module))]
        self._roots = [weakref.ref(root) for root in roots if any(id(p) in held for p in root.parameters())]
        places = list(find_all_places(roots, optimizers))
        self._run.inside = {place.name for place in places if id(place.stepped) in known}
        owner = self._run.models.owner
        self._run.reduced = {place.name for place in places if id(place.stepped) in owner}
        # A parameter is a module's, such as a copied model that an inner loop trains.
        copies = [place for place in places if place.is_foreign and not isinstance(place.stepped, nn.Parameter)]
        states = (owner.get(id(place.whole())) for place in copies)
        self._copied = list({id(state): state for state in states if state is not None}.values())
        self._run.sharded = {place.name for place in places if isinstance(place, ShardedPlace | FlatPlace)}
        return places

    def roots(self) -> list[nn.Module]:
        """Return the models whose parameters the optimizers step, as they were last looked for."""
        return [root for reference in self._roots if (root := reference()) is not None]

    def count(self) -> None:
        """Count a step that ended; what was measured of it comes right after."""
        self.num_steps += 1

    def _take(self, optimizer: Optimizer) -> None:
        assert self._collector is not None
        record = self._collector.take()
        self.failure = record.failure
        for state in self._copied:
            state.count_step(self._run.steps.of(optimizer))
        if self._every > 0:
            self._measured(self.num_steps, optimizer, record)

    def stop(self) -> None:
        """Take the hooks off."""
        if self._is_on and self._collector is not None:
            self._collector.stop()
            self._collector.forget()
        self._is_on = False


def _sign(optimizers: Iterable[Optimizer]) -> tuple[int, ...]:
    """Return numbers that change when an optimizer, a parameter or its `requires_grad` does."""
    return tuple(
        number
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for number in (id(parameter), parameter.requires_grad)
    )


def find_all_places(roots: Iterable[nn.Module], optimizers: Mapping[int, Optimizer]) -> Iterator[Place]:
    """Yield every parameter that the optimizers hold, in their order, under a name of its own.

    Args:
        roots: Modules that give them names; a wrapper's own prefix is left out.
        optimizers: By a number that is the same on every rank.
    """
    roots = list(dict.fromkeys(map(_unwrap, roots)))
    by_id = _place_by_id(roots)
    taken: set[str] = set()
    yielded: set[int] = set()
    for index, optimizer in optimizers.items():
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        copied = {}
        if not any(id(parameter) in by_id for parameter in held):
            named = ({clean_name(n): p for n, p in r.named_parameters() if p.requires_grad} for r in roots)
            found: list[Place] = next(filter(None, (find_copied(each, held) for each in named)), [])
            copied = {id(place.stepped): [place] for place in found}
        for number, parameter in enumerate(held):
            if id(parameter) in yielded or is_lazy(parameter):
                continue
            yielded.add(id(parameter))
            nameless = [Place(f"optimizer {index}, parameter {number}", parameter)] if parameter.is_leaf else []
            for place in by_id.get(id(parameter)) or copied.get(id(parameter)) or nameless:
                if place.is_foreign or parameter.requires_grad:
                    if place.name in taken:  # of another model
                        place.name += f"{OF_OTHER} {index})"
                    taken.add(place.name)
                    yield place


def _place_by_id(roots: Iterable[nn.Module]) -> dict[int, list[Place]]:
    """Return where each parameter can be seen, by the id of what an optimizer would hold."""
    by_id: dict[int, list[Place]] = {}
    standing_for: set[int] = set()
    for root in roots:
        for ids, place in find_sharded(root):
            standing_for.update(ids)
            by_id.setdefault(id(place.stepped), []).append(place)
        for name, parameter in root.named_parameters():
            if id(parameter) not in standing_for and not is_lazy(parameter):
                by_id.setdefault(id(parameter), [Place(clean_name(name), parameter)])
    return by_id


def _unwrap(module: nn.Module) -> nn.Module:
    while isinstance(module, DistributedDataParallel | DataParallel):
        module = module.module
    return module
