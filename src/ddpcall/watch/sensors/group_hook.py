"""Begin a watch once this process makes a process group: `multiprocessing` starts all kinds of processes.

Light: data loaders' workers import it too, where their start method is not fork.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from ddpcall.imports import Undo, after_import


def begin_with_group() -> None:
    """Wait for the default process group, unless a watch is running by then.

    Source: `init_process_group` in torch/distributed/distributed_c10d.py ends with `UPDATE_DEFAULT_PG`.
    """

    def patch(_: ModuleType) -> Undo:
        from ddpcall import torch_internals as internals  # which needs all of torch

        entry = internals.UPDATE_DEFAULT_PG
        update = entry.get(None)
        if update is None:  # a process that may be no rank has nobody to tell
            return lambda: None

        @functools.wraps(update)
        def updating(group: Any) -> None:
            from ddpcall.watch.program.children import begin_as_rank

            setattr(entry.owner(), entry.name, update)
            if group is not None:
                begin_as_rank()
            entry.get()(group)  # which the watch has patched by now

        setattr(entry.owner(), entry.name, updating)
        return lambda: None

    after_import("torch", patch)
