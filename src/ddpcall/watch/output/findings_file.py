"""Findings on disk, as they happen: one JSON file that all ranks of a host merge into, under a lock.

No rank waits for another: a rank that has a finding locks the file, reads it, merges and replaces it. What a
rank said stays when it is killed. A rank that is stopped while it holds the lock is waited for `PATIENCE_S` only.
Every rank holds a lock of its own as long as it lives: another run that is given the same file sees that this one
is still going, and the last rank to leave sees which others are gone without having said so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpcall.files import replace_text
from ddpcall.findings import Finding, Place
from ddpcall.watch.output.watched import Watched, merge_watched, read_watched

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


class BusyError(ValueError):
    """The file belongs to another run that is still going."""


@dataclass(frozen=True)
class WriteResult:
    """What one write changed, told under the lock: of several ranks that ask, one alone gets each answer.

    Attributes:
        new: Findings that no rank had said before.
        done: Writers that have left by then: in good order, or killed.
    """

    new: set[Key]
    done: set[str]


_ALL = "all ranks"  # the writer of what is left when the ranks' own parts are cleared up


@dataclass
class Contents:
    """What the ranks have said so far.

    Attributes:
        findings: By writer.
        watched: By writer, those of the last attempt.
    """

    findings: dict[str, list[Finding]] = field(default_factory=dict)
    watched: dict[str, Watched] = field(default_factory=dict)

    def update(self, other: Contents) -> None:
        """Take what was said later, or elsewhere, in place of what each writer said here."""
        self.findings.update(other.findings)
        self.watched.update(other.watched)

    def merged(self) -> tuple[list[Finding], Watched]:
        """Return what all of them have found and watched."""
        findings = merge_findings(finding for found in self.findings.values() for finding in found)
        return findings, merge_watched(self.watched.values())


class FindingsFile:
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
        self._presence: int | None = None
        self._known: dict[str, list[int]] = {}
        self._number = 1  # of this process's watches on the file

    def hold_presence(self, writer: str, script: str, begins: bool = False) -> None:
        """Begin, and let others see that this process is there: by a lock that its end releases.

        Args:
            writer: This rank, or a name for it.
            script: What is watched, for the message to another run.
            begins: Whether what is there under the same id is an earlier run's, unless somebody of it is there.

        Raises:
            BusyError: Another run that is still going writes this file.
            OSError: The file cannot be written.
        """
        with self._locked():
            # A bare descriptor, which nothing closes before the process is gone.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            presence = os.open(self._beside("alive"), flags, 0o666)
            state = self._load_any()
            is_mine = state.get("run", self._run) == self._run
            is_nobody_there = _try_lock(presence)
            if not is_mine and not is_nobody_there:
                os.close(presence)
                raise BusyError(
                    f"{self.path} belongs to another watch that is still running "
                    f"({state.get('script', 'of a script')}, process {state.get('process', 'unknown')}). "
                    "Write another name after --json, or wait until it has ended."
                )
            if is_nobody_there:
                fcntl.lockf(presence, fcntl.LOCK_UN)
            if not state or not is_mine or (begins and is_nobody_there):
                state = self._empty()
            self._presence = presence
            place = secrets.randbits(60)  # one byte's lock for each process; there is no byte
            fcntl.lockf(presence, fcntl.LOCK_EX, 1, place)
            state.setdefault("script", script)
            state.setdefault("process", os.getpid())
            numbers = state["numbers"]
            # A rank may begin its next watch before another has left the last: what they say is kept apart.
            running = [n for other, n in numbers.items() if other not in self._part(state, n)["done"]]
            numbers[writer] = self._number = max([numbers.get(writer, 0) + 1, *running])
            state["present"][writer] = [place, os.getpid()]
            self._known = dict(state["present"])
            replace_text(self._beside("ranks"), json.dumps(state))

    def write(
        self, writer: str, findings: Iterable[Finding], watched: Watched | None = None, done: bool = False
    ) -> WriteResult:
        """Put a writer's findings, all it has so far, in place of what it said before; return what that changed.

        Args:
            writer: This rank, or a name for it.
            findings: All of its findings so far; fewer than before where some were withdrawn.
            watched: What it has watched so far; None for what it said before.
            done: Whether it is leaving.

        Raises:
            OSError: The file cannot be written.
        """
        with self._locked():
            state = self._load()
            part = self._part(state, self._number)
            before = {key_of(finding) for found in _contents(part).findings.values() for finding in found}
            part["by_writer"][writer] = [dataclasses.asdict(finding) for finding in findings]
            if watched is not None:
                part["watched"][writer] = dataclasses.asdict(watched)
            if done:
                part["done"] = sorted({*part["done"], writer})
            self._known.update(state["present"])
            replace_text(self._beside("ranks"), json.dumps(state))
            contents = _contents(part)
            self.publish(*contents.merged())
            now = {key_of(finding) for found in contents.findings.values() for finding in found}
            return WriteResult(now - before, self._done(part))

    def publish(self, findings: Iterable[Finding], watched: Watched) -> None:
        """Write the file that others read.

        Raises:
            OSError: It cannot be written.
        """
        records = [dataclasses.asdict(finding) for finding in findings]
        content = {"schema": SCHEMA, "watched": dataclasses.asdict(watched), "findings": records}
        replace_text(self.path, json.dumps(content, indent=2) + "\n")

    def read(self) -> Contents:
        """Return what the ranks have said so far, also once the last of them has cleared up."""
        if self._known and not self.has_begun():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                content = json.loads(self.path.read_text())
                findings = [from_record(record) for record in content["findings"]]
                return Contents({_ALL: findings}, {_ALL: read_watched(content["watched"])})
        return _contents(self._load_part())

    def writers(self) -> set[str]:
        """Return the writers that were there when this one last wrote, whether they have left or not."""
        return set(self._known)

    def read_done(self) -> set[str]:
        """Return the writers that have left, in good order or killed."""
        return self._done(self._load_part())

    def _done(self, part: dict[str, Any]) -> set[str]:
        gone = {writer for writer, (place, process) in self._known.items() if self._is_gone(place, process)}
        return gone | set(part["done"])

    def _is_gone(self, place: int, process: int) -> bool:
        """Say whether a process that was there has ended; its lock ended with it."""
        if self._presence is None or process == os.getpid() or not _try_lock(self._presence, 1, place):
            return False
        fcntl.lockf(self._presence, fcntl.LOCK_UN, 1, place)
        return True

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        path = self._beside("lock")
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                _lock(lock, self._patience_s)
                if os.path.exists(path) and os.path.samestat(os.fstat(lock), path.stat()):
                    yield
                    return
            finally:  # the last rank of a run that ended just now has removed it: take the new one
                os.close(lock)

    def _load(self) -> dict[str, Any]:
        state = self._load_any()
        return state if state.get("run") == self._run else self._empty()

    def _load_part(self) -> dict[str, Any]:
        return self._part(self._load(), self._number)

    def _part(self, state: dict[str, Any], number: int) -> dict[str, Any]:
        """Return what was said in one watch of several that the same processes began; it may be written to."""
        return state if number == 1 else state["later"].setdefault(str(number), _empty_part())

    def _load_any(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self._beside("ranks").read_text())
        return {}

    def _empty(self) -> dict[str, Any]:
        return {"run": self._run, "present": {}, "numbers": {}, "later": {}, **_empty_part()}

    def _beside(self, part: str) -> Path:
        return self.path.with_name(f".{self.path.name}.{part}")

    def has_begun(self) -> bool:
        """Say whether any process of this run has written yet."""
        return os.path.exists(self._beside("ranks"))  # False, too, where it cannot be read

    def find_present(self, writer: str) -> set[str]:
        """Return the writers below this one, of any attempt, that have begun and not left.

        Args:
            writer: The one above; theirs go on with a dot and their process id.
        """
        part, above = self._load_part(), writer.partition("/")[2]
        below = {other for other in part["by_writer"] if other.partition("/")[2].startswith(f"{above}.")}
        return below - set(part["done"])

    def wait_for_others_to_exit(self, patience_s: float) -> None:
        """Wait until all other processes that stayed have ended.

        Args:
            patience_s: Seconds after which the wait ends all the same.
        """
        if self._presence is not None:
            fcntl.lockf(self._presence, fcntl.LOCK_UN)  # or two would wait for each other
        deadline = time.monotonic() + patience_s
        while self._presence is not None and not _try_lock(self._presence) and time.monotonic() < deadline:
            time.sleep(0.01)

    def release_presence(self) -> None:
        """Let others see that this process writes no more, though it lives on."""
        presence, self._presence = self._presence, None
        if presence is not None:
            os.close(presence)

    def remove_state(self, keep: bool) -> None:
        """Remove what only the ranks need, once all are done; without `keep`, the JSON file too.

        Nothing is removed while one of them is in its next watch.
        """
        state = self._load()
        if any(n > self._number and w not in self._part(state, n)["done"] for w, n in state["numbers"].items()):
            return
        paths = [self._beside(part) for part in ("ranks", "lock", "alive")]
        for path in paths if keep else [*paths, self.path]:
            with contextlib.suppress(OSError):
                path.unlink()


def _empty_part() -> dict[str, Any]:
    return {"by_writer": {}, "watched": {}, "done": []}


def _contents(state: dict[str, Any]) -> Contents:
    """Return what a state says; of what was watched, the last attempt's: an earlier one came to no end."""
    findings = {
        writer: [from_record(record) for record in records] for writer, records in state["by_writer"].items()
    }
    attempts = {writer: int(writer.partition("/")[0]) for writer in state["watched"]}
    last = max(attempts.values(), default=0)
    watched = {a: read_watched(state["watched"][a]) for a, attempt in attempts.items() if attempt == last}
    return Contents(findings, watched)


def from_record(record: dict[str, Any]) -> Finding:
    """Rebuild a finding from its JSON record."""
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in record.items()}
    caller = values.pop("called_from", None)
    return Finding(**values, called_from=None if caller is None else Place(**caller))


def _lock(file: int, patience_s: float) -> None:
    """Take the lock, or give up: its holder may have been stopped, and each writer writes all it has each time."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.002)


def _try_lock(file: int, length: int = 0, start: int = 0) -> bool:
    """Take a lock that no other process holds a part of, or none; the whole file by default."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError):  # which of the two, the system chooses
        return False
    return True
