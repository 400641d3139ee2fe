"""The judge: the records of all ranks in, the mixing matrix and its shape out. No communication."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ddpcall.mixing.record import FOREIGN, NO_GRADIENT, NOT_FINITE, PRESENT, UNREAD, RankSketches
from ddpcall.mixing.shapes import MIN_ELEMENTS, TOO_SMALL, Batch, Verdict, find_eta, judge, solve

_POOLED_BELOW = 64
_MAX_SOLVED = 512
_SENTENCES = {
    "averaged": "Every rank used the mean of all ranks' gradients.",
    "summed": "Every rank used the sum of all ranks' gradients, {num_ranks} times their mean. Divide by the "
    "number of ranks, unless the loss is divided already or one loss is spread over the ranks.",
    "scaled": "Every rank used {scale:.4g} times the mean of all ranks' gradients (clipping, a loss scale or an "
    "accumulation factor does this).",
    "local": "Every rank used its own gradient alone: nothing was averaged. Usual cause: the forward went past "
    "the wrapper, as in model.module(x); write model(x).",
    "partly_local": "A part of what the ranks used was averaged, and a part is each rank's own.",
    "late": "A gradient was not used in the step it was computed for; it arrives in a later step, or never.",
    "groups": "The ranks average in groups that never meet.",
    "dropped": "What some ranks computed is in nobody's gradient.",
    "weighted": "Every rank used the same gradient, in which the ranks do not weigh the same.",
    "transformed": "Every rank used the same gradient, which is no mixture of what they computed (compression, "
    "clipping by parameter or by value, or weight decay does this; replicas stay equal).",
    "different": "The ranks used different gradients that no common mixture explains.",
    "thrown_away": "Gradients were computed, and the optimizer used none of them.",
    "unaccounted": "The optimizer used gradients that no backward on the model's parameters was seen to compute "
    "(master weights in float32, or torch.func).",
    "unidentifiable": "It cannot be told from this step who learns from whom.",
}
# What is told first where parameters differ.
_ORDER = (
    "different", "groups", "thrown_away", "dropped", "late", "local", "partly_local", "weighted", "unaccounted",
    "summed", "scaled", "averaged", "transformed", "unidentifiable",
)  # fmt: skip
_MIXED_ALIKE = {"averaged", "summed", "scaled", "transformed", "weighted"}
_FOLLOWED = ("averaged", "summed", "scaled", "local")
_WEIGHTS = {
    "equal": "the weights are equal on all ranks before and after the step",
    "averaged": "the weights are equal again after the step: the script averages them",
    "parted": "the weights were equal before the step and differ after it",
    "different": "the weights differed before the step already",
}


@dataclass(frozen=True)
class Mixing:
    """Who learned from whom in one optimizer step.

    Attributes:
        matrix: Shape (ranks, columns), float64: how much of each column is in what a rank used; nan where the
            step does not tell. Of the parameters in the largest group of `by_parameter`.
        columns: (rank, backward) of each column of `matrix`. Backwards that are mixed alike are one column;
            negative ones belong to the step before.
        scale: 1.0 if every rank used exactly the mean.
        residual: By rank: what the matrix does not explain, relative to the gradients that were mixed.
        shape: One of `ddpcall.mixing.SHAPES`.
        by_parameter: Parameters' names by shape.
        reason: What the shape's name does not say.
        num_ranks: Ranks that were compared.
        ranks: Their global ranks: the matrix's rows.
        weights: By what became of the replicas (equal, averaged, parted, different): parameters' names.
    """

    matrix: np.ndarray
    columns: tuple[tuple[int, int], ...]
    scale: float
    residual: tuple[float, ...]
    shape: str
    by_parameter: Mapping[str, tuple[str, ...]]
    reason: str
    num_ranks: int
    ranks: tuple[int, ...] = ()
    weights: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def explain(self) -> str:
        """Say in plain sentences what the shape means."""
        sentence = _SENTENCES[self.shape].format(scale=self.scale, num_ranks=self.num_ranks)
        return f"{sentence} {self.reason[:1].upper()}{self.reason[1:]}." if self.reason else sentence

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, lists and texts; nan as None."""
        plain = dict(vars(self))
        plain["matrix"] = [[_plain(value) for value in row] for row in self.matrix.tolist()]
        plain["columns"] = [list(column) for column in self.columns]
        plain["scale"], plain["residual"] = _plain(self.scale), [_plain(value) for value in self.residual]
        plain["by_parameter"] = {shape: list(names) for shape, names in self.by_parameter.items()}
        plain["weights"] = {kind: list(names) for kind, names in self.weights.items()}
        return json.loads(json.dumps(plain))

    def __str__(self) -> str:
        lines = [f"mixing matrix ({self.shape}, scale {self.scale:.6g}): {self.explain()}"]
        if self.matrix.size and self.matrix.shape[1] <= 16:
            heads = "".join(f"{_head(column):>10}" for column in self.columns)
            lines.append(f"{'':>10}{heads}")
            for rank, row in zip(self.ranks, self.matrix, strict=True):
                lines.append(f"{f'rank {rank}':>10}" + "".join(f"{round(value, 4) + 0.0:>10.4f}" for value in row))
        for shape, names in self.by_parameter.items() if len(self.by_parameter) > 1 else ():
            more = f" … and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"  {shape}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)


def _plain(value: float) -> float | None:
    return None if not math.isfinite(value) else float(value)


def _head(column: tuple[int, int]) -> str:
    rank, backward = column
    return f"rank {rank}" + (f" #{backward}" if backward else "")


# ---- one parameter over the ranks -------------------------------------------------------------------------


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
    dtype = first_rank.dtypes[index(ranks[0])]
    return Parameter(
        name,
        first_rank.numel[index(ranks[0])],
        find_eta(dtype, len(ranks)),
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
    return _rows_agree(last) and not _rows_agree(first)


def _rows_agree(rows: np.ndarray) -> bool:
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


# ---- all parameters ---------------------------------------------------------------------------------------


def judge_records(records: Sequence[RankSketches]) -> Mixing:
    """Judge one step.

    Args:
        records: One a rank. Ranks that took no step are not compared.

    Raises:
        ValueError: fewer than two ranks took a step.
    """
    failures = [f"rank {record.rank}: {record.failure}" for record in records if record.failure]
    stepped = [record for record in records if record.num_steps]
    if len(stepped) < 2:
        raise ValueError("a mixing matrix needs two ranks that took a step")
    parameters = gather_parameters(stepped)
    _judge_by_layout([p for p in parameters if not _is_settled(p)])
    _judge_pools(parameters)
    _adopt_small(parameters)
    ranks = tuple(record.rank for record in stepped)
    mixing = _put_together(parameters, ranks)
    if failures:
        reason = f"measuring ended early ({'; '.join(failures)})"
        return replace(mixing, shape="unidentifiable", reason=reason)
    missing = sorted({record.rank for record in records} - set(ranks))
    if missing:
        extra = f"ranks {', '.join(map(str, missing))} took no step and are not compared"
        mixing = replace(mixing, reason="; ".join(filter(None, [mixing.reason, extra])))
    return mixing


def _is_settled(parameter: Parameter) -> bool:
    """Settle what needs no numbers: skipped steps, and gradients that are not there."""
    states = set(parameter.states)
    if NOT_FINITE in states:
        parameter.verdict = Verdict("unidentifiable", reason="the gradients were not finite")
    elif FOREIGN in states and PRESENT not in states:
        parameter.verdict = Verdict("unaccounted", reason="the optimizer holds copies of the parameters")
    elif len(states & {NO_GRADIENT, UNREAD}) and PRESENT in states and _is_alone(parameter):
        parameter.verdict = Verdict("different", reason="some ranks used no gradient")
    elif not parameter.own.shape[1]:
        used = parameter.used.any()
        why = "a gradient was used that no backward was seen to compute" if used else "no gradient"
        parameter.verdict = Verdict("unaccounted" if used else "unidentifiable", reason=why)
    else:
        return False
    return True


def _is_alone(parameter: Parameter) -> bool:
    """Say whether a rank without a gradient had none in its whole group of shards."""
    return bool((np.abs(parameter.used).max(axis=1) == 0).any())


def _make_batch(parameters: Sequence[Parameter]) -> Batch:
    first = parameters[0]
    return Batch(
        np.stack([p.used for p in parameters]),
        np.stack([p.own for p in parameters]),
        np.array([p.eta for p in parameters]),
        np.array([p.numel for p in parameters]),
        np.stack([p.carry for p in parameters]) if first.carry.any() else None,
        np.stack([p.earlier for p in parameters]) if first.earlier.shape[1] else None,
        first.captured,
    )


def _judge_by_layout(parameters: Sequence[Parameter]) -> None:
    layouts: dict[tuple[Any, ...], list[Parameter]] = {}
    for parameter in parameters:
        layouts.setdefault(parameter.layout(), []).append(parameter)
    for members in layouts.values():
        for member, verdict in zip(members, judge(_make_batch(members)), strict=True):
            member.verdict = verdict


def _judge_pools(parameters: Sequence[Parameter]) -> None:
    """Judge small parameters that say nothing alone together: their sketches side by side."""
    pools: dict[tuple[Any, ...], list[Parameter]] = {}
    for parameter in parameters:
        silent = parameter.verdict.shape == "unidentifiable" and parameter.used.any() and parameter.own.any()
        if silent and parameter.numel < _POOLED_BELOW and set(parameter.states) == {PRESENT}:
            pools.setdefault((*parameter.layout(), parameter.eta), []).append(parameter)
    for members in pools.values():
        if len(members) < 2 or sum(member.numel for member in members) < MIN_ELEMENTS:
            continue
        pool = join_parameters(members)
        [verdict] = judge(_make_batch([pool]))
        for member in members:
            member.verdict = verdict


def _adopt_small(parameters: Sequence[Parameter]) -> None:
    """Let parameters that are too small to judge follow the others, where what most of them do explains them."""
    judged = [p for p in parameters if p.verdict.shape in _FOLLOWED]
    if not judged:
        return
    most = max(judged, key=lambda p: p.numel).verdict
    for parameter in parameters:
        if parameter.verdict.shape != "unidentifiable" or not parameter.own.any() or not parameter.used.any():
            continue
        own = parameter.own.sum(axis=1)
        mixed = own if most.shape == "local" else np.broadcast_to(own.mean(axis=0), own.shape)
        size = abs(most.scale) * np.linalg.norm(own, axis=1).mean()
        distance = np.linalg.norm(parameter.used - most.scale * mixed, axis=1) / size
        if (distance <= 5 * parameter.eta).all() and parameter.verdict.reason == TOO_SMALL:
            parameter.verdict = replace(most, residual=distance)


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


def _put_together(parameters: Sequence[Parameter], ranks: tuple[int, ...]) -> Mixing:
    by_shape: dict[str, list[Parameter]] = {}
    weights: dict[str, list[str]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.verdict.shape, []).append(parameter)
        kind = parameter.weights
        if kind == "equal" and not parameter.verdict.rows_agree and parameter.verdict.shape not in _MIXED_ALIKE:
            kind = "averaged" if parameter.used.any() else kind
        weights.setdefault(kind, []).append(parameter.name)
    told = {shape: group for shape, group in by_shape.items() if shape != "unidentifiable"} or by_shape
    shape = _name_all(told)
    shown = _choose_shown(told, shape)
    matrix, columns, residual = measure_matrix(shown, ranks)
    scales = [p.verdict.scale for p in shown if not math.isnan(p.verdict.scale)]
    return Mixing(
        matrix=matrix,
        columns=columns,
        scale=float(np.median(scales)) if scales else math.nan,
        residual=residual,
        shape=shape,
        by_parameter={name: tuple(p.name for p in group) for name, group in by_shape.items()},
        reason=_give_reason(told, shape, weights),
        num_ranks=len(ranks),
        ranks=ranks,
        weights={kind: tuple(names) for kind, names in weights.items()},
    )


def _name_all(told: Mapping[str, Sequence[Parameter]]) -> str:
    """Name the step by its parameters' shapes."""
    if len(told) == 1:
        return next(iter(told))
    if not told:
        return "unidentifiable"
    if "local" in told and not set(told) - _MIXED_ALIKE - {"local", "partly_local"}:
        return "partly_local"
    return min(told, key=_ORDER.index)


def _choose_shown(told: Mapping[str, Sequence[Parameter]], shape: str) -> Sequence[Parameter]:
    groups = list(told.values())
    return told.get(shape) or max(groups, key=lambda group: sum(p.numel for p in group), default=[])


def _give_reason(told: Mapping[str, Sequence[Parameter]], shape: str, weights: Mapping[str, Sequence[str]]) -> str:
    reasons = []
    group = told.get(shape, [])
    if group and group[0].verdict.reason:
        reasons.append(group[0].verdict.reason)
    elif not group and told:
        parts = [f"{name}: {len(its)} of {sum(map(len, told.values()))} parameters" for name, its in told.items()]
        reasons.append(", ".join(parts))
    if shape not in _MIXED_ALIKE:
        kinds = [kind for kind in weights if kind != "equal" and not (kind == "averaged" and len(weights) > 1)]
        reasons += [_WEIGHTS[kind] for kind in kinds]
    return "; ".join(reasons)


def measure_matrix(
    parameters: Sequence[Parameter], ranks: tuple[int, ...]
) -> tuple[np.ndarray, tuple[tuple[int, int], ...], tuple[float, ...]]:
    """Solve for the matrix of parameters that were mixed alike, all their sketches side by side.

    Returns:
        The matrix, its columns, and what is left by rank. Backwards that are mixed alike are one column.
    """
    num_ranks = len(ranks)
    layouts: dict[tuple[Any, ...], list[Parameter]] = {}
    for parameter in parameters:
        if parameter.own.shape[1]:
            layouts.setdefault(parameter.layout(), []).append(parameter)
    if not layouts:
        return (
            np.full((num_ranks, num_ranks), math.nan),
            tuple((rank, 0) for rank in ranks),
            (math.nan,) * num_ranks,
        )
    members = max(layouts.values(), key=lambda group: sum(p.numel for p in group))
    pool = join_parameters(members)
    use_earlier = bool(pool.earlier.size) and members[0].verdict.shape in ("late", "different", "transformed")
    blocks = [pool.own[:, k] for k in range(pool.own.shape[1])]
    labels = [[k] for k in range(len(blocks))]
    if use_earlier:
        blocks = [pool.earlier[:, k] for k in range(pool.earlier.shape[1])] + blocks
        labels = [[k - pool.earlier.shape[1]] for k in range(pool.earlier.shape[1])] + labels
    matrix, errors, residual = _solve_blocks(blocks, pool)
    merged = _merge_alike(matrix, errors, num_ranks, [label[0] for label in labels])
    if len(merged) < len(blocks):
        joined = [np.sum([blocks[k] for k in group], axis=0) for group in merged]
        again = _solve_blocks(joined, pool)
        if (again[2] <= np.maximum(2 * residual, 5 * pool.eta)).all():
            (matrix, errors, residual), blocks = again, joined
            labels = [labels[group[0]] for group in merged]
    limit = 1 / (4 * num_ranks)
    with np.errstate(invalid="ignore"):
        matrix = np.where(5 * errors > max(limit, limit * np.nanmax(np.abs(matrix), initial=0)), math.nan, matrix)
    columns = tuple((rank, label[0]) for label in labels for rank in ranks)
    return matrix, columns, tuple(float(value) for value in residual)


def _solve_blocks(blocks: Sequence[np.ndarray], pool: Parameter) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_weights = sum(len(block) for block in blocks)
    columns = np.concatenate([*blocks, *([_shared(pool.carry)] if pool.carry.any() else [])])
    matrix, errors, residual = solve(columns, pool.used, pool.eta)
    return matrix[:, :num_weights], errors[:, :num_weights], residual


def _shared(rows: np.ndarray) -> np.ndarray:
    """Return one row where all are the same: equal columns have no weights of their own."""
    return rows[:1] if _rows_agree(rows) else rows


def _merge_alike(matrix: np.ndarray, errors: np.ndarray, num_ranks: int, labels: Sequence[int]) -> list[list[int]]:
    """Return which blocks of columns of one window have the same weights."""
    merged: list[list[int]] = []
    for k, label in enumerate(labels):
        mine = slice(k * num_ranks, (k + 1) * num_ranks)
        for group in merged:
            theirs = slice(group[0] * num_ranks, (group[0] + 1) * num_ranks)
            allowed = 5 * (errors[:, mine] + errors[:, theirs]) + 1e-4 * np.nanmax(np.abs(matrix), initial=0)
            gap = np.abs(matrix[:, mine] - matrix[:, theirs])
            if (labels[group[0]] < 0) == (label < 0) and np.all((gap <= allowed) | np.isnan(gap)):
                group.append(k)
                break
        else:
            merged.append([k])
    return merged
