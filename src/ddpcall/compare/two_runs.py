"""Two recorded runs: the first thing that differs, in the order in which one thing causes the next."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ddpcall.compare.files import NotARecord, RecordedStep, Run
from ddpcall.compare.judge import StepJudge
from ddpcall.compare.noise import MULTIPLE, AssumedNoise, norm
from ddpcall.compare.outputs import find_first_module
from ddpcall.compare.result import OneProcessComparison, without_nan
from ddpcall.compare.steps import Step, join_ranks, join_rows

LADDER = ("parameters", "samples", "modules", "loss", "gradients", "update")
_FLOOR, _FLOOR_IN_EPS, _COARSEST = 1e-4, 64.0, 0.5
_NAMED = 5


@dataclass(frozen=True)
class Rung:
    """One thing that was compared in one step.

    Attributes:
        step: Number of the optimizer step, from 0.
        what: One of `LADDER`.
        status: same, differs, unknown (nothing could be compared).
        difference: Relative to the size in A; nan where it has no size.
        floor: What counts as a difference.
        note: What else there is to say.
    """

    step: int
    what: str
    status: str
    difference: float = math.nan
    floor: float = math.nan
    note: str = ""


@dataclass(frozen=True)
class TwoRuns:
    """What comparing found.

    Attributes:
        same: Nothing that was compared differs.
        rungs: Step after step, up to the first that differs.
        curve: By step: relative differences of parameters, loss, gradients and update; of all steps.
        message: The first difference, and why where that can be told.
        cause: As in `OneProcessComparison.cause` where loss or gradients differ, else the rung; same.
        where: The first module or parameter that differs; empty where all or none do.
        scale: Every gradient of B is so many times that of A; nan where no one number says it.
        weights: How much each rank's own gradient weighs in B; empty where that is not known.
        reference_weights: How much A weighs the same gradients.
        notes: What limits the comparison.
    """

    same: bool
    rungs: tuple[Rung, ...]
    curve: Mapping[int, Mapping[str, float]]
    message: str
    cause: str = "same"
    where: str = ""
    scale: float = math.nan
    weights: tuple[float, ...] = ()
    reference_weights: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers, lists and texts; nan as None."""
        return {"schema": 1, **without_nan(asdict(self))}


def compare_runs(a: Run, b: Run, noise: Run | None = None) -> TwoRuns:
    """Compare two records.

    Args:
        a: What is taken for right.
        b: What is asked about.
        noise: A run that must be the same as A; what differs between these is noise.

    Raises:
        NotARecord: they cannot be compared; says why.
    """
    steps = [step for step in a.steps if step in b.steps]
    if not steps:
        raise NotARecord(f"no step was recorded in both: A has {_some(a.steps)}, B has {_some(b.steps)}")
    rungs: list[Rung] = []
    curve: dict[int, dict[str, float]] = {}
    answer: TwoRuns | None = None
    random_notes: tuple[str, ...] = ()
    has_common_samples = False
    for step in steps:
        again = noise.load(step) if noise is not None and step in noise.steps else None
        pair = _StepOfTwo(step, a.load(step), b.load(step), again)
        if step == steps[0]:
            pair.check_model()
        has_common_samples |= pair.num_common > 0
        curve[step] = pair.measure_curve()
        for rung in pair.climb() if answer is None else ():
            rungs.append(rung)
            if rung.status == "differs":
                answer = pair.explain(rung)
                random_notes = pair.note_random_state()
                break
    if not has_common_samples:
        raise NotARecord(_NO_SAMPLES)
    assumed = () if noise is not None else (_ASSUMED,)
    notes = (*assumed, *random_notes, *_note_runs(a, b), *_note_rungs(rungs))
    if answer is None:
        text = f"Nothing differs in {len(steps)} steps ({_some(steps)}), within the floor of each line."
        return TwoRuns(True, tuple(rungs), curve, text, notes=notes)
    return dataclasses.replace(answer, rungs=tuple(rungs), curve=curve, notes=notes)


_NO_SAMPLES = (
    "no sample is in both runs: in no recorded step was a row of the model's inputs the same. Seed the shuffling "
    "alike, or leave it out, and give both the same data. Rows that are padded to the longest of their batch, or "
    "augmented at random, are other rows"
)

_ASSUMED = (
    "The floor is assumed, not measured. Record A once more and give that with --noise: what differs between the "
    "two counts for nothing."
)


class _StepOfTwo:
    """One step of A and of B."""

    def __init__(
        self,
        step: int,
        a: Sequence[RecordedStep],
        b: Sequence[RecordedStep],
        again: Sequence[RecordedStep] | None,
    ) -> None:
        self._step = step
        self._a, self._b = _join(a), _join(b)
        self._weights = _join_weights(a), _join_weights(b)
        self._rates = (a[0].rates, b[0].rates)
        self._random = [one.random_state for one in a], [one.random_state for one in b]
        eps = max(self._a.eps, self._b.eps)
        # Rounding grows from step to step.
        self._floor = min(_COARSEST, max(_FLOOR, _FLOOR_IN_EPS * eps) * (1 + step))
        self._again = _join(again) if again is not None else None
        self._weights_again = _join_weights(again) if again is not None else {}
        noise = AssumedNoise(self._floor, self._again)
        # The weights of ranks are asked of the run that has more of them.
        self._is_turned = len(a) > len(b)
        ranks, reference = (self._a, self._b) if self._is_turned else (self._b, self._a)
        self._num_ranks = len(ranks.losses)
        reference = _as_one(reference)
        self._judge = StepJudge(ranks, reference, noise, step)
        self._noise, self._reference, self._ranks = noise, reference, ranks
        self._samples = Counter(self._a.outputs.samples), Counter(self._b.outputs.samples)
        self.num_common = (self._samples[0] & self._samples[1]).total()

    def check_model(self) -> None:
        """Refuse another model.

        Raises:
            NotARecord: names or sizes of parameters are others.
        """
        first, second = self._a.numel, self._b.numel
        if first != second:
            other = [name for name in {**first, **second} if first.get(name) != second.get(name)]
            raise NotARecord(
                f"A and B train other models: {len(other)} of {len({**first, **second})} parameters are not in "
                f"both with the same number of elements ({_names(other)})"
            )

    def note_random_state(self) -> tuple[str, ...]:
        """Say where random numbers are drawn otherwise; of runs with as many ranks, since a rank draws its own."""
        here, there = self._random
        other = [
            name
            for name in (here[0] if len(here) == len(there) else ())
            if any(name in two and one[name] != two[name] for one, two in zip(here, there, strict=True))
        ]
        if not other:
            return ()
        return (
            f"When step {self._step} begins, the random state of {' and '.join(other)} is another in B than in A: "
            "dropout, augmentation and shuffling that draw from it are, too.",
        )

    # ---- the ladder --------------------------------------------------------------------------------------------

    def climb(self) -> Iterator[Rung]:
        """Compare one thing after the other."""
        yield self._compare_parameters()
        yield self._compare_samples()
        yield self._compare_modules()
        yield self._compare_losses()
        numbers = self._compared.parameters
        for what, kind in (("gradients", ""), ("update", "update_")):
            off = [
                name
                for name, own in numbers.items()
                if getattr(own, f"{kind}difference") > getattr(own, f"{kind}tolerance")
                and not (kind and self._is_noise(name))
            ]
            value = self.measure_curve()[what]
            yield Rung(self._step, what, "differs" if off else "same", value, self._floor, _names(off))

    def _is_noise(self, name: str) -> bool:
        """Say whether a gradient is rounding alone, of which an optimizer that normalizes makes whole updates."""
        used = self._reference.used
        share = norm(used) * math.sqrt(self._reference.numel[name] / sum(self._reference.numel.values()))
        return float(np.linalg.norm(used[name][0])) < self._floor * share

    def _compare_parameters(self) -> Rung:
        first, second = self._weights
        floor = min(self._floor, 1e-2)
        total, num_all = norm(first), sum(self._a.numel.values())
        off, worst = [], 0.0
        for name, rows in first.items():
            share = total * math.sqrt(self._a.numel[name] / num_all)
            size = max(float(np.linalg.norm(rows[0])), share, 1e-30)
            apart = float(np.linalg.norm(second[name] - rows[0], axis=1).max()) / size
            worst = max(worst, apart)
            again = self._weights_again.get(name, rows)
            noise = MULTIPLE * float(np.linalg.norm(again[0] - rows[0])) / size
            if apart > max(floor, noise):
                off.append(name)
        return Rung(self._step, "parameters", "differs" if off else "same", worst, floor, _names(off))

    def _compare_samples(self) -> Rung:
        here, there = self._samples
        if not here and not there:
            return Rung(self._step, "samples", "unknown", note="no input rows were seen")
        differs = here != there
        note = f"{self.num_common} of {here.total()} in A and of {there.total()} in B are in both"
        return Rung(self._step, "samples", "differs" if differs else "same", note=note)

    def _compare_modules(self) -> Rung:
        variants = [self._again.outputs] if self._again is not None else []
        first = find_first_module(self._b.outputs, self._a.outputs, variants, MULTIPLE, self._floor / MULTIPLE)
        if first.name is not None:
            return Rung(self._step, "modules", "differs", first.difference, self._floor, first.sentence)
        status = "same" if first.is_whole else "unknown"
        return Rung(self._step, "modules", status, math.nan, self._floor, first.sentence)

    def _compare_losses(self) -> Rung:
        first, second = (float(np.mean(one.losses)) for one in (self._a, self._b))
        if math.isnan(first) or math.isnan(second):
            return Rung(self._step, "loss", "unknown", note="no loss was seen in a call of backward()")
        apart = abs(first - second) / max(abs(first), 1e-30)
        again = first if self._again is None else float(np.mean(self._again.losses))
        floor = max(self._floor, MULTIPLE * abs(again - first) / max(abs(first), 1e-30))
        status = "differs" if apart > floor else "same"
        return Rung(self._step, "loss", status, apart, floor, f"{first:.6g} in A, {second:.6g} in B")

    @property
    def _compared(self) -> OneProcessComparison:
        if not hasattr(self, "_result"):
            self._result = self._judge.judge()
        return self._result

    def measure_curve(self) -> dict[str, float]:
        """Return how far A and B are apart in this step, relative to A."""
        used, update = self._a.used, self._a.update
        first, second = (float(np.mean(one.losses)) for one in (self._a, self._b))
        return {
            "parameters": _apart(*self._weights),
            "loss": abs(first - second) / max(abs(first), 1e-30),
            "gradients": _apart(used, self._b.used),
            "update": _apart(update, self._b.update),
        }

    # ---- why ---------------------------------------------------------------------------------------------------

    def explain(self, rung: Rung) -> TwoRuns:
        """Say what a rung that differs means."""
        result = self._compared
        cause, where, text = rung.what, rung.note, ""
        if rung.what == "parameters":
            what = "start parameters" if self._step == 0 else "parameters"
            text = f"the {what}, by up to {rung.difference:.2%} of their size: {rung.note}."
            if self._step == 0:
                text += " Seed both runs alike, or load the same checkpoint."
        elif rung.what == "samples":
            text = f"which samples were in the global batch: {rung.note}."
        elif rung.what == "modules":
            text = rung.note[:1].lower() + rung.note[1:]
            where = (
                find_first_module(self._b.outputs, self._a.outputs, [], MULTIPLE, self._floor / MULTIPLE).name
                or ""
            )
            if "Dropout" in rung.note:
                text += " Its masks are random: record both runs with dropout 0."
        else:
            value = rung.note if rung.what == "loss" else f"by {rung.difference:.2%} of the size in A"
            text, where = f"the {rung.what}, {value}.", result.where
            if rung.what != "update":
                text = f"{text} {self._say_why(result)}".rstrip()
            cause = result.cause if result.cause not in ("same", "unexplained", "module") else rung.what
            if rung.what == "update" and self._rates[0] != self._rates[1]:
                text += f" Learning rates are {_numbers(self._rates[0])} in A and {_numbers(self._rates[1])} in B."
        scale = 1 / result.scale if self._is_turned and result.scale else result.scale
        is_loss = rung.what in LADDER[3:]
        return TwoRuns(
            same=False,
            rungs=(),
            curve={},
            message=f"The first thing that differs, in step {self._step}: {text}",
            cause=cause,
            where=where,
            scale=scale if is_loss else math.nan,
            weights=result.weights if is_loss else (),
            reference_weights=result.reference_weights if is_loss else (),
        )

    def _say_why(self, result: OneProcessComparison) -> str:
        many, few = ("A", "B") if self._is_turned else ("B", "A")
        if result.cause in ("scaled", "update") and not math.isnan(result.scale):
            text = f"Every gradient of {many} is {result.scale:.4g} times that of {few}"
            if result.cause == "update":
                return f"{text}, and right after the backward they are the same: look at clipping and scaling."
            if abs(result.scale * self._num_ranks - 1) < 0.01:
                return f"{text}: a loss that is a sum over the rank's samples, averaged over ranks, does this."
            return f"{text}."
        if result.weights:
            text = f"{many} weighted its ranks {_numbers(result.weights)}"
            if result.reference_weights:
                counts = self._judge.name_counts(result.reference_weights)
                return f"{text}; {few} weights the same gradients {_numbers(result.reference_weights)}{counts}."
            return f"{text}; none give the gradients of {few}: look for what a loss computes across samples."
        if result.cause == "weighted":
            return f"The gradients of {many}'s ranks are not averaged."
        if result.cause == "some_parameters":
            return f"Not all gradients differ: {result.where} and others do, the rest agree."
        return "No one ratio of gradients and no weights of ranks explain it." if result.cause != "same" else ""


def _join(run: Sequence[RecordedStep]) -> Step:
    return join_ranks([one.record for one in run])


def _join_weights(run: Sequence[RecordedStep]) -> dict[str, np.ndarray]:
    return join_rows([one.record.sketches for one in run], [one.weights for one in run])


def _as_one(step: Step) -> Step:
    """Return the step of several ranks as one process would tell it: its own gradient is the mean of theirs."""
    own = {name: rows.mean(axis=0, keepdims=True) for name, rows in step.own.items()}
    return dataclasses.replace(step, own=own, losses=(float(np.mean(step.losses)),))


def _apart(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    difference = {name: second[name][:1] - rows[0] for name, rows in first.items() if name in second}
    return norm(difference) / max(norm(first), 1e-30)


def _note_runs(a: Run, b: Run) -> Iterator[str]:
    for which, run in (("A", a), ("B", b)):
        meta = run.meta[0]
        if meta.get("num_recorded", 0) < meta.get("num_held", 0):
            yield (
                f"{which}: {meta['num_recorded']} of {meta['num_held']} parameters of the optimizers are in the "
                f"recorded model ({meta['model']})."
            )
        if meta.get("is_compiled"):
            yield f"{which} is compiled: of its modules the last output alone was kept."
        for rank, own in enumerate(run.meta):
            if own["failure"]:
                yield f"{which}, rank {rank}: {own['failure']}."
    for what in ("torch", "python"):
        if a.meta[0][what] != b.meta[0][what]:
            yield f"A ran with {what} {a.meta[0][what]}, B with {b.meta[0][what]}."


def _note_rungs(rungs: Sequence[Rung]) -> Iterator[str]:
    for what in LADDER:
        unknown = [rung for rung in rungs if rung.what == what and rung.status == "unknown"]
        if unknown:
            yield f"In {len(unknown)} steps the {what} could not be compared. {unknown[0].note}".strip()


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _numbers(numbers: Sequence[float]) -> str:
    texts = [f"{number:.3g}" for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _some(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:_NAMED])) + (f" … {steps[-1]}" if len(steps) > _NAMED else "")
