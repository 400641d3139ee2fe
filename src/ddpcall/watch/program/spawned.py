"""Watch the processes that a script starts with `torch.multiprocessing.spawn`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddpcall import torch_internals as internals
from ddpcall.taps import replace_attribute
from ddpcall.watch.launch import Launch
from ddpcall.watch.options import Options
from ddpcall.watch.session import Session


def watch_spawned(session: Session) -> None:
    """Watch what `spawn` and `start_processes` start from now on, until the session is closed.

    The processes write their findings to the session's findings file; the session's process, which outlives them,
    reports.

    Blind to: `multiprocessing.Process` and pools, which data loaders use too.

    Source: `torch/multiprocessing/spawn.py`: what is started runs `_wrap(fn, index, args, error_file)`.
    """
    options = dataclasses.replace(session.options, json=session.findings_file.path, sarif=None)
    start, owner = _WatchedStart(options, session.launch, session.script), internals.SPAWN_WRAP.owner()
    session.keep(replace_attribute(owner, internals.SPAWN_WRAP.name, start))


@dataclass(frozen=True)
class _WatchedStart:
    """Stands for `_wrap` in the process that spawns; is pickled, and called in the one that is spawned."""

    options: Options
    launch: Launch
    script: str

    def __call__(self, function: Callable[..., None], index: int, args: tuple[Any, ...], error_file: str) -> None:
        Session.abandon_inherited()  # a fork brings the parent's along, and its `_wrap`
        session = Session(self.options, self.launch.spawned(index))
        session.script = self.script
        session.start()
        succeeded = False
        try:
            internals.SPAWN_WRAP.get()(function, index, args, error_file)
            succeeded = True
        except SystemExit as exit_:  # after the error was written for the parent
            if exit_.__context__ is not None:
                session.explain_crash(exit_.__context__)
            raise
        finally:
            session.close(in_order=succeeded)
