"""The judge: the records of all ranks in, the mixing matrix and its shape out. No communication."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ddpcall.mixing.matrix import know_nothing, measure_matrix
from ddpcall.mixing.parameters import Parameter, find_unshared, gather_parameters, join_parameters
from ddpcall.mixing.record import FOREIGN, NO_GRADIENT, NOT_FINITE, PRESENT, UNREAD, RankSketches
from ddpcall.mixing.result import Mixing, name_some
from ddpcall.mixing.shapes import (
    COARSE,
    MIN_ELEMENTS,
    TOO_FEW,
    TOO_SMALL,
    VANISHED,
    Batch,
    Verdict,
    judge,
    judge_misfit,
)

_POOLED_BELOW = 64
# What is told first where parameters differ.
_ORDER = (
    "different", "groups", "thrown_away", "dropped", "late", "local", "partly_local", "weighted", "unaccounted",
    "transformed", "summed", "scaled", "averaged", "unidentifiable",
)  # fmt: skip
_MIXED_ALIKE = {"averaged", "summed", "scaled", "transformed", "weighted"}
_FOLLOWED = ("averaged", "summed", "scaled", "local")
_WEIGHTS = {
    "equal": "the weights are equal on all ranks before and after the step",
    "averaged": "the weights are equal again after the step: the script averages them",
    "parted": "the weights were equal before the step and differ after it",
    "different": "the weights differed before the step already",
}


def judge_records(records: Sequence[RankSketches]) -> Mixing:
    """Judge one step.

    Args:
        records: One a rank. Ranks that took no step are not compared.

    Raises:
        ValueError: fewer than two ranks took a step.
    """
    failures: dict[str, list[int]] = {}
    for record in records:
        if record.failure:
            failures.setdefault(record.failure, []).append(record.rank)
    if failures:
        said = "; ".join(f"{_name_ranks(ranks)}: {failure}" for failure, ranks in failures.items())
        return _give_up(f"measuring failed, and the training went on without it ({said})", records)
    stepped = [record for record in records if record.num_steps]
    if len(stepped) < 2:
        raise ValueError("a mixing matrix needs two ranks that took a step")
    parameters = gather_parameters(stepped)
    _judge_by_layout([p for p in parameters if not _is_settled(p)])
    _adopt_small(parameters)
    _judge_pools(parameters)
    _judge_misfits(parameters)
    _doubt_copies(parameters)
    ranks = tuple(record.rank for record in stepped)
    mixing = _put_together(parameters, ranks)
    extra = [mixing.reason] if mixing.reason else []
    if missing := sorted({record.rank for record in records} - set(ranks)):
        extra.append(f"{_name_ranks(missing)} took no step and {'are' if len(missing) > 1 else 'is'} not compared")
    behind = [record.rank for record in records if record.is_waiting and not record.num_steps]
    if behind and mixing.shape == "transformed":
        # What they computed is in what the others used, and their weights stay what they were.
        mixing = replace(mixing, shape="different")
        extra = [f"{_name_ranks(behind)} computed gradients and took no step: the replicas part"]
    if elsewhere := find_unshared(stepped):
        extra.append(f"on some ranks alone, and not compared: {name_some(elsewhere)}")
    return replace(mixing, reason="; ".join(extra))


def _give_up(reason: str, records: Sequence[RankSketches]) -> Mixing:
    ranks = tuple(record.rank for record in records)
    matrix, columns, residual = know_nothing(ranks)
    return Mixing(matrix, columns, math.nan, residual, "unidentifiable", {}, reason, len(ranks), ranks)


def _name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _is_settled(parameter: Parameter) -> bool:
    """Settle what needs no numbers: skipped steps, and gradients that are not there."""
    states = set(parameter.states)
    if len(set(parameter.num_steps) - {0}) > 1:
        reason = "the ranks took different numbers of steps, which do not belong together: measure one step"
        parameter.verdict = Verdict("unidentifiable", reason=reason)
    elif NOT_FINITE in states:
        parameter.verdict = Verdict("unidentifiable", reason="the gradients were not finite")
    elif len(states & {NO_GRADIENT, UNREAD}) and PRESENT in states and _is_alone(parameter):
        parameter.verdict = Verdict("different", reason="some ranks used no gradient")
    elif not parameter.own.shape[1]:
        used = parameter.used.any()
        why = "a gradient was used that no backward was seen to compute" if used else "no gradient"
        parameter.verdict = Verdict("unaccounted" if used else "unidentifiable", reason=why)
    elif parameter.eta > COARSE:
        parameter.verdict = Verdict("unidentifiable", reason=VANISHED)
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
    """Judge parameters that say nothing alone together: their sketches side by side."""
    pools: dict[tuple[Any, ...], list[Parameter]] = {}
    for parameter in parameters:
        reason = parameter.verdict.reason
        is_silent = reason == TOO_FEW or (reason == TOO_SMALL and parameter.numel < _POOLED_BELOW)
        is_whole = set(parameter.states) <= {PRESENT, FOREIGN}
        if is_silent and is_whole and parameter.used.any() and parameter.own.any():
            pools.setdefault((*parameter.layout(), parameter.eta, reason), []).append(parameter)
    for key, members in pools.items():
        if len(members) < 2 or sum(member.numel for member in members) < MIN_ELEMENTS:
            continue
        [verdict] = judge(_make_batch([join_parameters(members)]))
        # Of small ones, anything else may mean no more than that they are not mixed alike.
        if verdict.shape in _FOLLOWED or key[-1] == TOO_FEW:
            for member in members:
                member.verdict = verdict


def _adopt_small(parameters: Sequence[Parameter]) -> None:
    """Let parameters that are too small to judge follow the others, where what most of them do explains them."""
    judged = [p for p in parameters if p.verdict.shape in _FOLLOWED]
    if not judged:
        return
    most = max(judged, key=lambda p: p.numel).verdict
    for parameter in parameters:
        if parameter.verdict.reason != TOO_SMALL or not parameter.own.any() or not parameter.used.any():
            continue
        own = parameter.own.sum(axis=1)
        mixed = own if most.shape == "local" else np.broadcast_to(own.mean(axis=0), own.shape)
        sizes = np.linalg.norm(own, axis=1) + np.linalg.norm(parameter.carry, axis=1)
        rest = parameter.used - most.scale * (mixed + parameter.carry)
        distance = np.linalg.norm(rest, axis=1) / (abs(most.scale) * sizes.mean())
        if (distance <= 5 * parameter.eta).all():
            parameter.verdict = replace(most, residual=distance)


def _judge_misfits(parameters: Sequence[Parameter]) -> None:
    """Judge small parameters by what cannot be: with few elements a fit means nothing, and a misfit does."""
    if {p.verdict.shape for p in parameters} - _MIXED_ALIKE - {"unidentifiable"}:
        return  # larger ones say what is wrong, and small ones may have been mixed as those were
    for parameter in parameters:
        is_open = parameter.verdict.shape == "unidentifiable" and parameter.verdict.reason == TOO_SMALL
        if is_open and parameter.weights != "different" and set(parameter.states) <= {PRESENT, FOREIGN}:
            parameter.verdict = judge_misfit(_make_batch([parameter])) or parameter.verdict


def _doubt_copies(parameters: Sequence[Parameter]) -> None:
    """Take back what is said of copies that an optimizer holds, unless numbers show whose they are."""
    for parameter in parameters:
        if FOREIGN in parameter.states and parameter.verdict.shape not in _FOLLOWED:
            parameter.verdict = Verdict("unaccounted", reason="the optimizer holds copies of the parameters")


def _put_together(parameters: Sequence[Parameter], ranks: tuple[int, ...]) -> Mixing:
    by_shape: dict[str, list[Parameter]] = {}
    weights: dict[str, list[str]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.verdict.shape, []).append(parameter)
        kind = parameter.weights
        if kind == "equal" and not parameter.verdict.rows_agree and parameter.verdict.shape not in _MIXED_ALIKE:
            kind = "averaged" if parameter.used.any() else kind
        weights.setdefault("equal" if kind == "unmoved" else kind, []).append(parameter.name)
    told = {name: group for name, group in by_shape.items() if name != "unidentifiable"} or by_shape
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


def _give_reason(
    told: Mapping[str, Sequence[Parameter]],
    shape: str,
    weights: Mapping[str, Sequence[str]],
) -> str:
    reasons = []
    group = told.get(shape, [])
    given: Counter[str] = Counter()  # what is said of most elements is said of the step
    for parameter in group:
        given[parameter.verdict.reason] += parameter.numel
    if reason := max(filter(None, given), key=given.__getitem__, default=""):
        reasons.append(reason)
    elif not group and told:
        parts = [f"{name}: {len(its)} of {sum(map(len, told.values()))} parameters" for name, its in told.items()]
        reasons.append(", ".join(parts))
    if shape == "partly_local" and "different" in weights and len(weights) > 1:
        # A bypass that began earlier looks like experts, which are meant: their names let the reader tell.
        names = name_some(weights["different"])
        reasons.append(f"these weights differed before the step, which is right for a rank's own experts: {names}")
    elif shape not in _MIXED_ALIKE:
        kinds = [kind for kind in weights if kind != "equal" and not (kind == "averaged" and len(weights) > 1)]
        reasons += [_WEIGHTS[kind] for kind in kinds]
    return "; ".join(reasons)
