"""State that `load_state_dict(…, strict=False)` did not find, because its names have a wrapper's prefix."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ddpcall.mixing.places import clean_name
from ddpcall.replicas import digest_tensor, is_unreadable
from ddpcall.taps import CallSite, Undo, find_call_site, replace_attribute
from ddpcall.watch.run import Run


@dataclass(eq=False)
class MissedLoad:
    """A call that loaded nothing.

    Attributes:
        site: The line.
        module: What it was called on.
        own: A name that the module has.
        given: The name that the state has for it.
        num_given: Tensors in the state.
        num_meant: How many of them the module has under a name that differs by a wrapper's prefix alone.
        digest: Of the tensor called `own`, as the call left it.
    """

    site: CallSite
    module: weakref.ref[nn.Module]
    own: str
    given: str
    num_given: int
    num_meant: int
    digest: int

    def is_as_it_was(self) -> bool:
        """Say whether the module lives, and nobody has put another value in place of the one not loaded."""
        module = self.module()
        tensor = None if module is None else _find(module, self.own)
        return tensor is not None and digest_tensor(tensor) == self.digest


class LoadSensor:
    """Sees every module's `load_state_dict`, the outermost call alone, and keeps what loaded nothing.

    What matches no name is told from a state of another model by the names without wrappers' prefixes. A later
    load that matches takes it back: the script has changed the names.

    Attributes:
        missed: Calls that loaded nothing, and were not made good since.

    Blind to: state where some names match; `strict=True`, which raises; values that are equal already.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._depth = 0
        self.missed: list[MissedLoad] = []

    def attach(self) -> Undo:
        """See loads from now on; returns the undo."""
        original = nn.Module.load_state_dict

        @functools.wraps(original)
        def load_state_dict(module: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                result = original(module, state_dict, *args, **kwargs)
            finally:
                self._depth -= 1
            if not self._depth and not torch.compiler.is_compiling():
                self._run.contain(self._look, module, state_dict, result)
            return result

        return replace_attribute(nn.Module, original.__name__, load_state_dict)

    def _look(self, module: nn.Module, state: Any, result: Any) -> None:
        unexpected = getattr(result, "unexpected_keys", ())
        if not isinstance(state, Mapping) or len(unexpected) < len(state) or not state:
            loaded = set(map(id, module.modules())) if self.missed else set[int]()
            self.missed = [each for each in self.missed if not _shares(each, loaded)]
            return
        # Not `state_dict()`: it may run a wrapper's hooks, and collectives in them.
        named = chain(
            module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
        )
        by_name = {_plain(name): name for name, _ in named}
        meant = {name: own for name in state if (own := by_name.get(_plain(name))) is not None}
        is_of_this_model = 2 * len(meant) >= len(state)
        for given, own in meant.items() if is_of_this_model else ():
            value, tensor = state[given], _find(module, own)
            if (
                tensor is None
                or not isinstance(value, Tensor)
                or value.shape != tensor.shape
                or is_unreadable(tensor)
            ):
                continue
            if not torch.equal(value.to(tensor), tensor):
                reference, digest = weakref.ref(module), digest_tensor(tensor)
                self.missed.append(
                    MissedLoad(find_call_site(), reference, own, given, len(state), len(meant), digest)
                )
                return


def _plain(name: str) -> str:
    return clean_name(name).removeprefix("module.")


def _find(module: nn.Module, name: str) -> Tensor | None:
    path, _, last = name.rpartition(".")
    try:
        found = getattr(module.get_submodule(path), last, None)
    except AttributeError:
        return None
    return found.detach() if isinstance(found, Tensor) else None


def _shares(missed: MissedLoad, loaded: set[int]) -> bool:
    module = missed.module()
    return module is None or any(id(each) in loaded for each in module.modules())
