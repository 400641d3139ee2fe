"""The matrix itself: least squares over all parameters that were mixed alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpcall.mixing.parameters import Parameter, join_parameters, rows_agree
from ddpcall.mixing.shapes import solve

Measured = tuple[np.ndarray, tuple[tuple[int, int], ...], tuple[float, ...]]
"""The matrix, its columns, and what is left by rank."""

_MAX_SOLVED = 512


def measure_matrix(parameters: Sequence[Parameter], ranks: tuple[int, ...]) -> Measured:
    """Solve for the matrix of parameters that were mixed alike, all their sketches side by side.

    Where there are more unknowns than half the numbers, or too many to solve for, the entries are those of the
    hypothesis that the parameters passed. Backwards that are mixed alike are one column.
    """
    layouts: dict[tuple[Any, ...], list[Parameter]] = {}
    for parameter in parameters:
        if parameter.own.shape[1]:
            layouts.setdefault(parameter.layout(), []).append(parameter)
    if not layouts:
        return know_nothing(ranks)
    members = max(layouts.values(), key=lambda group: sum(p.numel for p in group))
    pool = join_parameters(members)
    blocks = {k: pool.own[:, k] for k in range(pool.own.shape[1])}
    if pool.earlier.size and members[0].verdict.shape in ("late", "different", "transformed"):
        num_earlier = pool.earlier.shape[1]
        blocks = {k - num_earlier: pool.earlier[:, k] for k in range(num_earlier)} | blocks
    num_columns = len(blocks) * len(ranks)
    num_filled = int((np.abs(pool.own).max(axis=(0, 1)) > 0).sum())
    if num_columns > _MAX_SOLVED or 2 * num_columns > num_filled:
        return _build_from_verdict(members, ranks)
    return _solve_merged(blocks, pool, ranks)


def know_nothing(ranks: tuple[int, ...]) -> Measured:
    """Return a matrix without any entry."""
    size = len(ranks)
    return np.full((size, size), math.nan), tuple((rank, 0) for rank in ranks), (math.nan,) * size


def _build_from_verdict(members: Sequence[Parameter], ranks: tuple[int, ...]) -> Measured:
    """Return the matrix of the hypothesis that was tested, with the largest residual of the parameters."""
    size = len(ranks)
    verdict = max(members, key=lambda member: member.numel).verdict
    match verdict.shape:
        case "averaged" | "summed" | "scaled":
            matrix = np.full((size, size), verdict.scale / size)
        case "local":
            matrix = np.eye(size) * verdict.scale
        case "groups":
            matrix = np.zeros((size, size))
            for group in verdict.groups:
                matrix[np.ix_(group, group)] = verdict.scale / len(group)
        case _:
            return know_nothing(ranks)
    residual = np.max([member.verdict.residual for member in members], axis=0)
    return matrix, tuple((rank, 0) for rank in ranks), tuple(float(value) for value in residual)


def _solve_merged(blocks: Mapping[int, np.ndarray], pool: Parameter, ranks: tuple[int, ...]) -> Measured:
    labels = list(blocks)
    matrix, errors, residual = _solve_blocks(list(blocks.values()), pool)
    merged = _merge_alike(matrix, errors, len(ranks), labels)
    if len(merged) < len(labels):
        joined = [np.sum([blocks[labels[k]] for k in group], axis=0) for group in merged]
        again = _solve_blocks(joined, pool)
        if (again[2] <= np.maximum(2 * residual, 5 * pool.eta)).all():
            matrix, errors, residual = again
            labels = [labels[group[0]] for group in merged]
    mean_entry = np.nansum(np.abs(matrix), axis=1).mean() / matrix.shape[1]
    with np.errstate(invalid="ignore"):
        matrix = np.where(5 * errors > mean_entry / 4, math.nan, matrix)
    columns = tuple((rank, label) for label in labels for rank in ranks)
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
