"""One life of a finding: suspected → confirmed → reported, or withdrawn. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from ddpcall.findings import Finding
from ddpcall.watch.output.findings_file import key_of, merge_findings

_KEEP_REPLICAS_EQUAL = frozenset({"DC111", "DC112"})
"""Every rank uses the same gradient, though not the right one."""


class Status(StrEnum):
    """Where a finding stands."""

    SUSPECTED = "suspected"
    """It may be harm. Nobody hears of it unless something confirms it."""
    CONFIRMED = "confirmed"
    """It is harm, and only its line is still looked for. What it explains is explained already."""
    REPORTED = "reported"
    WITHDRAWN = "withdrawn"
    """It is no harm: the script means it so. It is not reported again."""


class Publisher(Protocol):
    """Who tells the findings of this rank, and knows those of the others.

    Attributes:
        rank: This rank.
    """

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def stops(self) -> bool:
        """Whether a finding stops the script where it is reported: no better line can be waited for."""
        ...

    def wants(self, finding: Finding) -> bool:
        """Say whether the user wants to hear of a finding."""
        ...

    def publish(self, finding: Finding) -> None:
        """Put a reported finding on disk, and say it."""
        ...

    def republish(self) -> None:
        """Put on disk what is left after a finding was withdrawn."""
        ...

    def all_findings(self) -> list[Finding]:
        """Return what all ranks have reported so far."""
        ...


@dataclass(frozen=True)
class _Entry:
    finding: Finding
    status: Status


class FindingsBook:
    """What this rank has found, each under one key from the first suspicion to the report.

    A key names the harm, not the line: a better line may be found later. Without a key of its own a finding goes
    under its site and cause.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.clear()

    def clear(self) -> None:
        """Forget everything: a forked child has found nothing yet."""
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = threading.RLock()

    @property
    def stops(self) -> bool:
        """Whether a finding stops the script where it is reported: no better line can be waited for."""
        return self._publisher.stops

    def status(self, key: Hashable) -> Status | None:
        """Return where a finding stands, None where there is none."""
        entry = self._entries.get(key)
        return None if entry is None else entry.status

    def suspect(self, key: Hashable, finding: Finding) -> None:
        """Note what may be harm, also where it was held as such; what was noted first stays."""
        self._note(key, finding, Status.SUSPECTED)

    def hold(self, key: Hashable, finding: Finding) -> None:
        """Note what is harm, and wait with the report for a better line."""
        self._note(key, finding, Status.CONFIRMED)

    def _note(self, key: Hashable, finding: Finding, status: Status) -> None:
        with self._lock:
            if self.status(key) not in (Status.REPORTED, Status.WITHDRAWN):
                known = self._entries.get(key)
                self._entries[key] = _Entry(finding if known is None else known.finding, status)

    def confirm(self, key: Hashable) -> None:
        """Report what was suspected or held; nothing happens where it was reported or withdrawn since."""
        entry = self._entries.get(key)
        if entry is not None and entry.status in (Status.SUSPECTED, Status.CONFIRMED):
            self.report(entry.finding, key)

    def confirm_all(self, is_meant: Callable[[Finding], bool]) -> list[Hashable]:
        """Report what was suspected, of the findings that are meant; return what they were known under."""
        entries = list(self._entries.items())
        keys = [key for key, each in entries if each.status is Status.SUSPECTED and is_meant(each.finding)]
        for key in keys:
            self.confirm(key)
        return keys

    def report(self, finding: Finding, key: Hashable = None) -> None:
        """Report a finding, unless it was withdrawn; one that is known is counted.

        Args:
            finding: Of this rank, where it names none.
            key: What it was suspected or held under; None for its site and cause.

        Raises:
            WatchError: With `on_finding="raise"`.
        """
        if not self._publisher.wants(finding):
            return
        finding = replace(finding, ranks=finding.ranks or (self._publisher.rank,))
        with self._lock:
            key = key or key_of(finding)
            if self.status(key) is Status.WITHDRAWN:
                return
            known = [each for each in self._reported() if key_of(each) == key_of(finding)]
            merged = merge_findings([*known, finding])[0]
            merged = replace(merged, count=max((each.count for each in known), default=0) + 1)
            self._entries[key] = _Entry(merged, Status.REPORTED)
        self._publisher.publish(merged)

    def withdraw(self, key: Hashable) -> None:
        """Take back a finding, in whatever state, for good: it is no harm."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries[key] = _Entry(entry.finding, Status.WITHDRAWN)
        if entry is not None and entry.status is Status.REPORTED:
            self._publisher.republish()

    def release(self) -> None:
        """Report what was held: no better line will come."""
        for key in [key for key, entry in self._entries.items() if entry.status is Status.CONFIRMED]:
            self.confirm(key)

    def findings(self) -> list[Finding]:
        """Return what this rank has reported."""
        with self._lock:
            return merge_findings(self._reported())

    def told(self) -> list[Finding]:
        """Return what all ranks have reported."""
        return merge_findings([*self.findings(), *self._publisher.all_findings()])

    def _reported(self) -> list[Finding]:
        return [entry.finding for entry in self._entries.values() if entry.status is Status.REPORTED]

    def explains_divergence(self) -> bool:
        """Say whether it is known why parameters differ: gradients were not averaged, perhaps on purpose."""
        with self._lock:
            known = [each.finding for each in self._entries.values() if each.status is not Status.SUSPECTED]
        return any(map(is_about_gradients, known)) or any(map(is_about_gradients, self._publisher.all_findings()))


def is_about_gradients(finding: Finding) -> bool:
    """Say whether a finding tells why ranks use different gradients."""
    return finding.code.startswith("DC1") and finding.code not in _KEEP_REPLICAS_EQUAL
