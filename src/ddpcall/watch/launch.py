"""Where this process stands among those started together, and which of them are still there. No torch."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from ddpcall.launch_environment import (
    Place,
    read_address,
    read_attempt,
    read_given_name,
    read_job,
    read_max_restarts,
    read_place,
)

LEAVE_S = 20.0


@dataclass(frozen=True)
class Launch:
    """One process of a launch.

    Attributes:
        run: An id that the processes of one launch share and no other launch has.
        rank: This process's rank, as the launcher says.
        writer: Its name in the findings file: attempt and rank, so that a restart adds to what was found before.
        on_host: The writers of this host; the last of them to leave reports.
        everywhere: The writers of all hosts.
        may_restart: Whether the launcher starts everything again when a rank fails.
        file: Where findings go that nobody asked a file for; the same for all processes of this host.
        num_ranks: How many ranks there are, as the launcher says.
        reporter: The process that reports what this one finds, as `name_process` names it; None for itself.
    """

    run: str
    rank: int
    writer: str
    on_host: frozenset[str]
    everywhere: frozenset[str]
    may_restart: bool
    file: Path
    num_ranks: int = 1
    reporter: str | None = None

    @property
    def spans_hosts(self) -> bool:
        """Whether there are ranks that this host's launcher did not start."""
        return self.on_host != self.everywhere

    @property
    def ranks_elsewhere(self) -> tuple[int, ...]:
        """The ranks of other hosts."""
        return tuple(sorted(int(writer.split("/")[1]) for writer in self.everywhere - self.on_host))

    @property
    def above(self) -> str:
        """The writer whose process started this one."""
        return self.writer.rpartition(".")[0]

    @property
    def begins_run(self) -> bool:
        """Whether this process is the first rank of the first attempt."""
        return self.writer == "0/0"

    def forked(self) -> Launch:
        """Return the place of this process, which one of that place has forked."""
        reporter = self.reporter or name_process(os.getppid())
        return replace(self.spawned(self.rank), reporter=reporter)

    def spawned(self, index: int) -> Launch:
        """Return the place of a process that this one spawns: one of no host, for this one reports."""
        writer = f"{self.writer}.{os.getpid()}"  # called there; the index comes back with the next spawn
        return replace(self, rank=index, writer=writer, on_host=frozenset(), everywhere=frozenset(), num_ranks=1)


def current_launch() -> Launch:
    """Read the launcher's variables; one rank alone where there are none."""
    place = read_place()
    first = place.rank - place.local_rank if place.num_local > 1 else place.rank
    attempt = read_attempt()
    unique = read_given_name() or name_process(_find_launcher(place) if place.num_local > 1 else os.getpid())
    job = read_job()
    everywhere = frozenset(f"{attempt}/{other}" for other in range(place.num_ranks))
    on_host = frozenset(f"{attempt}/{other}" for other in range(first, first + place.num_local))
    shared = "-".join([job, *read_address()])
    return Launch(
        run=f"{job}-{unique}" if place.num_local >= place.num_ranks else shared,
        rank=place.rank,
        writer=f"{attempt}/{place.rank}",
        on_host=on_host,
        everywhere=everywhere,
        may_restart=attempt < read_max_restarts(),
        num_ranks=place.num_ranks,
        file=Path(tempfile.gettempdir()) / f"ddpcall-{os.getuid()}-{unique}.json",
    )


def _find_launcher(place: Place) -> int:
    """Return the process that started this host's ranks.

    A shell or another program between it and this process (`srun bash -c "python …"`) was told this rank as well,
    and is passed by. A Python program is not: it may be a rank, watched itself, that starts another program.
    """
    process = os.getppid()
    while _was_told(process, place.variables):
        state = _stat(process)
        if not state:
            break
        process = int(state[1])
    return process


def _was_told(process: int, variables: dict[str, str]) -> bool:
    try:
        program = os.readlink(f"/proc/{process}/exe")
        told = set(Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
    except OSError:  # another user's, as slurmstepd is, or no /proc
        return False
    is_rank = all(os.fsencode(f"{name}={value}") in told for name, value in variables.items())
    return is_rank and not os.path.basename(program).startswith("python")


def name_process(process: int) -> str:
    """Name a process: a process id alone comes back, and the first one of every container is the same."""
    state = _stat(process)
    return f"{process}-{state[19] if state else ''}"  # when it began, in the kernel's ticks, where it tells


def is_running(name: str) -> bool:
    """Say whether a process that `name_process` named is still there, and not a zombie."""
    process, _, started = name.partition("-")
    state = _stat(int(process))
    if state is None:  # not Linux
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return bool(state) and state[0] != "Z" and (not started or state[19] == started)


def let_rank_0_speak() -> None:
    """Wait, on every other rank, to be stopped: once one rank has failed the launcher stops them all.

    A rank that left at once could take rank 0 along before it has said why. Where nobody stops this one, rank 0
    has nothing to say or is on another machine, and it may speak itself: the wait ends after 20 s.
    """
    if read_place().rank != 0:
        time.sleep(LEAVE_S)


def _stat(process: int) -> list[str] | None:
    """Return the kernel's fields from the state on; empty for no such process, None where there is no /proc."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return [] if Path("/proc/self/stat").exists() else None
