"""The judge: a step of all ranks and the same step in one process in; whether they are the same, and why not, out.

Everything is compared as sketches. How far two of them may lie apart is measured: one process takes the step again
from numbers that differ by one unit in the last place, and with the samples in another order. What that changes is
the noise; a difference counts where it exceeds `MULTIPLE` times the noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ddpcall.compare.noise import MULTIPLE, AssumedNoise, Noise, norm
from ddpcall.compare.outputs import find_first_module
from ddpcall.compare.result import OneProcessComparison, ParameterNumbers
from ddpcall.compare.samples import SampleOutputs
from ddpcall.compare.steps import Step
from ddpcall.mixing import Mixing, judge_records

BLIND = 0.5
"""Where rounding alone changes a gradient by this part of itself, nothing can be told."""

COARSE = 0.01
"""Where the tolerance is larger, a difference just above it may come from one just below it elsewhere."""

_IN_FLOAT32 = " Repeat the comparison in float32, where more can be told."
_16_BITS = 2**-7
_AS_16_BITS = (
    " Rounding to 16 bits changes as much: look for a communication hook, or another precision in which the ranks "
    "reduce."
)
_SURE_WEIGHTS = 0.02
_NOT_A_MEAN = {"local", "partly_local", "late", "groups", "dropped", "different", "thrown_away", "unaccounted"}


class StepJudge:
    """Judges one step.

    Args:
        ranks: What the ranks computed.
        reference: What one process computed.
        noise: How much of a difference means nothing.
        index: The number of the step.
    """

    def __init__(self, ranks: Step, reference: Step, noise: Noise | AssumedNoise, index: int = 0) -> None:
        self._ranks = ranks
        self._reference = reference
        self._noise = noise
        self._index = index
        self._names = [name for name in reference.names if name in ranks.used]
        self._allowed = noise.measure_tolerance(reference, {n: reference.used[n] for n in self._names}, "used")
        self._allowed_update = noise.measure_tolerance(reference, reference.update, "update")

    def judge(self) -> OneProcessComparison:
        """Return the comparison."""
        if trouble := self._find_trouble():
            return self._say("unexplained", trouble)
        numbers = self._measure_parameters()
        off = [name for name in self._names if numbers[name].difference > numbers[name].tolerance]
        if off:
            return self._explain(off)
        updated = [name for name, n in numbers.items() if n.update_difference > n.update_tolerance]
        if updated:
            return self._explain_update(updated)
        if self._find_other_weights():
            return self._say("unexplained", "The gradients agree, and the ranks do not train one model.")
        return self._say("same", self._describe_sameness())

    # ---- numbers -----------------------------------------------------------------------------------------------

    def _find_trouble(self) -> str:
        ranks, reference = self._ranks, self._reference
        if failure := ranks.failure or reference.failure:
            return f"Measuring failed: {failure}."
        if missing := sorted(set(reference.names) ^ set(ranks.names)):
            return (
                f"Parameters of one process and of the ranks do not have the same names: {_name_some(missing)}. "
                "They are aligned by name: wrap() must keep the names that the model gives them."
            )
        if not (ranks.is_finite and reference.is_finite):
            return "Gradients are inf or nan, on the ranks or in one process."
        if not norm(reference.used):
            return "In one process every gradient is zero: there is nothing to compare."
        if self._noise.is_unsteady(reference):
            return (
                "The step draws random numbers that no seed decides (a generator of its own, the clock, data in "
                "another order): one process that takes it twice, from the same random state, computes two "
                "gradients. Make the step deterministic for this comparison."
            )
        if self._relative_tolerance() > BLIND:
            return (
                f"Nothing can be told: a change of one unit in the last place alone changes the gradient of one "
                f"process by {self._relative_tolerance() / MULTIPLE:.0%} of itself.{_IN_FLOAT32}"
            )
        return ""

    def _relative_tolerance(self) -> float:
        total = norm({name: self._reference.used[name] for name in self._names})
        return math.sqrt(sum(value**2 for value in self._allowed.values())) / total if total else math.nan

    def _measure_parameters(self) -> dict[str, ParameterNumbers]:
        numbers = {}
        for name in self._names:
            reference, used = self._reference.used[name][0], self._ranks.used[name]
            size = float(np.linalg.norm(reference)) or 1.0
            updates = (math.nan, math.nan)
            if name in self._reference.update and name in self._ranks.update:
                update = self._reference.update[name][0]
                update_size = float(np.linalg.norm(update)) or 1.0
                apart = _farthest(self._ranks.update[name], update)
                updates = (apart / update_size, self._allowed_update[name] / update_size)
            farthest = used[int(np.argmax(np.linalg.norm(used - reference, axis=1)))]
            numbers[name] = ParameterNumbers(
                _farthest(used, reference) / size,
                self._allowed[name] / size,
                float(farthest @ reference) / size**2,
                *updates,
            )
        return numbers

    def _say(self, cause: str, message: str, **more: object) -> OneProcessComparison:
        notes = [message]
        if cause != "same" and (apart := self._find_other_weights()):
            notes.append(f"The ranks do not hold the same weights before the step: {_name_some(apart)}.")
        if self._ranks.num_dropouts or self._reference.num_dropouts:
            notes.append("The comparison was made without dropout.")
        if self._noise.order_matters(self._reference):
            notes.append("The order of the samples matters to this step, so it was not used for the tolerance.")
        losses = (float(np.mean(self._ranks.losses)), self._reference.losses[0])
        return OneProcessComparison(
            same=cause == "same",
            cause=cause,
            message=" ".join(notes),
            step=self._index,
            tolerance=self._relative_tolerance() if self._names else math.nan,
            loss=losses[0],
            reference_loss=losses[1],
            parameters=self._measure_parameters(),
            **more,  # pyright: ignore[reportArgumentType]
        )

    def _find_other_weights(self) -> list[str]:
        """Return the parameters that are whole on every rank, and other numbers there, before the step."""
        first, *others = self._ranks.records
        return [
            name
            for place, name in enumerate(first.names)
            if not first.weight_parts[place]
            and any(one.before[one.names.index(name)] != first.before[place] for one in others)
        ]

    def _describe_sameness(self) -> str:
        num_ranks = len(self._ranks.losses)
        what = "gradients and updates" if self._reference.update else "gradients"
        text = (
            f"{num_ranks} ranks computed what one process does: the {what} of {len(self._names)} parameters agree "
            f"within {self._relative_tolerance():.1e} of their size, {MULTIPLE:g} times what rounding changes."
        )
        if self._relative_tolerance() > COARSE:
            text += " Smaller differences cannot be seen in this precision." + _IN_FLOAT32
        loss, reference = float(np.mean(self._ranks.losses)), self._reference.losses[0]
        seen = [abs(step.losses[0] - reference) for step in self._noise.counted(self._reference)]
        if abs(loss - reference) > MULTIPLE * max([*seen, self._reference.eps * abs(reference)]):
            text += (
                f" What step returned is not the same: {loss:.6g} in the mean of the ranks, {reference:.6g} in "
                "one process. That trains nothing wrongly, but a curve of it differs."
            )
        return text

    # ---- why ---------------------------------------------------------------------------------------------------

    def _explain(self, off: list[str]) -> OneProcessComparison:
        mixing = judge_records(self._ranks.records) if len(self._ranks.records) > 1 else None
        if mixing is not None and mixing.shape in _NOT_A_MEAN and not _is_one_replica(self._ranks):
            return self._explain_mixing(mixing, off)
        first = find_first_module(
            self._ranks.outputs, self._reference.outputs, self._outputs_of_variants(), MULTIPLE
        )
        if self._noise.is_random(self._reference):
            return self._say(
                "unexplained",
                "The step draws random numbers, and with others one process computes another gradient: ranks "
                "cannot be expected to compute the same. Make the step deterministic for this comparison (dropout "
                "is left out already, except in recurrent layers).",
            )
        if first.name is not None:
            told = first.sentence
            if self._ranks.eps != self._reference.eps:
                told += (
                    f" Its ranks compute to {self._ranks.eps:.1e} of a number, one process to "
                    f"{self._reference.eps:.1e}: this is another precision."
                )
            return self._say("module", told, where=first.name or "the model itself")
        if (scale := self._fit_scale()) is not None:
            return self._explain_scale(scale, mixing)
        weights = None
        for by_backward in (False, True) if self._num_backwards() > 1 else (False,):
            fit = self._fit_weights(self._ranks.used, by_backward)
            reference = self._fit_weights(self._reference.used, by_backward)
            if fit is not None and reference is not None:
                return self._explain_weights(fit, reference)
            weights = weights or fit
        if self._relative_tolerance() > COARSE and self._exceed(off) < 3:
            return self._say(
                "unexplained",
                f"The gradients of {_name_some(off)} differ by up to {self._exceed(off):.1f} times what counts as "
                f"a difference, too little to tell why in this precision.{_IN_FLOAT32}",
                where=off[0],
            )
        if len(off) < len(self._names):
            return self._explain_some(off)
        if weights is not None and first.is_whole:
            return self._say(
                "loss",
                "The modules compute the same for every sample, and the ranks' gradients are averaged with the "
                f"weights {_list_numbers(weights)}; the loss of the whole batch is no weighted mean of its "
                "shares' losses. Look for what a loss computes across samples: negatives in a contrastive loss, a "
                "gather that lets no gradient through, a count or a statistic of the rank's share alone.",
                weights=weights,
            )
        told = first.sentence or "the modules compute the same for every sample"
        return self._say(
            "unexplained",
            f"All gradients differ, by up to {self._largest(off):.2g} times their size, and it cannot be told "
            f"why: no one ratio and no weights of the ranks explain it; {told[:1].lower()}{told[1:].rstrip('.')}."
            f"{self._tell_first_backward()}{_AS_16_BITS if self._largest(off) < _16_BITS else ''}",
            where=off[0],
        )

    def _outputs_of_variants(self) -> list[SampleOutputs]:
        return [step.outputs for step in self._noise.counted(self._reference)]

    def _exceed(self, names: Sequence[str]) -> float:
        numbers = self._measure_parameters()
        return max(numbers[name].difference / numbers[name].tolerance for name in names)

    def _largest(self, names: Sequence[str]) -> float:
        return max(self._measure_parameters()[name].difference for name in names)

    def _explain_mixing(self, mixing: Mixing, off: list[str]) -> OneProcessComparison:
        if len(off) == len(self._names):
            later = "whether they average their weights afterwards, as in local SGD, is not compared"
            return self._say("weighted", f"The ranks' gradients are not averaged; {later}. {mixing}")
        told = f"The gradients of some parameters are not averaged: {_name_some(off)}. The others agree. {mixing}"
        return self._say("some_parameters", told, where=off[0])

    def _explain_scale(self, scale: float, mixing: Mixing | None) -> OneProcessComparison:
        """Say where a factor arises: in the loss, in the reduction, or after it."""
        num_ranks = len(self._ranks.losses)
        is_loss_same, after_alone = self._is_own_same()
        text = f"Every gradient is {scale:.4g} times that of one process"
        if is_loss_same and abs(after_alone - 1) > 1e-3:
            after = scale * after_alone
            return self._say(
                "update",
                f"{text}. Before the ranks' gradients are put together they are the same; after the backward "
                f"one process multiplies by {after_alone:.4g} and the ranks by {after:.4g}: clipping by a norm "
                "that is not the whole gradient's does this.",
                scale=scale,
            )
        if is_loss_same and mixing is not None and mixing.shape == "summed":
            why = f"the ranks' gradients are summed; divide by the number of ranks, {num_ranks}"
        elif is_loss_same:
            why = f"the mean of the ranks' gradients is right, and is multiplied by {scale:.4g} afterwards"
        elif abs(scale * num_ranks - 1) < 0.01:
            why = (
                f"the loss is a sum over the samples, and the ranks' gradients are averaged. Multiply the loss by "
                f"the number of ranks, {num_ranks}, or take the mean over the samples"
            )
        elif abs(scale - num_ranks) < 0.01 * num_ranks:
            why = (
                f"each rank's loss is {num_ranks} times what it should be. It is multiplied by the number of "
                "ranks, divided by too small a count of samples or tokens, or not divided by the number of "
                "micro-batches"
            )
        else:
            why = "the loss of a rank is so many times what its share of the batch contributes"
        return self._say("scaled", f"{text}: {why}.", scale=scale)

    def _is_own_same(self) -> tuple[bool, float]:
        """Say whether gradients agree right after the backwards, and by what one process then multiplies them."""
        own = {name: self._ranks.own[name].sum(axis=1).mean(axis=0) for name in self._names}
        alone = {name: self._reference.own[name][0].sum(axis=0) for name in self._names}
        after = _fit_one(self._reference.used, alone)
        slack = 1 / min(1.0, max(abs(after), 1e-6))
        return all(np.linalg.norm(own[n] - alone[n]) <= slack * self._allowed[n] for n in alone), after

    def _num_backwards(self) -> int:
        return max(rows.shape[1] for rows in self._ranks.own.values())

    def _tell_first_backward(self) -> str:
        """Say from which micro-batch on the mean of the ranks' gradients is not that of one process."""
        alone = self._reference.own
        if self._num_backwards() < 2 or any(alone[n].shape[1] != self._ranks.own[n].shape[1] for n in self._names):
            return ""
        for backward in range(self._num_backwards()):
            apart = {n: self._ranks.own[n][:, backward].mean(axis=0) - alone[n][0, backward] for n in self._names}
            if any(float(np.linalg.norm(apart[n])) > self._allowed[n] for n in self._names):
                return f" They differ from micro-batch {backward + 1} on; those before agree." if backward else ""
        return ""

    def _explain_weights(self, weights: tuple[float, ...], reference: tuple[float, ...]) -> OneProcessComparison:
        what = "Ranks" if len(weights) == len(self._ranks.losses) else "Micro-batches, rank by rank,"
        weighted = f"{what} were weighted {_list_numbers(weights)}"
        text = f"{weighted}; the whole batch weights them {_list_numbers(reference)}"
        is_loss_same, after = self._is_own_same()
        if is_loss_same:
            text = (
                f"{text}. Before the ranks' gradients are put together they are the same; after the backward one "
                f"process multiplies by {after:.4g}, and every rank by a number of its own before the reduction: "
                "clipping a rank's own gradient does this. Clip what the ranks have averaged."
            )
        else:
            text += (
                f"{self.name_counts(reference)}. Divide each rank's sum by the count of the whole batch, times "
                "the number of ranks, instead of taking the mean over its share."
            )
        cause = "update" if is_loss_same else "weighted"
        return self._say(cause, text, weights=weights, reference_weights=reference)

    def name_counts(self, reference: Sequence[float]) -> str:
        """Name the counts that are in the ratio of the weights; empty where none are."""
        shares = np.array(reference) / sum(reference)
        targets = self._ranks.num_targets
        of_backwards = [count for own in targets for count in own]
        of_ranks = [sum(own) for own in targets]
        for what, counts in (
            ("target tokens", of_ranks),
            ("target tokens", of_backwards),
            ("samples", self._ranks.num_samples),
        ):
            if len(counts) != len(shares) or not all(counts):
                continue
            if np.abs(np.array(counts) / sum(counts) - shares).max() < _SURE_WEIGHTS:
                return f", as their numbers of {what} {_list(counts)} do"
        return ""

    def _explain_some(self, off: list[str]) -> OneProcessComparison:
        numbers = self._measure_parameters()
        ratios = [numbers[name].ratio for name in off]
        alike = max(ratios) - min(ratios) < 0.01 * abs(ratios[0])
        are = f"they are {ratios[0]:.4g} times those of one process" if alike else "no one ratio explains them"
        return self._say(
            "some_parameters",
            f"The gradients of {len(off)} of {len(self._names)} parameters differ from those of one process, and "
            f"{are}: {_name_some(off)}. The others agree. Look for what these are left out of: the wrapper's "
            "parameters, a plan of tensor parallelism, a reduction by hand, one of several losses.",
            where=off[0],
            scale=ratios[0] if alike else math.nan,
        )

    def _explain_update(self, updated: list[str]) -> OneProcessComparison:
        numbers = self._measure_parameters()
        worst = max(numbers[name].update_difference for name in updated)
        if self._relative_tolerance() > COARSE and len(updated) < len(self._names):
            return self._say(
                "unexplained",
                f"The gradients agree within {self._relative_tolerance():.0%}, which is coarse, and the updates "
                f"of {_name_some(updated)} differ by up to {worst:.1%} of their size. Optimizers that normalize, "
                f"such as Adam, enlarge small differences of gradients, so it cannot be told why.{_IN_FLOAT32}",
                where=updated[0],
            )
        return self._say(
            "update",
            f"The gradients agree, and what the optimizer adds does not, by up to {worst:.1%} of its size: "
            f"{_name_some(updated)}. Look for what the optimizer makes of a gradient: learning rates and options "
            "that depend on the rank, the number of ranks or a parameter's name, and state of its own.",
            where=updated[0],
        )

    # ---- fits --------------------------------------------------------------------------------------------------

    def _fit_scale(self) -> float | None:
        """Return the ratio that explains every gradient, if one does."""
        scale = _fit_one(self._ranks.used, {name: self._reference.used[name][0] for name in self._names})
        slack = 2 * max(1.0, abs(scale))
        fits = all(
            _farthest(self._ranks.used[name], scale * self._reference.used[name][0]) <= slack * self._allowed[name]
            for name in self._names
        )
        is_difference = abs(scale - 1) > self._relative_tolerance()
        return scale if fits and is_difference else None

    def _fit_weights(self, used: Mapping[str, np.ndarray], by_backward: bool = False) -> tuple[float, ...] | None:
        """Return the weights of the ranks' own gradients that explain every gradient, if some do and are sure.

        Args:
            used: By parameter; of the ranks, that of rank 0.
            by_backward: A weight for every micro-batch of a rank.
        """
        own = {name: rows.sum(axis=1) for name, rows in self._ranks.own.items()}
        if by_backward:
            own = {name: rows.reshape(-1, rows.shape[2]) for name, rows in self._ranks.own.items()}
            if len({len(rows) for rows in own.values()}) > 1:
                return None
        # In units of what a number of a sketch may be off.
        unit = {name: self._allowed[name] / math.sqrt(own[name].shape[1]) for name in self._names}
        columns = np.concatenate([own[name] / unit[name] for name in self._names], axis=1).T
        target = np.concatenate([used[name][0] / unit[name] for name in self._names])
        weights, _, rank, _ = np.linalg.lstsq(columns, target, rcond=None)
        if rank < columns.shape[1]:
            return None
        errors = np.sqrt(np.diag(np.linalg.inv(columns.T @ columns)))
        slack = 2 * max(1.0, float(np.abs(weights).sum()))
        fits = all(
            _farthest(used[name], weights @ own[name]) <= slack * self._allowed[name] for name in self._names
        )
        is_sure = bool((errors < _SURE_WEIGHTS * max(1e-30, float(np.abs(weights).max()))).all())
        return tuple(float(weight) for weight in weights) if fits and is_sure else None


def _is_one_replica(step: Step) -> bool:
    """Say whether ranks compute one replica together, as in tensor parallelism."""
    return any(len(unit) > 1 for record in step.records for unit in record.own_unit)


def _farthest(rows: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(rows - reference, axis=1).max())


def _fit_one(used: Mapping[str, np.ndarray], of: Mapping[str, np.ndarray]) -> float:
    """Return the ratio of gradients that comes nearest; of what ranks used, that of rank 0."""
    product = sum(float(used[name][0] @ row) for name, row in of.items())
    size = sum(float(row @ row) for row in of.values())
    return product / size if size else math.nan


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _list(items: Sequence[object]) -> str:
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _list_numbers(numbers: Sequence[float]) -> str:
    return _list([f"{number:.2f}" for number in numbers])
