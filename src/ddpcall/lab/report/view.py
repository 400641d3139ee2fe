"""The view model: everything the report shows, in plain values, before it looks like anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ddpcall
from ddpcall.lab.records import ComparisonRecord, RunRecord
from ddpcall.lab.report.answer import answer, status
from ddpcall.lab.report.compare import Comparison, compare_runs, name_runs
from ddpcall.lab.report.final_models import FinalModels, collect_final_models
from ddpcall.lab.report.load_watch import WatchRecord
from ddpcall.lab.report.mixing import MixingPictures, build_pictures
from ddpcall.lab.report.modes import Modes, build_modes
from ddpcall.lab.report.repeat import repeat_command
from ddpcall.lab.report.series import Plot, plot_columns, plot_ranks
from ddpcall.lab.report.timeline import Timelines, build_timelines
from ddpcall.lab.report.truth import (
    FailedExpectation,
    TruthTable,
    VerdictCell,
    build_table,
    collect_failures,
    judge_comparison,
)
from ddpcall.lab.report.watched import WatchView, view_watch

SCHEMA = 2


@dataclass(frozen=True)
class ComparisonRow:
    """One comparison with one process.

    Attributes:
        label: Case and wrapper.
        about: What the step does.
        expected: The cause that was expected.
        found: The cause that was found, with its color; what was expected instead, where it is another.
        message: What there is to say of it.
    """

    label: str
    about: str
    expected: str
    found: VerdictCell
    message: str

    @staticmethod
    def of(record: ComparisonRecord) -> ComparisonRow:
        """Return the row of a comparison."""
        said, _, _ = record.message.partition("\n")  # a matrix may follow
        return ComparisonRow(record.label, record.about, record.expected, judge_comparison(record), said)


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One lab run.

    Attributes:
        name: What tells it from the other runs of the report; the experiment where it is alone.
        experiment: The experiment's name.
        question: What it asks.
        answer: The answer in one sentence, computed from the verdicts.
        status: Tone and sentence: how it ended.
        reason: Why it did not end well; empty otherwise.
        stacks: Rank and Python stack, where the run was cut.
        failures: Trials that are not as expected.
        comparisons: With one process, those first that are not as expected.
        table: The truth table; None where nothing was measured.
        mixing: Who learned from whom; None where it was not measured.
        final_models: How good the trained models are.
        distance: Parameter distance between ranks by step; None where it was not measured.
        accuracy: Accuracy of each rank's model by step, one plot for each different picture.
        timelines: The measured steps.
        modes: Batch norm and dropout.
        environment: Name and value.
        command: The command to repeat it; empty where the command line is not known.
        left_out: Pairs that make no sense, with reasons.
        problems: What could not be read.
    """

    name: str
    experiment: str
    question: str
    answer: str
    status: tuple[str, str]
    reason: str
    stacks: tuple[tuple[str, str], ...]
    failures: tuple[FailedExpectation, ...]
    comparisons: tuple[ComparisonRow, ...]
    table: TruthTable | None
    mixing: MixingPictures | None
    final_models: tuple[FinalModels, ...]
    distance: Plot | None
    accuracy: tuple[Plot, ...]
    timelines: Timelines | None
    modes: Modes | None
    environment: tuple[tuple[str, str], ...]
    command: str
    left_out: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ReportView:
    """A whole report.

    Attributes:
        schema: Version of this model, as `--format json` writes it.
        ddpcall: The version that made it.
        title: For the window.
        comparison: What tells the runs apart; None for one run.
        runs: Lab runs, in the order given.
        watches: Watched runs, likewise.
        problems: What was asked for and could not be shown at all.
    """

    schema: int
    ddpcall: str
    title: str
    comparison: Comparison | None
    runs: tuple[RunView, ...]
    watches: tuple[WatchView, ...]
    problems: tuple[str, ...]


def build_view(records: Sequence[RunRecord | WatchRecord], problems: Sequence[str] = ()) -> ReportView:
    """Return the view of all records, in their order."""
    runs = [record for record in records if isinstance(record, RunRecord)]
    watches = [record for record in records if isinstance(record, WatchRecord)]
    names = name_runs(runs) if len(runs) > 1 else [run.experiment for run in runs]
    titles = [*names, *(f"watch of {watch.path.name}" for watch in watches)]
    return ReportView(
        schema=SCHEMA,
        ddpcall=ddpcall.__version__,
        title=" and ".join(titles),
        comparison=compare_runs(runs, names) if len(runs) > 1 else None,
        runs=tuple(view_run(run, name) for run, name in zip(runs, names, strict=True)),
        watches=tuple(view_watch(watch) for watch in watches),
        problems=tuple(problems),
    )


def view_run(run: RunRecord, name: str) -> RunView:
    """Return the view of one lab run."""
    return RunView(
        name=name,
        experiment=run.experiment,
        question=run.question,
        answer=answer(run),
        status=status(run),
        reason=run.reason or "",
        stacks=tuple(sorted(run.stacks.items())),
        failures=collect_failures(run.trials),
        comparisons=tuple(ComparisonRow.of(one) for one in sorted(run.comparisons, key=lambda one: one.is_met)),
        table=build_table(run.trials) if run.trials else None,
        mixing=build_pictures(run.trials),
        final_models=collect_final_models(run),
        distance=plot_columns(
            run, "distance_to_rank0", "Distance of the farthest rank's parameters from rank 0's"
        ),
        accuracy=plot_ranks(run, "accuracy", is_share=True),
        timelines=build_timelines(run),
        modes=build_modes(run),
        environment=_environment(run),
        command=repeat_command(run),
        left_out=run.left_out,
        problems=run.problems,
    )


def _environment(run: RunRecord) -> tuple[tuple[str, str], ...]:
    environment = run.environment
    if environment is None:
        return ()
    known = {
        "torch": environment.torch,
        "Python": environment.python,
        "backend": environment.backend,
        "device": f"{environment.device} ({environment.device_name})",
        "world size": str(environment.world_size),
        "steps a trial": str(run.num_steps) if run.num_steps is not None else "unknown",
        "seed": str(run.seed) if run.seed is not None else "unknown",
        **environment.versions,
    }
    return tuple(known.items())
