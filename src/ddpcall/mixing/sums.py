"""Sums: whether every rank used the mean of all ranks' gradients, told from numbers that add up over the ranks.

Records of all ranks tell which rank learned from whom; they are too many where there are many ranks. To certify
the mean, one rank needs three things: that all ranks used the same (digests, bit by bit), what it used itself, and
the sum of what all ranks computed. Sketches are linear, so they may be added up on their way, and those of several
parameters may be added to each other: each is related to the size of its used gradient, which is the same on all
ranks, so that a small one does not vanish in its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ddpcall.mixing.judge import judge_records
from ddpcall.mixing.record import NO_GRADIENT, PRESENT, UNREAD, RankSketches
from ddpcall.mixing.result import Mixing, name_some
from ddpcall.mixing.shapes import MIN_ELEMENTS, find_eta, find_underflow
from ddpcall.replicas import digest_bytes

MAX_GROUPS = 16
MAX_RANKS = 64
"""Records of at most so many ranks are judged, and matrices of as many rows are shown."""
LAYOUT, USED, BEFORE, AFTER = "layout", "used", "weights before", "weights after"
NUM_BUCKETS = 32  # of a group: half of a sketch's, for there is one number to fit, not one a rank
_MIN_FILLED = 4
_FAR = 3.0
_LARGEST = 1e30  # so that sums over the ranks, too, are float32 numbers
_SHOWS = 0.5
"""A parameter whose gradient is not the mean is off by about its size, which is 1 in its group."""
_OF_SOME = {
    "different": "different", "groups": "different", "partly_local": "different", "thrown_away": "thrown_away",
    "local": "local", "unaccounted": "unaccounted",
}  # fmt: skip
"""What the records of some ranks tell, by the shape that they would have alone."""


@dataclass(frozen=True)
class Pooled:
    """One rank's gradients in few numbers.

    Attributes:
        own: Shape (groups, buckets): sketches of what the rank computed, each parameter related to what it used.
        used: The same of what it used.
        sizes: By group: the size of what it computed, as sketches tell.
        eta: By group: the relative rounding of a mean.
        mixed: Names of the parameters in it.
        group_of: By parameter of `mixed`.
        empty: Names of those of which no rank used a gradient, or one too close to zero for its precision.
    """

    own: np.ndarray
    used: np.ndarray
    sizes: np.ndarray
    eta: np.ndarray
    mixed: tuple[str, ...]
    group_of: np.ndarray
    empty: tuple[str, ...]

    def to_sums(self) -> np.ndarray:
        """Return what is to be added up over the ranks."""
        is_far = any(
            _fit(self.used[group], self.own[group])[1] > _FAR * 5 * self.eta[group]
            for group in range(len(self.own))
        )
        sums = np.concatenate([self.own.ravel(), self.sizes, [is_far]])
        is_single = self.eta.min() >= find_eta("float32", 1) and np.abs(sums).max() < _LARGEST
        return sums.astype(np.float32) if is_single else sums


def digest_record(record: RankSketches) -> dict[str, int]:
    """Return one digest each of what was measured, of the used gradients and of the weights before and after."""
    measured = (record.names, record.numel, record.dtypes, record.states)
    layout = (*measured, record.steps_of, record.num_steps, record.failure)
    arrays = {USED: record.used_digests, BEFORE: record.before, AFTER: record.after}
    return {LAYOUT: digest_bytes(repr(layout).encode())} | {
        part: digest_bytes(np.ascontiguousarray(digests)) for part, digests in arrays.items()
    }


def pool(record: RankSketches, num_ranks: int) -> Pooled | None:
    """Pool a rank's gradients; None where a mean of whole gradients is not what was to be used.

    Shards of gradients are such a case, and gradients that are not finite, thrown away, or of no backward.
    """
    own, has_own = sum_backwards(record)
    sharded = (record.own_parts, record.own_sum, record.own_unit, record.used_parts, record.weight_parts)
    if record.failure or not record.num_steps or any(parts for each in sharded for parts in each):
        return None
    states = np.array(record.states)
    norms = np.linalg.norm(record.used, axis=1)
    known = {dtype: find_eta(dtype, num_ranks) for dtype in set(record.dtypes)}
    all_eta = np.array([known[dtype] for dtype in record.dtypes])
    is_used = (states == PRESENT) & (norms > 0) & (record.used_digests != 0)
    told = zip(record.dtypes, record.numel, norms.tolist(), strict=True)
    is_mixed = is_used & (np.array([find_underflow(*each) for each in told]) <= 0.1 * all_eta)
    is_empty = is_used & ~is_mixed | ~has_own & (norms == 0) & np.isin(states, (NO_GRADIENT, PRESENT))
    if not (is_empty | is_mixed | (states == UNREAD)).all() or not is_mixed.any():
        return None
    chosen = np.flatnonzero(is_mixed)
    group_of, of_group = _group(all_eta[chosen])
    shape = (len(of_group), record.used.shape[1])
    related = [np.zeros(shape), np.zeros(shape)]
    for rows, total in zip((own, record.used), related, strict=True):
        np.add.at(total, group_of, rows[chosen] / norms[chosen, None])
    squares = np.bincount(group_of, (np.linalg.norm(own[chosen], axis=1) / norms[chosen]) ** 2, len(of_group))
    is_too_small = sum(record.numel[index] for index in chosen) < MIN_ELEMENTS
    if is_too_small or np.count_nonzero(related[1]) < _MIN_FILLED:
        return None
    folded = [total.reshape(len(of_group), NUM_BUCKETS, -1).sum(axis=2) for total in related]
    names = np.array(record.names, object)
    return Pooled(
        own=folded[0],
        used=folded[1],
        sizes=np.sqrt(squares),
        eta=of_group,
        mixed=tuple(names[is_mixed]),
        group_of=group_of,
        empty=tuple(names[is_empty]),
    )


def sum_backwards(record: RankSketches) -> tuple[np.ndarray, np.ndarray]:
    """Return what was to be mixed, by parameter: all backwards, ahead of hooks that may reduce, and `.grad`.

    Second, whether anything was computed.
    """
    own, has_own = record.carry.copy(), np.zeros(len(record.names), bool)
    ahead = {(column.parameter, column.backward) for column in record.columns if column.first}
    counted = [
        (row, column.parameter)
        for row, column in enumerate(record.columns)
        if column.backward >= 0
        and not column.captured
        and (column.first or (column.parameter, column.backward) not in ahead)
    ]
    if counted:
        rows, parameters = np.array(counted).T
        np.add.at(own, parameters, record.own[rows])
        np.logical_or.at(has_own, parameters, record.own[rows].any(axis=1))
    return own, has_own


def _group(eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the group of each parameter, at most `MAX_GROUPS` that follow each other, and each group's eta."""
    kinds = np.unique(eta)
    size = -(-len(eta) // max(1, MAX_GROUPS - len(kinds)))
    group_of, of_group = np.zeros(len(eta), int), []
    for kind in kinds:
        members = np.flatnonzero(eta == kind)
        group_of[members] = len(of_group) + np.arange(len(members)) // size
        of_group += [kind] * -(-len(members) // size)
    return group_of, np.array(of_group)


def _fit(used: np.ndarray, own: np.ndarray) -> tuple[float, float]:
    """Return c in `used = c · own`, and what is left of `used`, relative to `c · own`."""
    square = float((own * own).sum())
    scale = float((used * own).sum()) / square if square else 0.0
    size = abs(scale) * square**0.5
    left = float(np.linalg.norm(used - scale * own))
    return scale, left / size if size else float(left > 0) * np.inf


def certify(pooled: Pooled, sums: np.ndarray, ranks: Sequence[int]) -> Mixing:
    """Say whether every rank used the mean of all ranks' gradients, or a multiple of it, where all used the same.

    Args:
        pooled: This rank's.
        sums: Those of all ranks, added up.
        ranks: Whose they are.

    Returns:
        "averaged", "summed", "scaled"; or "unidentifiable", with what is known as its reason.
    """
    num_ranks, num_groups = len(ranks), len(pooled.own)
    sums = sums.astype(np.float64)
    mean = sums[: pooled.own.size].reshape(pooled.own.shape) / num_ranks
    sizes, num_far = sums[pooled.own.size : -1] / num_ranks, sums[-1]
    exact = pooled.eta == pooled.eta.min()
    scale, _ = _fit(pooled.used[exact], mean[exact])
    if not num_far:
        return know_nothing("every rank computed the same gradient: give each rank its own batch", ranks)
    allowed = 5 * pooled.eta * abs(scale) * sizes
    distance = np.linalg.norm(pooled.used - scale * mean, axis=1)
    if (misfit := np.flatnonzero(distance > allowed)).size:
        names = [name for name, group in zip(pooled.mixed, pooled.group_of, strict=True) if group in misfit]
        some = "" if num_groups == 1 else " some of"
        why = f"all ranks used the same gradient, which is no multiple of the mean, of{some} {name_some(names)}"
        return know_nothing(why, ranks)
    if (allowed > _SHOWS).any():
        return know_nothing("too many parameters, in too low a precision, for one of them to show", ranks)
    error = 5 * pooled.eta.min() * float(np.linalg.norm(sizes[exact]) / np.linalg.norm(mean[exact]))
    shape = (
        "averaged" if abs(scale - 1) <= error else "summed" if abs(scale / num_ranks - 1) <= error else "scaled"
    )
    shown = tuple(ranks) if num_ranks <= MAX_RANKS else ()
    return Mixing(
        matrix=np.full((len(shown), len(shown)), scale / num_ranks),
        columns=tuple((rank, 0) for rank in shown),
        scale=scale,
        residual=(float((distance / (abs(scale) * sizes)).max()),),
        shape=shape,
        by_parameter={shape: pooled.mixed} | ({"unidentifiable": pooled.empty} if pooled.empty else {}),
        reason="",
        num_ranks=num_ranks,
        ranks=tuple(ranks),
    )


def judge_some(records: Sequence[RankSketches], reason: str, ranks: Sequence[int]) -> Mixing:
    """Judge by the records of some ranks, and say nothing that only all of them could tell.

    Args:
        records: Those of ranks that took the step, two or more.
        reason: What is known of all ranks.
        ranks: All that were compared.
    """
    mixing = judge_records(records)
    by_parameter: dict[str, list[str]] = {}
    for shape, names in mixing.by_parameter.items():
        by_parameter.setdefault(_OF_SOME.get(shape, "unidentifiable"), []).extend(names)
    shape = next((each for each in dict.fromkeys(_OF_SOME.values()) if each in by_parameter), "unidentifiable")
    return replace(
        know_nothing(reason, ranks),
        shape=shape,
        by_parameter={each: tuple(names) for each, names in by_parameter.items()},
        ranks=mixing.ranks,
        weights=mixing.weights,
    )


def know_nothing(reason: str, ranks: Sequence[int]) -> Mixing:
    """Return the mixing of a step that cannot be judged."""
    return Mixing(np.zeros((0, 0)), (), np.nan, (), "unidentifiable", {}, reason, len(ranks), tuple(ranks))
