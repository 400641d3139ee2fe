"""What several ranks' vitals of one step say together, merged until one summary tells of all ranks. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ddpcall.watch.compare.vitals import OWN_PARTS, Vitals

MAX_GROUPS = 16
"""Digests of one part that are told apart; of own parts one, for it only matters whether all are the same."""
Ranks = frozenset[int]
_LENGTH_BYTES = 4


@dataclass
class Summary:
    """Digests of some ranks by part, with the ranks that have them.

    Attributes:
        ranks: Whose vitals it tells of.
        groups: By part and digest (None: cannot be told): the ranks that have it.
        ungrouped: By part: ranks whose digests were more than are told apart.
        sums: What the ranks' arrays add up to, in their own precision; or None.
        summed: Ranks whose arrays are in `sums`.
    """

    ranks: Ranks = frozenset()
    groups: dict[str, dict[int | None, Ranks]] = field(default_factory=dict)
    ungrouped: dict[str, Ranks] = field(default_factory=dict)
    sums: np.ndarray | None = None
    summed: Ranks = frozenset()

    @staticmethod
    def of(rank: int, vitals: Vitals) -> Summary:
        """Return the summary of one rank."""
        own = frozenset({rank})
        groups: dict[str, dict[int | None, Ranks]] = {part: {digest: own} for part, digest in vitals.parts.items()}
        return Summary(own, groups, {}, vitals.sums, own if vitals.sums is not None else frozenset())

    def to_bytes(self) -> bytes:
        """Return bytes that tell where they end, so that others can be appended."""

        def shorten(ranks: Ranks) -> str | None:
            return None if ranks == self.ranks else _join_runs(ranks)

        groups = {
            part: [[digest, shorten(ranks)] for digest, ranks in found.items()]
            for part, found in self.groups.items()
        }
        ungrouped = {part: shorten(ranks) for part, ranks in self.ungrouped.items()}
        kind = "" if self.sums is None else self.sums.dtype.str
        head = json.dumps([_join_runs(self.ranks), groups, ungrouped, shorten(self.summed), kind]).encode()
        sums = b"" if self.sums is None else self.sums.tobytes()
        return b"".join(len(part).to_bytes(_LENGTH_BYTES) + part for part in (head, sums))

    @staticmethod
    def read_all(data: bytes) -> list[Summary]:
        """Return the summaries whose bytes were appended to each other."""
        parts: list[bytes] = []
        while data:
            end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES])
            parts.append(data[_LENGTH_BYTES:end])
            data = data[end:]
        return [_read(json.loads(head), sums) for head, sums in zip(parts[::2], parts[1::2], strict=True)]


def _read(head: list[Any], sums: bytes) -> Summary:
    ranks = _split_runs(head[0])

    def lengthen(text: str | None) -> Ranks:
        return ranks if text is None else _split_runs(text)

    groups = {part: {digest: lengthen(text) for digest, text in found} for part, found in head[1].items()}
    ungrouped = {part: lengthen(text) for part, text in head[2].items()}
    array = np.frombuffer(sums, head[4]) if sums else None
    return Summary(ranks, groups, ungrouped, array, lengthen(head[3]))


def _join_runs(ranks: Ranks) -> str:
    """Return the ranks as text, such as `0-7,9`."""
    starts = sorted(rank for rank in ranks if rank - 1 not in ranks)
    ends = sorted(rank for rank in ranks if rank + 1 not in ranks)
    return ",".join(
        f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True)
    )


def _split_runs(text: str) -> Ranks:
    def split() -> Iterator[int]:
        for run in text.split(",") if text else ():
            start, _, end = run.partition("-")
            yield from range(int(start), int(end or start) + 1)

    return frozenset(split())


def merge(summaries: Iterable[Summary]) -> Summary:
    """Return one summary of all the ranks; a part that a summary lacks is one that its ranks cannot tell."""
    summaries = list(summaries)
    merged = Summary(frozenset().union(*(each.ranks for each in summaries)))
    for part in dict.fromkeys(part for each in summaries for part in each.groups):
        found: dict[int | None, Ranks] = {}
        for each in summaries:
            for digest, ranks in each.groups.get(part, {None: each.ranks}).items():
                found[digest] = found.get(digest, frozenset()) | ranks
        largest = sorted(found.items(), key=lambda group: (-len(group[1]), min(group[1])))
        limit = 1 if part in OWN_PARTS else MAX_GROUPS
        merged.groups[part] = dict(largest[:limit])
        left = [ranks for _, ranks in largest[limit:]]
        left += [each.ungrouped[part] for each in summaries if part in each.ungrouped]
        if left:
            merged.ungrouped[part] = frozenset().union(*left)
    for each in summaries:
        # Arrays of another size are left out, and their ranks are not among those that were summed.
        if each.sums is not None and (merged.sums is None or merged.sums.shape == each.sums.shape):
            merged.sums = each.sums if merged.sums is None else merged.sums + each.sums
            merged.summed |= each.summed
    return merged
