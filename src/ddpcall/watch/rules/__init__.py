"""What turns facts and comparisons into findings, one file a family."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddpcall.watch.rules.rule import Rule
    from ddpcall.watch.run import Run


def make_rules(run: Run) -> list[Rule]:
    """Make the rules that need nothing but the run: those that a file of this room lists in its `RULES`.

    So a new finding has no line anywhere else.
    """
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return [rule(run) for module in modules for rule in getattr(module, "RULES", ())]
