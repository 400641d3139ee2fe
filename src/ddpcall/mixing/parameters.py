"""Parameters: what all ranks' records say of one parameter, shards and replicas put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ddpcall.mixing.record import UNREAD, RankSketches
from ddpcall.mixing.shapes import Verdict, find_eta


@dataclass
class Parameter:
    """What all ranks know of one parameter, whole.

    Attributes:
        used: Shape (ranks, buckets).
        own: Shape (ranks, backwards, buckets).
        earlier: The same, of the window before.
    """

    name: str
    numel: int
    eta: float
    used: np.ndarray
    own: np.ndarray
    earlier: np.ndarray
    carry: np.ndarray
    captured: frozenset[int]
    weights: str
    states: tuple[int, ...]
    verdict: Verdict = field(default_factory=lambda: Verdict("unidentifiable"))

    def layout(self) -> tuple[Any, ...]:
        return (self.own.shape[1], self.earlier.shape[1], bool(self.carry.any()), self.captured)


def gather_parameters(records: Sequence[RankSketches]) -> list[Parameter]:
    """Put the ranks' parts of every parameter together; `records` are those of ranks that took a step."""
    by_rank = {record.rank: record for record in records}
    indices = {record.rank: {name: i for i, name in enumerate(record.names)} for record in records}
    names = dict.fromkeys(name for record in records for name in record.names)
    one_replica = _computes_one_replica(records)
    return [parameter for name in names if (parameter := _gather(name, by_rank, indices, one_replica)) is not None]


def _computes_one_replica(records: Sequence[RankSketches]) -> bool:
    """Say whether all ranks compute one replica together: tensor parallelism and nothing beside it."""
    ranks = {record.rank for record in records}
    return any(set(unit) >= ranks for record in records for unit in record.own_unit)


def _gather(
    name: str,
    by_rank: Mapping[int, RankSketches],
    indices: Mapping[int, Mapping[str, int]],
    one_replica: bool,
) -> Parameter | None:
    ranks = list(by_rank)
    present = [rank for rank in ranks if name in indices[rank]]
    if len(present) < len(ranks):
        return None

    def index(rank: int) -> int:
        return indices[rank][name]

    states = tuple(by_rank[rank].states[index(rank)] for rank in ranks)
    if all(state == UNREAD for state in states):
        return None
    used, carry, own, earlier = [], [], [], []
    captured: set[int] = set()
    own_of = {rank: _own_columns(by_rank[rank], index(rank), captured) for rank in ranks}
    first_needed = _is_reduced_in_hooks(list(own_of.values()))
    for rank in ranks:
        record, i = by_rank[rank], index(rank)
        parts = [part for part in record.used_parts[i] or (rank,) if part in by_rank]
        used.append(sum(by_rank[part].used[index(part)] for part in parts))
        carry.append(sum(by_rank[part].carry[index(part)] for part in parts))
        own_parts = record.own_parts[i] if one_replica else record.own_sum[i]
        whole: dict[int, np.ndarray] = {}
        for part in own_parts or (rank,):
            for backward, (last, first) in own_of.get(part, {}).items():
                row = first if first_needed and first is not None else last
                whole[backward] = whole.get(backward, 0.0) + row
        own.append({backward: row for backward, row in whole.items() if backward >= 0})
        earlier.append({backward: row for backward, row in whole.items() if backward < 0})
    buckets = by_rank[ranks[0]].used.shape[1]
    first_rank = by_rank[ranks[0]]
    eta = max(find_eta(by_rank[rank].dtypes[index(rank)], len(ranks)) for rank in ranks)
    return Parameter(
        name,
        first_rank.numel[index(ranks[0])],
        eta,
        np.stack(used),
        _stack_columns(own, buckets),
        _stack_columns(earlier, buckets),
        np.stack(carry),
        frozenset(captured),
        _judge_weights(name, by_rank, indices),
        states,
    )


def _own_columns(
    record: RankSketches, index: int, captured: set[int]
) -> dict[int, tuple[np.ndarray, np.ndarray | None]]:
    last: dict[int, np.ndarray] = {}
    first: dict[int, np.ndarray] = {}
    for row, column in zip(record.own, record.columns, strict=True):
        if column.parameter == index:
            (first if column.first else last)[column.backward] = row
            if column.captured:
                captured.add(column.backward)
    return {backward: (row, first.get(backward)) for backward, row in last.items()}


def _is_reduced_in_hooks(own: Sequence[Mapping[int, tuple[np.ndarray, np.ndarray | None]]]) -> bool:
    """Say whether hooks on the parameter leave the same gradient on all ranks that differed ahead of them."""
    rows = [pair for columns in own for backward, pair in columns.items() if backward == 0]
    if len(rows) < len(own) or any(first is None for _, first in rows):
        return False
    last = np.stack([pair[0] for pair in rows])
    first = np.stack([first for _, first in rows if first is not None])
    return rows_agree(last) and not rows_agree(first)


def rows_agree(rows: np.ndarray) -> bool:
    return bool((np.linalg.norm(rows - rows[0], axis=1) <= 1e-6 * np.linalg.norm(rows[0])).all())


def _stack_columns(rows: Sequence[Mapping[int, np.ndarray]], buckets: int) -> np.ndarray:
    """Return shape (ranks, backwards, buckets); zeros where a rank had no such backward."""
    keys = sorted({key for row in rows for key in row})
    if keys and keys[0] >= 0:
        keys = list(range(keys[-1] + 1))
    empty = np.zeros(buckets)
    return np.array([[row.get(key, empty) for key in keys] for row in rows]).reshape(len(rows), len(keys), buckets)


def _judge_weights(
    name: str, by_rank: Mapping[int, RankSketches], indices: Mapping[int, Mapping[str, int]]
) -> str:
    wholes = []
    for rank, record in by_rank.items():
        i = indices[rank][name]
        parts = [part for part in record.weight_parts[i] or (rank,) if part in by_rank]
        wholes.append(
            tuple(
                tuple(int(getattr(by_rank[part], when)[indices[part][name]]) for part in parts)
                for when in ("before", "after")
            )
        )
    before, after = ({whole[when] for whole in wholes} for when in (0, 1))
    if len(before) > 1:
        return "different"
    return "equal" if len(after) == 1 and wholes else "parted"


def join_parameters(members: Sequence[Parameter]) -> Parameter:
    """Return one parameter whose sketch is those of several side by side, each at the same size."""
    sizes = [float(np.linalg.norm(member.own, axis=-1).mean()) or 1.0 for member in members]

    def join(attribute: str) -> np.ndarray:
        arrays = [getattr(member, attribute) / size for member, size in zip(members, sizes, strict=True)]
        return np.concatenate(arrays, axis=-1)

    first = members[0]
    return replace(
        first,
        numel=sum(member.numel for member in members),
        used=join("used"),
        own=join("own"),
        earlier=join("earlier"),
        carry=join("carry"),
    )
