"""Begin a watch once this process makes a process group: `multiprocessing` starts all kinds of processes.

Light: data loaders' workers import it too, where their start method is not fork.
"""

from __future__ import annotations

import functools
from typing import Any

from ddpcall.imports import Undo, after_import


def begin_with_group() -> None:
    """Wait for the default process group, unless a watch is running by then.

    Source: `init_process_group` in torch/distributed/distributed_c10d.py ends with `_update_default_pg`.
    """

    def patch(c10d: Any) -> Undo:
        update = c10d._update_default_pg

        @functools.wraps(update)
        def _update_default_pg(group: Any) -> None:
            from ddpcall.watch.children import begin_as_rank

            c10d._update_default_pg = update
            if group is not None:
                begin_as_rank()
            c10d._update_default_pg(group)  # which the watch has patched by now

        c10d._update_default_pg = _update_default_pg
        return lambda: None

    after_import("torch.distributed.distributed_c10d", patch)
