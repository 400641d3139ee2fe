"""The matrix itself: least squares over all parameters that were mixed alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddpcall.mixing.parameters import Parameter, join_parameters, rows_agree
from ddpcall.mixing.shapes import solve


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
    return rows[:1] if rows_agree(rows) else rows


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
