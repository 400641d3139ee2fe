"""Shapes: what the sketches of own and used gradients say about the mixing matrix. Numpy only, no processes.

The law is `used_i = Σ W[i, j] own_j`. Whether W is the mean over ranks or this rank alone is decided by comparing
two hypotheses, never by a solve: the used gradient must lie within `tau` of the one and three times farther from
the other. Only what neither explains is solved for.

`tau` is five times `eta`, the relative rounding of a reduction, and relative to the size of the gradients that
were mixed, not to that of the result, which may be small because they cancel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

SHAPES = (
    "averaged", "summed", "scaled", "local", "partly_local", "late", "groups", "dropped", "weighted",
    "transformed", "different", "thrown_away", "unaccounted", "unidentifiable",
)  # fmt: skip

# Relative rounding of a reduction: the largest measured on four ranks, and what it grows by with the ranks' root.
_ETA = {"float64": 1e-13, "complex128": 1e-13, "float16": 1.2e-3, "bfloat16": 5e-3}
_ETA_SINGLE = 3e-7
_GROWTH = 0.2
# Below these a number loses digits: the smallest step of float16, the smallest normal number of the others, which
# devices may round to zero.
_SMALLEST = {"float16": 2.0**-24, "float64": 2.0**-1022, "complex128": 2.0**-1022}
_SMALLEST_SINGLE = 2.0**-126
COARSE = 0.02
_SAME = 1e-6  # the sketches of equal tensors differ by their own rounding at most
_FAR = 3.0
MIN_ELEMENTS = 8
TOO_FEW = "all ranks used the same gradient, which is not the mean; too few numbers to say which mixture it is"
TOO_SMALL = "too few elements to tell"
CLOSE = "the used gradient is near the mean, and off by somewhat more than rounding"
NEVER_USED = "the last backward's gradient is not in what this step used; it arrives later, or never"
VANISHED = "the gradients are too close to zero for their precision to tell"


def find_eta(dtype: str, num_ranks: int) -> float:
    """Return the relative rounding of a mean over ranks in a precision such as "float32"."""
    return _ETA.get(dtype, _ETA_SINGLE) * max(1.0, _GROWTH * math.sqrt(num_ranks))


def find_underflow(dtype: str, numel: int, size: float) -> float:
    """Return what underflow may take from a gradient, relative to its norm: such as 1.0 of float32 below 1e-38."""
    return _SMALLEST.get(dtype, _SMALLEST_SINGLE) * math.sqrt(numel) / size if size else 0.0


@dataclass(frozen=True)
class Batch:
    """Parameters that had the same columns.

    Attributes:
        used: Shape (parameters, ranks, buckets).
        own: Shape (parameters, ranks, backwards, buckets).
        eta: Shape (parameters,).
        numel: Shape (parameters,).
        carry: Shape (parameters, ranks, buckets): what lay in `.grad` before; None where nothing did.
        earlier: Shape (parameters, ranks, backwards, buckets): the window before; None where it is not known.
        captured: Backwards that never went into `.grad`.
    """

    used: np.ndarray
    own: np.ndarray
    eta: np.ndarray
    numel: np.ndarray
    carry: np.ndarray | None = None
    earlier: np.ndarray | None = None
    captured: frozenset[int] = frozenset()

    def select(self, chosen: Sequence[int] | np.ndarray) -> Batch:
        """Return some of the parameters."""
        carry = None if self.carry is None else self.carry[chosen]
        earlier = None if self.earlier is None else self.earlier[chosen]
        return Batch(
            self.used[chosen],
            self.own[chosen],
            self.eta[chosen],
            self.numel[chosen],
            carry,
            earlier,
            self.captured,
        )


@dataclass
class Verdict:
    """What one parameter's sketches say.

    Attributes:
        shape: One of `SHAPES`.
        scale: Times the mean of all ranks; of local gradients, times the own one; nan where that means nothing.
        residual: By rank: what the shape does not explain, relative to the gradients that were mixed.
        local: Backwards that are in the used gradient of their own rank alone.
        unused: Backwards that are not in it.
        rows_agree: All ranks used the same gradient.
        groups: Ranks that used the same gradient, where they differ.
        reason: What the shape's name does not say; empty where it says all.
    """

    shape: str
    scale: float = math.nan
    residual: np.ndarray = field(default_factory=lambda: np.zeros(0))
    local: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    rows_agree: bool = False
    groups: tuple[tuple[int, ...], ...] = ()
    reason: str = ""


# ---- least squares ----------------------------------------------------------------------------------------


def fit(basis: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a few vectors to a target, for many problems at once.

    Args:
        basis: Shape (..., vectors, buckets).
        target: Shape (..., buckets).

    Returns:
        The coefficients, shape (..., vectors), and what is left of the target, shape (..., buckets).
    """
    norms = np.linalg.norm(basis, axis=-1, keepdims=True)
    unit = np.divide(basis, norms, out=np.zeros_like(basis), where=norms > 0)
    if basis.shape[-2] == 1:
        coefficients = np.sum(unit[..., 0, :] * target, axis=-1, keepdims=True)
    else:
        inverse = np.linalg.pinv(np.swapaxes(unit, -1, -2), rcond=1e-7)
        coefficients = (inverse @ target[..., None])[..., 0]
    rest = target - np.sum(coefficients[..., None] * unit, axis=-2)
    sizes = norms[..., 0]
    return np.divide(coefficients, sizes, out=np.zeros_like(coefficients), where=sizes > 0), rest


@dataclass(frozen=True)
class Fit:
    """How well a hypothesis explains the used gradients: shapes (parameters, ranks, columns) and (…, ranks)."""

    coefficients: np.ndarray
    distance: np.ndarray


def _measure(used: np.ndarray, basis: np.ndarray, sizes: np.ndarray) -> Fit:
    """Fit, and relate what is left to the sizes of what was mixed (both broadcast over parameters and ranks)."""
    coefficients, rest = fit(np.broadcast_to(basis, (*used.shape[:2], *basis.shape[2:])), used)
    reference = np.sum(np.abs(coefficients) * sizes, axis=-1)
    left = np.linalg.norm(rest, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(left == 0, 0.0, left / reference)
    return Fit(coefficients, distance)


def fit_mean(batch: Batch) -> Fit:
    """Test `used = c · mean(own)`, with a coefficient for each backward and for what lay in `.grad`."""
    columns, sizes = _columns(batch)
    return _measure(batch.used, columns.mean(axis=1, keepdims=True), sizes.mean(axis=1, keepdims=True))


def fit_own(batch: Batch) -> Fit:
    """Test `used_i = c_i · own_i`."""
    return _measure(batch.used, *_columns(batch))


def _columns(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    columns = batch.own if batch.carry is None else np.concatenate([batch.own, batch.carry[:, :, None]], axis=2)
    return columns, np.linalg.norm(columns, axis=-1)


# ---- the order of judgment -------------------------------------------------------------------------------


def judge(batch: Batch) -> list[Verdict]:
    """Judge every parameter of a batch by itself: first the two hypotheses, then whatever else explains it."""
    tau = 5 * batch.eta[:, None]
    mean, own = fit_mean(batch), fit_own(batch)
    near_mean, near_own = mean.distance <= tau, own.distance <= tau
    far_mean, far_own = mean.distance > _FAR * tau, own.distance > _FAR * tau
    sizes = np.linalg.norm(batch.used, axis=-1)
    gaps = np.linalg.norm(batch.used - batch.used[:, :1], axis=-1).max(axis=1)
    largest = sizes.max(axis=1)
    agree = gaps <= _SAME * largest
    alike = gaps <= 2 * tau[:, 0] * largest
    has_own = np.abs(batch.own).max(axis=(2, 3)) > 0
    too_small = _is_too_small(batch)
    averaged = near_mean.all(axis=1) & far_own.any(axis=1) & alike
    # A rank without a gradient of its own that uses none either says nothing.
    local = (near_own.all(axis=1)) & far_mean.any(axis=1) & ~alike & (has_own & (sizes > 0)).any(axis=1)
    same = near_mean.all(axis=1) & ~far_own.any(axis=1) & alike
    verdicts: list[Verdict] = []
    for index in range(len(batch.used)):
        agreed = bool(agree[index])
        if not has_own[index].any() or largest[index] == 0:
            verdict = _judge_empty(bool(has_own[index].any()), float(largest[index]))
        elif too_small[index]:
            verdict = Verdict("unidentifiable", reason=TOO_SMALL)
        elif averaged[index]:
            verdict = _name_mean(batch.select([index]), mean.coefficients[index], mean.distance[index])
        elif local[index]:
            scale = float(np.median(own.coefficients[index, :, _last_kept(batch)]))
            verdict = Verdict("local", scale, own.distance[index], local=tuple(range(batch.own.shape[2])))
        elif same[index]:
            why = "every rank computed the same gradient: give each rank its own batch"
            verdict = Verdict("unidentifiable", reason=why, residual=mean.distance[index])
        elif alike[index] and not far_mean[index].any():
            verdict = Verdict("unidentifiable", reason=CLOSE, residual=mean.distance[index])
        else:
            verdict = explain(batch.select([index]), agreed)
        verdict.rows_agree = agreed
        verdicts.append(verdict)
    return verdicts


def judge_misfit(one: Batch) -> Verdict | None:
    """Judge one parameter that is too small to judge by a fit.

    Returns:
        A verdict where ranks used different gradients, or the same that is not the mean, nor a multiple of it;
        None where the mean is possible.
    """
    tau = 5 * float(one.eta[0])
    used, mean = one.used[0], fit_mean(one)
    gap = float(np.linalg.norm(used - used[0], axis=-1).max())
    if gap <= _FAR * tau * float(np.linalg.norm(used, axis=-1).max()):
        if (mean.distance <= _FAR * tau).all():
            verdict = _name_mean(one, mean.coefficients[0], mean.distance[0]) if one.own.shape[2] == 1 else None
            return verdict if verdict and verdict.shape == "summed" else None
        why = "all ranks used the same gradient, which is not the mean; too few elements to say more"
        return Verdict("transformed", residual=mean.distance[0], rows_agree=True, reason=why)
    own = one.own[0].sum(axis=1) + (0 if one.carry is None else one.carry[0])
    [scale], rest = fit(own.reshape(1, -1), used.reshape(-1))
    if np.linalg.norm(rest) <= tau * np.linalg.norm(used):
        distance = np.linalg.norm(rest.reshape(used.shape), axis=-1) / np.linalg.norm(used)
        return Verdict("local", float(scale), distance, local=tuple(range(one.own.shape[2])))
    return Verdict("different", residual=mean.distance[0], reason="the ranks use different gradients")


def _is_too_small(batch: Batch) -> np.ndarray:
    """Say where a perfect fit means nothing: few elements, or hardly more numbers than unknowns."""
    num_columns = batch.own.shape[2] + (batch.carry is not None)
    filled = (np.abs(batch.own).max(axis=(1, 2)) > 0).sum(axis=-1)
    return (batch.numel < MIN_ELEMENTS) | (filled < 2 * num_columns)


def _judge_empty(has_own: bool, largest: float) -> Verdict:
    if has_own:
        return Verdict("thrown_away", reason="a gradient was computed, and none was used")
    if largest > 0:
        return Verdict("unaccounted", reason="a gradient was used that no backward was seen to compute")
    return Verdict("unidentifiable", reason="no gradient")


def _last_kept(batch: Batch) -> int:
    """Return the last backward whose gradient was accumulated."""
    return max((k for k in range(batch.own.shape[2]) if k not in batch.captured), default=0)


def _name_mean(one: Batch, coefficients: np.ndarray, distance: np.ndarray) -> Verdict:
    """Name a multiple of the mean by its size; late where the last backward is not in it."""
    num_ranks, num_backwards = one.own.shape[1:3]
    sizes = np.linalg.norm(one.own[0], axis=-1).mean(axis=0)
    tau = 5 * float(one.eta[0])
    last = _last_kept(one)
    kept = _find_kept(one, np.abs(coefficients[0, :num_backwards]) * sizes)
    unused = tuple(k for k in range(num_backwards) if k not in kept)
    if last in unused and kept:
        return Verdict("late", residual=distance, unused=unused, reason=NEVER_USED)
    together = _join_backwards(one, kept)
    common = fit_mean(together) if len(kept) > 1 or unused else None
    alike = common is not None and (common.distance <= tau).all()
    scale = float(np.mean(common.coefficients[0, :, 0] if common and alike else coefficients[:, last]))
    size = float(np.linalg.norm(together.own[0, :, 0], axis=-1).mean()) if alike else sizes[last]
    mean = float(np.linalg.norm((together.own[0, :, 0] if alike else one.own[0, :, last]).mean(axis=0)))
    error = tau * size / mean if mean else math.inf
    shape = (
        "averaged" if abs(scale - 1) <= error else "summed" if abs(scale / num_ranks - 1) <= error else "scaled"
    )
    return Verdict(shape, scale, distance, unused=unused)


def _find_kept(one: Batch, parts: np.ndarray) -> list[int]:
    """Return the backwards that are in the used gradient, by the simplest explanation that holds.

    Gradients of two backwards are often almost parallel, and the coefficients of a fit then mean little: all
    alike, or the last alone, is tried first.
    """
    if len(parts) == 1:
        return [0]
    tau = 5 * float(one.eta[0])
    every = [k for k in range(len(parts)) if k not in one.captured]
    for chosen in (every, [_last_kept(one)]):
        if chosen and (fit_mean(_join_backwards(one, chosen)).distance <= tau).all():
            return chosen
    return [k for k in range(len(parts)) if parts[k] > _FAR * tau * parts.sum()]


def _join_backwards(one: Batch, chosen: Sequence[int]) -> Batch:
    """Return the batch with the sum of some backwards as its only one."""
    own = one.own[:, :, list(chosen)].sum(axis=2, keepdims=True)
    return Batch(one.used, own, one.eta, one.numel, one.carry)


def explain(one: Batch, agree: bool) -> Verdict:
    """Judge one parameter that neither hypothesis explains."""
    # What all ranks use alike is no rank's own, though a fit may say so.
    found = (None if agree else _try_backwards(one)) or _try_earlier(one)
    if found:
        return found
    if agree:
        return _try_weights(one) or _name_transformed(one)
    return _try_groups(one) or _name_different(one)


def _try_backwards(one: Batch) -> Verdict | None:
    """Each backward may be mixed by itself: into the mean, or left local."""
    num_backwards = one.own.shape[2]
    tau = 5 * float(one.eta[0])
    if num_backwards == 1 and one.carry is None:
        return None
    columns, sizes = _columns(one)
    means = np.broadcast_to(columns.mean(axis=1, keepdims=True), columns.shape)
    both = _measure(one.used, np.concatenate([means, columns], axis=2), np.concatenate([sizes, sizes], axis=2))
    if not (both.distance <= tau).all():
        return None
    weights = np.abs(both.coefficients[0]) * np.concatenate([sizes, sizes], axis=2)[0]
    weights = weights.max(axis=0) / weights.sum(axis=1).max()
    of_mean, of_own = weights[: columns.shape[2]], weights[columns.shape[2] :]
    is_mean, is_own = of_mean > _FAR * tau, of_own > _FAR * tau
    kept = [k for k in range(columns.shape[2]) if is_mean[k]]
    locals_ = [k for k in range(columns.shape[2]) if is_own[k]]
    basis = np.concatenate([means[:, :, kept], columns[:, :, locals_]], axis=2)
    if not basis.shape[2]:
        return None
    chosen = _measure(one.used, basis, np.concatenate([sizes[:, :, kept], sizes[:, :, locals_]], axis=2))
    filled = int((np.abs(one.own).max(axis=(0, 1, 2)) > 0).sum())
    if not (chosen.distance <= tau).all() or filled < 2 * basis.shape[2] or not locals_:
        return None
    local = tuple(k for k in locals_ if k < num_backwards)
    unused = tuple(k for k in range(num_backwards) if k not in kept and k not in locals_)
    shape = "partly_local" if kept else "local"
    if not local:
        why = "gradients that lay in .grad before the first backward are each rank's own"
    else:
        why = f"backward {_list(local)} of {num_backwards} is in its own rank's gradient alone"
    return Verdict(shape, residual=chosen.distance[0], local=local, unused=unused, reason=why)


def _try_earlier(one: Batch) -> Verdict | None:
    """The step may use what the step before computed."""
    used = one.used[0]
    gap = np.linalg.norm(used - used[0], axis=-1).max()
    # Ranks that use different gradients are not late together, whatever fits each of them.
    if one.earlier is None or gap > 10 * float(one.eta[0]) * np.linalg.norm(used, axis=-1).max():
        return None
    columns, sizes = _columns(one)
    all_columns = np.concatenate([columns, one.earlier], axis=2)
    all_sizes = np.concatenate([sizes, np.linalg.norm(one.earlier, axis=-1)], axis=2)
    found = _measure(one.used, all_columns.mean(axis=1, keepdims=True), all_sizes.mean(axis=1, keepdims=True))
    filled = int((np.abs(all_columns).max(axis=(0, 1, 2)) > 0).sum())
    if not (found.distance <= 5 * one.eta[0]).all() or filled < 2 * all_columns.shape[2]:
        return None
    why = "this step used gradients that the step before computed"
    return Verdict("late", residual=found.distance[0], reason=why)


def solve(columns: np.ndarray, used: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve `used = W · columns` by least squares.

    Args:
        columns: Shape (columns, numbers).
        used: Shape (ranks, numbers).
        eta: The relative rounding.

    Returns:
        W, shape (ranks, columns), nan where a column is zero; the standard error of its entries, the same shape;
        what is left by rank, relative to the gradients that were mixed.
    """
    norms = np.linalg.norm(columns, axis=1)
    kept = norms > 0
    unit = columns[kept] / norms[kept, None]
    weights, _, _, _ = np.linalg.lstsq(unit.T, used.T, rcond=max(eta, 1e-7))
    left = np.linalg.norm(used - weights.T @ unit, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        reference = np.abs(weights).sum(axis=0)
        residual = np.where(left == 0, 0.0, left / reference)
    variance = np.diag(np.linalg.pinv(unit @ unit.T, rcond=max(eta, 1e-7) ** 2, hermitian=True)).clip(0)
    spread = eta * np.linalg.norm(used, axis=1)[:, None] * np.sqrt(variance / columns.shape[1])[None]
    matrix = np.full((len(used), len(columns)), math.nan)
    errors = matrix.copy()
    matrix[:, kept] = weights.T / norms[kept]
    errors[:, kept] = spread / norms[kept]
    return matrix, errors, residual


def _solve_one(one: Batch, used: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Solve one parameter for a weight of every rank and backward; None where it has too few numbers."""
    columns = one.own[0].reshape(-1, one.own.shape[-1])
    if one.carry is not None:
        columns = np.concatenate([columns, one.carry[0].mean(axis=0, keepdims=True)])
    filled = np.abs(columns).max(axis=0) > 0
    if filled.sum() < 2 * len(columns):
        return None
    matrix, errors, residual = solve(columns, used, float(one.eta[0]))
    num_weights = one.own.shape[1] * one.own.shape[2]
    return matrix[:, :num_weights], errors[:, :num_weights], residual


def _try_weights(one: Batch) -> Verdict | None:
    """All ranks used the same mixture, with other weights than 1/N each."""
    solved = _solve_one(one, one.used[0][:1])
    if solved is None:
        return None
    matrix, errors, residual = solved
    num_ranks, num_backwards = one.own.shape[1:3]
    if residual[0] > 5 * one.eta[0]:
        return None
    weights = matrix.reshape(num_ranks, num_backwards)
    spread = 5 * errors.reshape(num_ranks, num_backwards)
    return name_weights(weights, spread, np.full(num_ranks, residual[0]))


def name_weights(weights: np.ndarray, spread: np.ndarray, residual: np.ndarray) -> Verdict:
    """Name weights that are the same in every row: shape (ranks, backwards), with what they may be off by."""
    num_ranks = len(weights)
    scale = float(np.nansum(weights, axis=0).max())
    zero = np.all(np.isnan(weights) | (np.abs(weights) <= np.maximum(spread, 1e-3 * scale / num_ranks)), axis=1)
    dropped = [rank for rank in range(num_ranks) if zero[rank] and not np.isnan(weights[rank]).all()]
    shown = "; ".join(
        f"rank {rank}: {np.nanmax(row):.3g}" for rank, row in enumerate(weights[:8]) if not np.isnan(row).all()
    )
    if dropped:
        why = f"what rank {_list(dropped)} computed is in nobody's gradient ({shown})"
        return Verdict("dropped", scale, residual, reason=why)
    return Verdict("weighted", scale, residual, reason=f"the ranks' weights are {shown}")


def _name_transformed(one: Batch) -> Verdict:
    distance = fit_mean(one).distance[0]
    if _solve_one(one, one.used[0][:1]) is None:
        return Verdict("unidentifiable", residual=distance, reason=TOO_FEW)
    why = "all ranks used the same gradient, which is no mixture of what they computed"
    return Verdict("transformed", residual=distance, reason=why)


def _try_groups(one: Batch) -> Verdict | None:
    """Ranks that use the same gradient may have averaged among themselves."""
    groups = find_groups(one.used[0])
    num_ranks = one.own.shape[1]
    if not 1 < len(groups) < num_ranks:
        return None
    tau = 5 * float(one.eta[0])
    residual, scales = np.zeros(num_ranks), []
    for group in groups:
        chosen = list(group)
        carry = None if one.carry is None else one.carry[:, chosen]
        part = Batch(one.used[:, chosen], one.own[:, chosen], one.eta, one.numel, carry, None, one.captured)
        mean = fit_mean(part)
        if not (mean.distance <= tau).all():
            return None
        if len(group) > 1 and not (fit_own(part).distance > _FAR * tau).any():
            return None
        residual[chosen] = mean.distance[0]
        scales.append(float(np.mean(mean.coefficients[0, :, _last_kept(one)])))
    why = "ranks that average among themselves alone: " + ", ".join("{" + _list(group) + "}" for group in groups)
    return Verdict("groups", float(np.mean(scales)), residual, groups=groups, reason=why)


def find_groups(used: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Return the ranks that used the same gradient; shape of `used`: (ranks, buckets)."""
    left = list(range(len(used)))
    groups = []
    while left:
        gaps = np.linalg.norm(used[left] - used[left[0]], axis=1)
        size = np.linalg.norm(used[left[0]])
        same = gaps <= _SAME * size
        groups.append(tuple(rank for rank, is_same in zip(left, same, strict=True) if is_same))
        left = [rank for rank, is_same in zip(left, same, strict=True) if not is_same]
    return tuple(groups)


def _name_different(one: Batch) -> Verdict:
    solved = _solve_one(one, one.used[0])
    distance = fit_mean(one).distance[0]
    if solved is not None and (solved[2] <= 5 * one.eta[0]).all():
        why = "every rank uses a mixture of its own"
        return Verdict("different", residual=solved[2], reason=why)
    return Verdict("different", residual=distance, reason="the ranks use different gradients")


def _list(numbers: Sequence[int] | Iterator[int]) -> str:
    return ", ".join(map(str, numbers))
