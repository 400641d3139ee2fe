"""The models that are wrapped, and which reducer owns which parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall.taps import CallSite, find_call_site
from ddpcall.watch.sensors.collectives import Mark
from ddpcall.watch.sensors.reducer_state import ReducerState


class Models:
    """One ledger for each wrapped model.

    Attributes:
        ledgers: In the order of wrapping.
        owner: The ledger whose reducer owns a parameter, by the parameter's id.
        origins: Where a parameter that no reducer owns was added or unfrozen, by its id.
        structure: Grows when any of these changes.
    """

    def __init__(self, mark: Callable[[], Mark]) -> None:
        """Take what marks a moment in the log of collectives."""
        self.ledgers: list[ReducerState] = []
        self.owner: dict[int, ReducerState] = {}
        self.origins: dict[int, CallSite] = {}
        self.structure = 0
        self._mark = mark
        self._by_ddp: dict[int, ReducerState] = {}
        self._frozen: set[int] = set()

    def open(self, ledger: ReducerState, root: nn.Module, owned: list[nn.Parameter]) -> None:
        """Add a ledger; it owns its parameters, together with earlier wrappers that are still in use."""
        for previous in self.ledgers:
            previous.share_with(ledger)
        self.owner.update((id(parameter), ledger) for parameter in owned)
        ledger.own(root, owned, self._mark)
        self._frozen.update(id(p) for p in root.parameters() if id(p) not in ledger.names)
        self.ledgers.append(ledger)
        self.structure += 1

    def bind(self, ledger: ReducerState, ddp: DistributedDataParallel) -> None:
        """Note whose reducer a ledger is about."""
        ledger.bind(weakref.ref(ddp, self._forget))
        self._by_ddp[id(ddp)] = ledger

    def _forget(self, reference: Any) -> None:
        self._by_ddp = {key: ledger for key, ledger in self._by_ddp.items() if ledger.ddp is not reference}

    def ledger_of(self, ddp: nn.Module) -> ReducerState | None:
        """Return a wrapper's ledger."""
        return self._by_ddp.get(id(ddp))

    def ledgers_with(self, module: nn.Module) -> list[ReducerState]:
        """Return the ledgers of the wrappers that a module is under."""
        return [ledger for ledger in self.ledgers if ledger.contains(module)]

    def is_watched(self, module: nn.Module) -> bool:
        """Say whether a module is a wrapper or under one."""
        return id(module) in self._by_ddp or bool(self.ledgers_with(module))

    def is_frozen(self, parameter: Tensor) -> bool:
        """Say whether a parameter was in a model when it was wrapped, and not trainable."""
        return id(parameter) in self._frozen

    def note_origin(self, parameter: Tensor) -> None:
        """Note the running line as the one that made a parameter trainable that no reducer owns."""
        self.origins.setdefault(id(parameter), find_call_site())
        self.structure += 1

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for ledger in self.ledgers:
            ledger.close()
