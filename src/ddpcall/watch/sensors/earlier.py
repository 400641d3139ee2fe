"""Objects that were made before the watch began, found among all that live in this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import Any

from torch import nn

from ddpcall import torch_internals as internals

SCAN_S = 2.0
_CHUNK = 100_000


def find_living(*classes: type) -> list[Any]:
    """Return the live objects of some classes and of classes derived from them, roughly the oldest first.

    Takes 0.1 s in a process that has imported torch. Garbage that is yet to be collected is among them.

    Raises:
        TimeoutError: There are too many objects to look at in 2 s of this thread's own time.

    Blind to: objects that `gc.freeze` has put aside.
    """
    wanted = set(classes)
    waiting = list(classes)
    while waiting:
        derived = set(type.__subclasses__(waiting.pop())) - wanted
        wanted |= derived
        waiting += derived
    deadline = time.thread_time() + SCAN_S  # of work: a busy machine does not end the search
    found: list[Any] = []
    for generation in (2, 1, 0):
        objects = gc.get_objects(generation)
        for start in range(0, len(objects), _CHUNK):
            # Nothing but the type is looked at: an attribute of a stranger's object may do anything.
            found += [each for each in objects[start : start + _CHUNK] if type(each) in wanted]
            if time.thread_time() > deadline:
                raise TimeoutError(f"too many objects to look at in {SCAN_S:.0f} s; hand it your model")
    return found


def find_roots(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return those of the modules that are part of no other; one whose `__init__` was never called is none."""
    children = internals.MODULE_TABLES["modules"].name
    made = [module for module in modules if children in module.__dict__]
    inner = {id(child) for module in made for child in module.__dict__[children].values()}
    return [module for module in made if id(module) not in inner]
