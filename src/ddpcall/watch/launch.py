"""Where this process stands among those started together, as the launcher's environment says. No torch."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

LEAVE_S = 20.0


@dataclass(frozen=True)
class Launch:
    """One process of a launch.

    Attributes:
        run: An id that the processes of one launch share and no other launch has.
        rank: This process's rank, as the launcher says.
        author: Its name in the journal: attempt and rank, so that a restart adds to what was found before it.
        on_host: The authors of this host; the last of them to leave reports.
        everywhere: The authors of all hosts.
        may_restart: Whether the launcher starts everything again when a rank fails.
        file: Where findings go that nobody asked a file for; the same for all processes of this host.
    """

    run: str
    rank: int
    author: str
    on_host: frozenset[str]
    everywhere: frozenset[str]
    may_restart: bool
    file: Path

    @property
    def spans_hosts(self) -> bool:
        """Whether there are ranks that this host's launcher did not start."""
        return self.on_host != self.everywhere

    @property
    def ranks_elsewhere(self) -> tuple[int, ...]:
        """The ranks of other hosts."""
        return tuple(sorted(int(author.split("/")[1]) for author in self.everywhere - self.on_host))

    @property
    def begins_run(self) -> bool:
        """Whether this process is the first rank of the first attempt."""
        return self.author == "0/0"

    def spawned(self, index: int) -> Launch:
        """Return the place of a process that this one spawns: one of no host, for this one reports."""
        author = f"{self.author}.{os.getpid()}"  # called there; the index comes back with the next spawn
        return replace(self, rank=index, author=author, on_host=frozenset(), everywhere=frozenset())


def current_launch() -> Launch:
    """Read torchrun's variables (or another launcher's of the same names); one rank alone where there are none."""
    rank, num_ranks = _number("RANK", 0), _number("WORLD_SIZE", 1)
    num_local = _number("LOCAL_WORLD_SIZE", 1)
    first = rank - _number("LOCAL_RANK", 0) if num_local > 1 else rank
    attempt = _number("TORCHELASTIC_RESTART_COUNT", 0)
    launcher = os.getppid() if num_local > 1 else os.getpid()
    # A process id alone comes back: the first one of every container is the same.
    unique = f"{launcher}-{_start_time(launcher)}"
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    everywhere = frozenset(f"{attempt}/{other}" for other in range(num_ranks))
    on_host = frozenset(f"{attempt}/{other}" for other in range(first, first + num_local))
    shared = "-".join([job, os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")])
    return Launch(
        run=f"{job}-{unique}" if num_local >= num_ranks else shared,
        rank=rank,
        author=f"{attempt}/{rank}",
        on_host=on_host,
        everywhere=everywhere,
        may_restart=attempt < _number("TORCHELASTIC_MAX_RESTARTS", 0),
        file=Path(tempfile.gettempdir()) / f"ddpcall-{os.getuid()}-{unique}.json",
    )


def is_started_alone() -> bool:
    """Say whether `accelerate launch` prepared for several processes and started one, as it does with `--cpu`.

    Source: `prepare_simple_launcher_cmd_env` in accelerate/utils/launch.py sets the address for more than one.
    """
    is_accelerates = any(name.startswith("ACCELERATE_") for name in os.environ)
    return is_accelerates and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ


def let_rank_0_speak() -> None:
    """Wait, on every other rank, to be stopped: once one rank has failed the launcher stops them all.

    A rank that left at once could take rank 0 along before it has said why. Where nobody stops this one, rank 0
    has nothing to say or is on another machine, and it may speak itself: the wait ends after 20 s.
    """
    if _number("RANK", 0) != 0:
        time.sleep(LEAVE_S)


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return default


def _start_time(process: int) -> str:
    """Return when a process began, in the kernel's ticks; empty where the kernel does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""
