"""Findings on disk, as they happen: one JSON file that all ranks of a host merge into, under a lock.

No rank waits for another: whoever has something to say locks the file, reads it, merges and replaces it. What a
rank said stays when it is killed. A rank that is stopped while it holds the lock is waited for `PATIENCE_S` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpcall.findings import Finding, Place
from ddpcall.watch.watched import Watched, merge_watched, read_watched

SCHEMA = 1
PATIENCE_S = 5.0
Key = tuple[Any, ...]


def key_of(finding: Finding) -> Key:
    """Return what makes two findings the same: site and cause."""
    return (finding.code, finding.file, finding.line, finding.function, finding.cause)


def merge_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Merge findings of one site and cause: ranks and parameters united, earliest step, largest count."""
    merged: dict[Key, Finding] = {}
    for finding in findings:
        known = merged.get(key_of(finding))
        merged[key_of(finding)] = finding if known is None else _merge_two(known, finding)
    return sorted(merged.values(), key=lambda finding: (finding.step, finding.code, finding.file, finding.line))


def _merge_two(first: Finding, second: Finding) -> Finding:
    early = first if first.step <= second.step else second
    return dataclasses.replace(
        early,
        ranks=tuple(sorted({*first.ranks, *second.ranks})),
        parameters=tuple(dict.fromkeys((*first.parameters, *second.parameters))),
        count=max(first.count, second.count),
    )


@dataclass(frozen=True)
class Said:
    """What one write changed, told under the lock: of several ranks that ask, one alone gets each answer.

    Attributes:
        new: Findings that no rank had said before.
        done: Authors that have left in good order by then.
    """

    new: set[Key]
    done: set[str]


class Journal:
    """The merged findings of one run, in one file."""

    def __init__(self, path: Path, run: str, patience_s: float = PATIENCE_S) -> None:
        """Name the file; what another run left in it is discarded at the first write.

        Args:
            path: The JSON file; its directory is made.
            run: The run's id, the same on all ranks.
            patience_s: Seconds to wait for the lock, before writing without it.
        """
        self.path = path.absolute()
        self._run = run
        self._patience_s = patience_s
        self._has_written = False
        self._presence: int | None = None

    def write(
        self, author: str, findings: Iterable[Finding], watched: Watched | None = None, done: bool = False
    ) -> Said:
        """Put an author's findings, all it has so far, in place of what it said before; return what that changed.

        Args:
            author: This rank, or a name for it.
            findings: All of its findings so far; fewer than before where some were withdrawn.
            watched: What it has watched so far; None for what it said before.
            done: Whether it is leaving.

        Raises:
            OSError: The file cannot be written.
        """
        with self._locked() as state:
            before = {key_of(finding) for finding in _findings(state)}
            state["by_author"][author] = [dataclasses.asdict(finding) for finding in findings]
            if watched is not None:
                state["watched"][author] = dataclasses.asdict(watched)
            if done:
                state["done"] = sorted({*state["done"], author})
            self._replace(state)
            self._has_written = True
            return Said({key_of(finding) for finding in _findings(state)} - before, set(state["done"]))

    def discard(self) -> None:
        """Forget what an earlier run left here under the same id."""
        with self._locked():
            self._state_path.unlink(missing_ok=True)

    def read(self) -> list[Finding]:
        """Return all ranks' findings, merged; also after the last rank has cleared up."""
        if self._has_written and not self._state_path.exists():
            with contextlib.suppress(OSError, ValueError):
                return [from_record(record) for record in json.loads(self.path.read_text())["findings"]]
        return merge_findings(_findings(self._load()))

    def read_watched(self) -> dict[str, Watched]:
        """Return what each author has watched so far, those of the last attempt; none once all is cleared up."""
        return _watched(self._load())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            _lock(lock.fileno(), self._patience_s)
            yield self._load()

    def _load(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(self._state_path.read_text())
            if state.get("run") == self._run:
                return state
        return {"run": self._run, "by_author": {}, "watched": {}, "done": []}

    @property
    def _state_path(self) -> Path:
        return self.path.with_name(f".{self.path.name}.ranks")

    def _replace(self, state: dict[str, Any]) -> None:
        _write_atomically(self._state_path, json.dumps(state))
        merged = [dataclasses.asdict(finding) for finding in merge_findings(_findings(state))]
        watched = dataclasses.asdict(merge_watched(_watched(state).values()))
        content = {"schema": SCHEMA, "watched": watched, "findings": merged}
        _write_atomically(self.path, json.dumps(content, indent=2) + "\n")

    def stay(self) -> None:
        """Let other ranks of the host see that this process is there: by a lock that its end releases."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A bare descriptor, which nothing closes before the process is gone.
            self._presence = os.open(self.path.with_name(f".{self.path.name}.alive"), os.O_RDWR | os.O_CREAT)
            fcntl.lockf(self._presence, fcntl.LOCK_SH)

    def has_begun(self) -> bool:
        """Say whether any process of this run has written yet."""
        return self._state_path.exists()

    def find_present(self, author: str) -> set[str]:
        """Return the authors below this one, of any attempt, that have begun and not left.

        Args:
            author: The one above; theirs go on with a dot and their process id.
        """
        state, above = self._load(), author.partition("/")[2]
        below = {other for other in state["by_author"] if other.partition("/")[2].startswith(f"{above}.")}
        return below - set(state["done"])

    def outstay(self, patience_s: float) -> None:
        """Wait until all other processes that stayed have ended.

        Args:
            patience_s: Seconds after which the wait ends all the same.
        """
        deadline = time.monotonic() + patience_s
        while self._is_somebody_there() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _is_somebody_there(self) -> bool:
        if self._presence is None:
            return False
        try:
            fcntl.lockf(self._presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # held by another; which of the two, the system chooses
            return True
        return False

    def remove_state(self, keep: bool) -> None:
        """Remove what only the ranks need, once all are done; without `keep`, the JSON file too."""
        names = [f".{self.path.name}.{part}" for part in ("ranks", "lock", "alive")]
        for name in names if keep else [*names, self.path.name]:
            with contextlib.suppress(OSError):
                self.path.with_name(name).unlink()


def _findings(state: dict[str, Any]) -> Iterator[Finding]:
    for records in state["by_author"].values():
        for record in records:
            yield from_record(record)


def _watched(state: dict[str, Any]) -> dict[str, Watched]:
    """Return the records of the last attempt: what an earlier one saw it did not bring to an end."""
    attempts = {author: int(author.partition("/")[0]) for author in state["watched"]}
    last = max(attempts.values(), default=0)
    return {author: read_watched(state["watched"][author]) for author in attempts if attempts[author] == last}


def from_record(record: dict[str, Any]) -> Finding:
    """Rebuild a finding from its JSON record."""
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}
    caller = values.pop("called_from", None)
    return Finding(**values, called_from=None if caller is None else Place(**caller))


def _lock(file: int, patience_s: float) -> None:
    """Take the lock, or give up: its holder may have been stopped, and each author writes all it has each time."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.002)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
