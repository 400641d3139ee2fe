"""What a watched process hands on to the processes it starts, by environment variables.

`DDPCALL_WATCH` says where findings go and which process reports; in front of PYTHONPATH stands a directory with a
`sitecustomize.py`, which runs in every Python below and begins a watch in those that are ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpcall.launch_environment import read_attempt, read_place
from ddpcall.watch.launch import Launch, name_process
from ddpcall.watch.options import Options
from ddpcall.watch.session import Session

VARIABLE = "DDPCALL_WATCH"
_DIRECTORY = Path(__file__).with_name("on_children_path")


@dataclass(frozen=True)
class Inherited:
    """What a child learns from the watched process above it.

    Attributes:
        script: What is watched, as it was named on the command line.
        run: The run's id.
        file: Where its processes write their findings.
        is_kept: Whether the file was asked for, and stays.
        writer: The writer above.
        reporter: The process that reports, as `name_process` names it.
        place: The launcher's variables above; the child is a rank of its own where it has others.
        options: The options that hold for it, as JSON has them.
    """

    script: str
    run: str
    file: str
    is_kept: bool
    writer: str
    reporter: str
    place: dict[str, str]
    options: dict[str, Any]

    def is_of_another_rank(self) -> bool:
        """Say whether the launcher's variables make this process a rank, and another than the one above."""
        here = read_place().variables
        return bool(here) and here != self.place

    def get_options(self) -> Options:
        """Return the options for the child."""
        sets = {name: frozenset(self.options[name]) for name in ("only", "ignore")}
        file = Path(self.file) if self.is_kept else None
        return Options(**dict[str, Any](self.options, **sets, json=file, brief=True))

    def make_session(self) -> Session:
        """Return a session for this process that takes part in the watch above."""
        session = Session(self.get_options(), self.get_launch())
        session.script = self.script
        return session

    def get_launch(self) -> Launch:
        """Return the child's place: it has no host, for the process above reports."""
        place = read_place()
        attempt, above = read_attempt(), self.writer.partition("/")[2]
        return Launch(
            run=self.run,
            rank=place.rank,
            num_ranks=place.num_ranks,
            writer=f"{attempt}/{above}.{os.getpid()}",
            on_host=frozenset(),
            everywhere=frozenset(),
            may_restart=False,
            file=Path(self.file),
            reporter=self.reporter,
        )


@functools.cache  # before this process hands on something itself
def read_inherited() -> Inherited | None:
    """Return what the process above handed on; None if it is not watched."""
    try:
        return Inherited(**json.loads(os.environ[VARIABLE]))
    except (KeyError, ValueError, TypeError):  # none, or another version's
        return None


def hand_on(session: Session, *, to_all: bool = True) -> None:
    """Let the processes that this one starts from now on take part in its watch.

    Args:
        session: This process's.
        to_all: Whether every rank below is watched; otherwise those alone that `ddpcall watch` runs in.
    """
    options, launch = session.options, session.launch
    kept = ("on_finding", "every", "hang_after", "fail_on")
    told = Inherited(
        script=session.script,
        run=launch.run,
        file=str(session.findings_file.path),
        is_kept=options.json is not None,
        writer=launch.writer,
        reporter=launch.reporter or name_process(os.getpid()),
        place=read_place().variables,
        options={
            **{name: getattr(options, name) for name in kept},
            "only": sorted(options.only),
            "ignore": sorted(options.ignore),
        },
    )
    os.environ[VARIABLE] = json.dumps(dataclasses.asdict(told))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if to_all and str(_DIRECTORY) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(_DIRECTORY), *filter(None, paths)])
