"""Parameters: what all ranks' records say of one parameter, shards and replicas put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ddpcall.mixing.record import UNREAD, RankSketches
from ddpcall.mixing.shapes import Verdict, find_eta, find_underflow


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
    num_steps: tuple[int, ...]
    verdict: Verdict = field(default_factory=lambda: Verdict("unidentifiable"))

    def layout(self) -> tuple[Any, ...]:
        """Return what must be equal for two parameters' records to be stacked."""
        return (self.own.shape[1], self.earlier.shape[1], bool(self.carry.any()), self.captured)


Own = dict[int, tuple[np.ndarray, np.ndarray | None]]
"""One rank's own gradients of one parameter, by backward: as its hooks left them, and ahead of them."""


@dataclass(frozen=True)
class _RankView:
    """One rank's record, looked up by name."""

    record: RankSketches
    index: dict[str, int]
    own: list[Own]
    captured: list[set[int]]

    @staticmethod
    def of(record: RankSketches) -> _RankView:
        last: list[dict[int, np.ndarray]] = [{} for _ in record.names]
        first: list[dict[int, np.ndarray]] = [{} for _ in record.names]
        captured: list[set[int]] = [set() for _ in record.names]
        for row, column in zip(record.own, record.columns, strict=True):
            (first if column.first else last)[column.parameter][column.backward] = row
            if column.captured:
                captured[column.parameter].add(column.backward)
        own: list[Own] = [
            {backward: (row, ahead.get(backward)) for backward, row in rows.items()}
            for rows, ahead in zip(last, first, strict=True)
        ]
        return _RankView(record, {name: i for i, name in enumerate(record.names)}, own, captured)


def find_unshared(records: Sequence[RankSketches]) -> list[str]:
    """Return the parameters that some ranks have and others do not."""
    sets = [set(record.names) for record in records]
    return sorted(set.union(*sets) - set.intersection(*sets))


def gather_parameters(records: Sequence[RankSketches]) -> list[Parameter]:
    """Put the ranks' parts of every parameter together; `records` are those of ranks that took a step."""
    views = {record.rank: _RankView.of(record) for record in records}
    unshared = set(find_unshared(records))
    one_replica = _computes_one_replica(records)
    names = [name for name in records[0].names if name not in unshared]
    return [parameter for name in names if (parameter := _gather(name, views, one_replica)) is not None]


def _computes_one_replica(records: Sequence[RankSketches]) -> bool:
    """Say whether all ranks compute one replica together: tensor parallelism and nothing beside it."""
    ranks = {record.rank for record in records}
    return any(set(unit) >= ranks for record in records for unit in record.own_unit)


def _gather(name: str, views: Mapping[int, _RankView], one_replica: bool) -> Parameter | None:
    ranks = list(views)
    at = {rank: view.index[name] for rank, view in views.items()}
    states = tuple(views[rank].record.states[at[rank]] for rank in ranks)
    if all(state == UNREAD for state in states):
        return None
    own_of = {rank: views[rank].own[at[rank]] for rank in ranks}
    ahead = _is_reduced_in_hooks(list(own_of.values()))
    used, carry, own, earlier = [], [], [], []
    for rank in ranks:
        record, i = views[rank].record, at[rank]
        parts = [part for part in record.used_parts[i] or (rank,) if part in views]
        used.append(sum(views[part].record.used[at[part]] for part in parts))
        carry.append(sum(views[part].record.carry[at[part]] for part in parts))
        own_parts = record.own_parts[i] if one_replica else record.own_sum[i]
        whole = _add_parts([own_of.get(part, {}) for part in own_parts or (rank,)], ahead)
        own.append({backward: row for backward, row in whole.items() if backward >= 0})
        earlier.append({backward: row for backward, row in whole.items() if backward < 0})
    first = views[ranks[0]].record
    numel, own_columns = first.numel[at[ranks[0]]], _stack_columns(own, first.used.shape[1])
    dtypes = {views[rank].record.dtypes[at[rank]] for rank in ranks}
    return Parameter(
        name=name,
        numel=numel,
        eta=max(_find_rounding(dtype, numel, own_columns) for dtype in dtypes),
        used=np.stack(used),
        own=own_columns,
        earlier=_stack_columns(earlier, first.used.shape[1]),
        carry=np.stack(carry),
        captured=frozenset().union(*(views[rank].captured[at[rank]] for rank in ranks)),
        weights=_judge_weights(views, at),
        states=states,
        num_steps=tuple(views[rank].record.steps_of[at[rank]] for rank in ranks),
    )


def _find_rounding(dtype: str, numel: int, own: np.ndarray) -> float:
    """Return the relative rounding of a mean, with what underflow adds where gradients all but vanish."""
    sizes = np.linalg.norm(own, axis=-1)
    eta = find_eta(dtype, len(own))
    underflow = find_underflow(dtype, numel, float(sizes.sum(axis=1).max(initial=0.0)))
    return eta + underflow if underflow > 0.1 * eta else eta


def _add_parts(parts: Sequence[Own], ahead: bool) -> dict[int, np.ndarray]:
    """Add up what several ranks computed of one gradient, by backward."""
    whole: dict[int, np.ndarray] = {}
    for part in parts:
        for backward, (last, first) in part.items():
            row = first if ahead and first is not None else last
            whole[backward] = whole[backward] + row if backward in whole else row
    return whole


def _is_reduced_in_hooks(own: Sequence[Mapping[int, tuple[np.ndarray, np.ndarray | None]]]) -> bool:
    """Say whether hooks on the parameter leave the same gradient on all ranks that differed ahead of them."""
    rows = [pair for columns in own for backward, pair in columns.items() if backward == 0]
    if len(rows) < len(own) or any(first is None for _, first in rows):
        return False
    last = np.stack([pair[0] for pair in rows])
    first = np.stack([first for _, first in rows if first is not None])
    return rows_agree(last) and not rows_agree(first)


def rows_agree(rows: np.ndarray) -> bool:
    """Say whether all rows equal the first, up to rounding."""
    return bool((np.linalg.norm(rows - rows[0], axis=1) <= 1e-6 * np.linalg.norm(rows[0])).all())


def _stack_columns(rows: Sequence[Mapping[int, np.ndarray]], buckets: int) -> np.ndarray:
    """Return shape (ranks, backwards, buckets); zeros where a rank had no such backward."""
    keys = sorted({key for row in rows for key in row})
    if keys and keys[0] >= 0:
        keys = list(range(keys[-1] + 1))
    empty = np.zeros(buckets)
    return np.array([[row.get(key, empty) for key in keys] for row in rows]).reshape(len(rows), len(keys), buckets)


def _judge_weights(views: Mapping[int, _RankView], at: Mapping[int, int]) -> str:
    """Say what became of the replicas: equal, parted (equal before the step alone), or different already.

    Equal ones that the step did not change are "unmoved": nobody has averaged them.
    """
    wholes = []
    for rank, view in views.items():
        parts = [part for part in view.record.weight_parts[at[rank]] or (rank,) if part in views]
        before, after = (
            tuple(int(getattr(views[part].record, when)[at[part]]) for part in parts)
            for when in ("before", "after")
        )
        wholes.append((before, after))
    if len({before for before, _ in wholes}) > 1:
        return "different"
    if len({after for _, after in wholes}) > 1:
        return "parted"
    return "unmoved" if len(set(wholes[0])) == 1 else "equal"


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
