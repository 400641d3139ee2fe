"""The mixing probe: whose gradients does each rank's optimizer use, and how much of each?"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.optim import Optimizer

from ddpcall.evidence import MixingEvidence
from ddpcall.mixing import MixingCollector, RankSketches, judge_records
from ddpcall.probes.probe import Observer, Probe, Setting

NUM_MEASURED = 2


class MixingObserver(Observer):
    """Keeps this rank's sketches of a trial's last steps; the ranks' are judged together by `judge_steps`."""

    def __init__(self, collector: MixingCollector, first: int) -> None:
        self._collector = collector
        self._first = first
        self._records: list[RankSketches] = []

    def begin_step(self, step: int) -> None:
        """Put the hooks on, before the first step that is measured."""
        if step == self._first:
            self._collector.start()

    def end_step(self, step: int) -> None:
        """Keep what this step's optimizer used."""
        if step >= self._first:
            self._records.append(self._collector.take())

    def evidence(self) -> tuple[RankSketches, ...]:
        """Return a record for each measured step."""
        return tuple(self._records)


@contextmanager
def observe_mixing(model: nn.Module, optimizer: Optimizer, num_steps: int) -> Generator[MixingObserver]:
    """Sketch own and used gradients in the last steps of a trial.

    Args:
        model: The inner module, wrapped already.
        optimizer: The optimizer that steps its parameters.
        num_steps: Steps of the trial.

    Yields:
        The observer. It puts hooks on the parameters and the optimizer for the steps that it measures, and runs
        no collective.

    Blind to: the steps before; whether the mean over ranks is what was meant.
    """
    collector = MixingCollector.of_model(model, optimizer)
    try:
        yield MixingObserver(collector, max(0, num_steps - NUM_MEASURED))
    finally:
        collector.stop()


def judge_steps(ranks: Sequence[Sequence[RankSketches]], num_steps: int) -> MixingEvidence | None:
    """Judge the measured steps by what all ranks kept of them.

    Args:
        ranks: The records of each rank; a rank without a batch has none for the last steps.
        num_steps: Steps of the trial.

    Returns:
        The evidence, with the matrix of the first step that is not the mean, or else of the last; None where no
        two ranks took a step.
    """
    first = max(0, num_steps - NUM_MEASURED)
    mixings = []
    for step, records in enumerate(zip(*ranks, strict=True), first):
        if sum(record.num_steps > 0 for record in records) > 1:
            mixings.append((step, judge_records(records)))
    if not mixings:
        return None
    step, shown = next(((step, mixing) for step, mixing in mixings if mixing.shape != "averaged"), mixings[-1])
    plain = shown.to_json()
    return MixingEvidence(
        steps=tuple(step for step, _ in mixings),
        shapes=tuple(mixing.shape for _, mixing in mixings),
        step=step,
        matrix=tuple(tuple(row) for row in plain["matrix"]),
        ranks=shown.ranks,
        columns=shown.columns,
        scale=plain["scale"],
        residual=tuple(plain["residual"]),
        by_parameter={shape: tuple(names) for shape, names in shown.by_parameter.items()},
        reason=shown.reason,
        explanation=shown.explain(),
    )


def _observe(setting: Setting) -> AbstractContextManager[MixingObserver] | None:
    subject = setting.subject
    model = subject.wrapped if setting.spec.flat_parameters else subject.inner
    return None if setting.group is None else observe_mixing(model, setting.optimizer, setting.steps)


def _merge(ranks: Sequence[Sequence[RankSketches] | None], num_steps: int) -> MixingEvidence | None:
    records = [records for records in ranks if records is not None]
    return judge_steps(records, num_steps) if len(records) == len(ranks) else None


PROBE = Probe(name="mixing", observe=_observe, merge=_merge)
