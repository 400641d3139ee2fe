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
    """One reducer state for each wrapped model.

    Attributes:
        reducer_states: In the order of wrapping.
        owner: The state of the reducer that owns a parameter, by the parameter's id.
        origins: Where a parameter that no reducer owns was added or unfrozen, by its id.
        structure: Grows when any of these changes.
    """

    def __init__(self, mark: Callable[[], Mark]) -> None:
        """Take what marks a moment in the log of collectives."""
        self.reducer_states: list[ReducerState] = []
        self.owner: dict[int, ReducerState] = {}
        self.origins: dict[int, CallSite] = {}
        self.structure = 0
        self._mark = mark
        self._by_ddp: dict[int, ReducerState] = {}
        self._frozen: set[int] = set()

    def open(self, state: ReducerState, root: nn.Module, owned: list[nn.Parameter]) -> None:
        """Add a state; it owns its parameters, together with earlier wrappers that are still in use."""
        for previous in self.reducer_states:
            previous.share_with(state)
        self.owner.update((id(parameter), state) for parameter in owned)
        state.own(root, owned, self._mark)
        self._frozen.update(id(p) for p in root.parameters() if id(p) not in state.names)
        self.reducer_states.append(state)
        self.structure += 1

    def bind(self, state: ReducerState, ddp: DistributedDataParallel) -> None:
        """Note whose reducer a state is about."""
        state.bind(weakref.ref(ddp, self._forget))
        self._by_ddp[id(ddp)] = state

    def _forget(self, reference: Any) -> None:
        self._by_ddp = {key: state for key, state in self._by_ddp.items() if state.ddp is not reference}

    def state_of(self, ddp: nn.Module) -> ReducerState | None:
        """Return the state of a wrapper's reducer."""
        return self._by_ddp.get(id(ddp))

    def states_with(self, module: nn.Module) -> list[ReducerState]:
        """Return the reducer states of the wrappers that a module is under."""
        return [state for state in self.reducer_states if state.contains(module)]

    def is_watched(self, module: nn.Module) -> bool:
        """Say whether a module is a wrapper or under one."""
        return id(module) in self._by_ddp or bool(self.states_with(module))

    def reduces(self, parameter: Tensor) -> bool:
        """Say whether a reducer is prepared for the gradient of a parameter that is being computed."""
        state = self.owner.get(id(parameter))
        return state is not None and state.reduces(id(parameter))

    def is_frozen(self, parameter: Tensor) -> bool:
        """Say whether a parameter was in a model when it was wrapped, and not trainable."""
        return id(parameter) in self._frozen

    def note_origin(self, parameter: Tensor) -> None:
        """Note the running line as the one that made a parameter trainable that no reducer owns."""
        self.origins.setdefault(id(parameter), find_call_site())
        self.structure += 1

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for state in self.reducer_states:
            state.close()
