"""An experiment: run the grid's trials, merge the ranks' reports into evidence, judge, compare, write down."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

import ddpcall
from ddpcall.evidence import Cell, Consequence, Environment, Evidence, Failure
from ddpcall.lab.checkpoint import Checkpoints
from ddpcall.lab.comparisons import ComparisonsRun, check_comparisons
from ddpcall.lab.console import Progress, say, warn
from ddpcall.lab.data import check_batch_size, load_split
from ddpcall.lab.errors import EXIT_FAILED, EXIT_WRONG_USE, WrongUse
from ddpcall.lab.grid import Grid, check_expectations, expand_grid, expected_verdicts
from ddpcall.lab.guarded_run import GATHER_SECONDS, GuardedRun
from ddpcall.lab.loggers import check_logger, log_curves
from ddpcall.lab.rank_report import RankReport, median_step_ms
from ddpcall.lab.records import TimelineRecord, TrialRecord, restore_trial
from ddpcall.lab.report.terminal import print_result, say_left_out
from ddpcall.lab.resume import Earlier, find_earlier
from ddpcall.lab.run_directory import NotWritten, RunDirectory, writing
from ddpcall.lab.schema import TrainConfig
from ddpcall.lab.tensorboard import write_events
from ddpcall.lab.trial import Trial
from ddpcall.lab.typed import Misfit
from ddpcall.lab.world import (
    RankFailed,
    RankLost,
    World,
    choose_accelerator,
    open_world,
)
from ddpcall.probes.catalogue import PROBES
from ddpcall.wrappers import WRAPPERS

# What a rank raises because another one failed first.
CONSEQUENCES = ("connection reset", "connection closed", "closed by peer", "timed out", "timeout", "broken pipe")
# How long a rank whose trial raised waits for the others, which should have raised alike.
AFTER_FAILURE_SECONDS = 10.0
LONGEST_TRIAL_S = 1e7  # what the timers of Python and gloo take


def run_experiment(config: TrainConfig, run_directory: Path) -> int:
    """Run an experiment on this process's ranks; called on every rank.

    Args:
        config: The whole configuration.
        run_directory: Where rank 0 writes; the same on every rank.

    Returns:
        0 when every expectation holds, 1 when one does not, 2 for wrong use.

    Raises:
        SystemExit: With 1, when a rank was lost; the summary says which. A signal or a hang ends the process
            with 1 from the guard thread, after the summary was written.
    """
    world = World()
    try:
        world = open_world()
        _agree_on_config(config, world)
        check_config(config, world)
        run = _make_run(config, world, RunDirectory(run_directory))
    except WrongUse as error:
        if world.rank == 0:
            warn(str(error))
        return EXIT_WRONG_USE
    except RankLost as error:
        if world.claim("absence"):
            missing = ", ".join(map(str, error.ranks))
            warn(f"rank {missing} did not come within {GATHER_SECONDS:.0f} s. Start all {world.world_size} ranks")
        return EXIT_FAILED
    code = run.run_guarded()
    world.leave()
    return code


def _make_run(config: TrainConfig, world: World, directory: RunDirectory) -> GuardedRun:
    if config.one_process:
        return ComparisonsRun(config, world, directory)
    return _TrialsRun(config, expand_grid(config), world, directory)


def check_config(config: TrainConfig, world: World) -> None:
    """Refuse what cannot work before anything starts.

    Raises:
        WrongUse: With what to write instead.
    """
    for name, least in (("steps", 1), ("ranks", 1)):
        if getattr(config, name) < least:
            raise WrongUse(f"{name}={getattr(config, name)}: write {name}={least} or more")
    if not 0 < config.trial_timeout_s < LONGEST_TRIAL_S:
        raise WrongUse(
            f"trial_timeout_s={config.trial_timeout_s}: write a number of seconds above 0 and below "
            f"{LONGEST_TRIAL_S:.0f}"
        )
    if not 0 <= config.seed < 2**63:
        raise WrongUse(f"seed={config.seed}: write a number from 0 to {2**63 - 1}")
    checkpoint = config.checkpoint
    if checkpoint.every < 0 or checkpoint.keep < 1 or checkpoint.resume not in ("auto", "never"):
        raise WrongUse(
            f"checkpoint.every={checkpoint.every} checkpoint.keep={checkpoint.keep} checkpoint.resume="
            f"{checkpoint.resume}: write every=0 or more, keep=1 or more, and resume=auto or never"
        )
    check_logger(config.logger.name)
    choose_accelerator(config.device, config.backend, world.local_rank, world.local_world_size)
    if config.one_process:
        check_comparisons(config)
    else:
        check_expectations(config)
        expand_grid(config)


def _agree_on_config(config: TrainConfig, world: World) -> None:
    """Compare every rank's configuration with rank 0's.

    Raises:
        WrongUse: They differ; names the keys, and both values.
    """
    flat = _flatten(dataclasses.asdict(config)) | _describe_code(config)
    configs = world.collect("config", flat, GATHER_SECONDS)
    if None in configs:
        raise WrongUse(f"rank {configs.index(None)} could not start")
    differences = [
        f"  {key}: {configs[0].get(key)!r} on rank 0, {other.get(key)!r} on rank {rank}"
        for rank, other in enumerate(configs)
        for key in sorted(configs[0].keys() | other.keys())
        if repr(configs[0].get(key)) != repr(other.get(key))  # nan is not equal to nan
    ]
    if differences:
        raise WrongUse(
            "\n".join(["the ranks were started with different configurations:", *differences, "Start all alike."])
        )


def _describe_code(config: TrainConfig) -> dict[str, Any]:
    """Return versions, and a digest of the model's source file: hosts may have other copies."""
    target = str(config.model.get("_target_", ""))
    source = None
    with contextlib.suppress(Exception):  # what cannot be imported is told later
        module = importlib.import_module(target.rpartition(".")[0])
        source = xxhash.xxh3_64_hexdigest(Path(str(module.__file__)).read_bytes())
    return {"ddpcall": ddpcall.__version__, "torch": torch.__version__, f"source of {target}": source}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


class _TrialsRun(GuardedRun):
    """A grid of trials."""

    def __init__(self, config: TrainConfig, grid: Grid, world: World, directory: RunDirectory) -> None:
        accelerator = choose_accelerator(config.device, config.backend, world.local_rank, world.local_world_size)
        super().__init__(config, world, directory, accelerator)
        self._grid = grid
        self._results: list[TrialRecord] = []
        self._earlier = Earlier()
        self._lengths: list[dict[str, int]] = []  # rank 0's: bytes of the files of records after each trial
        self._references: dict[str, Tensor | None] = {}
        self._split = load_split(config.data, config.seed)
        check_batch_size(self._split, config.data.batch_size, world.world_size)

    def _measure(self) -> None:
        with Progress(len(self._grid.cells), enabled=self._world.rank == 0) as progress:
            for index, cell in enumerate(self._grid.cells):
                progress.begin(cell.label())
                if index >= len(self._results):
                    self._results.append(self._run_cell(index, cell))
                    self._close_trial(f"trial{index}")
                progress.finish()
        if self._world.rank == 0:
            self._checkpoints(".").remove()

    def _has_failed(self) -> bool:
        return any(result.unmet for result in self._results)

    def _print(self) -> None:
        print_result(self._config, self._environment, self._results, self._directory.path)

    def _describe(self) -> dict[str, Any]:
        return {
            "num_trials": len(self._grid.cells),
            "left_out": list(self._grid.left_out),
            "lengths": self._lengths,
            "trials": [result.summarize() for result in self._results],
        }

    def _begin(self) -> None:
        """Start the run directory, or go on with the trials that stand there."""
        earlier = self._find_earlier()
        try:
            self._results = [restore_trial(record) for record in earlier.records]
        except Misfit as error:
            raise WrongUse(
                f"evidence.jsonl holds a trial of another version: {error}. Choose another run directory"
            ) from None
        self._lengths = list(earlier.lengths)
        self._earlier = earlier
        super()._begin()

    def _start_directory(self) -> None:
        earlier = self._earlier
        say_left_out(self._grid.left_out)
        if earlier.is_there:
            say(f"resumed: {len(self._results)} of {len(self._grid.cells)} trials are finished and stand")
        for note in earlier.notes:
            warn(note)
        whole = sorted({c.wrapper for c in self._grid.cells if not WRAPPERS[c.wrapper].resumable})
        if self._config.checkpoint.every and whole:
            say(f"not saved in mid-trial, since model and optimizer do not hold all of it: {', '.join(whole)}")
        self._create_directory(anew=not earlier.is_there)

    def _find_earlier(self) -> Earlier:
        """Let rank 0 look into the run directory, and hear what it found.

        Raises:
            WrongUse: On every rank: the directory holds a run of another configuration.
        """
        found: Earlier | WrongUse = Earlier()
        if self._world.rank == 0 and self._config.checkpoint.resume == "auto":
            try:
                self._directory.occupy()
                found = find_earlier(self._directory, dataclasses.asdict(self._config), self._environment)
            except WrongUse as error:
                found = error
            except NotWritten as error:
                found = WrongUse(f"{error}. Write another hydra.run.dir")
        found = self._world.collect("earlier", found, GATHER_SECONDS)[0]
        if isinstance(found, WrongUse):
            raise found
        return found

    def _close_trial(self, name: str) -> None:
        """Write down that a trial is finished: from here on it stands."""
        if self._world.rank == 0:
            self._lengths.append(self._directory.sizes())
            self._directory.write_summary(self._summary("running"))
            self._checkpoints(name).remove()

    def _checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self._directory.path / "checkpoints" / name, self._config.checkpoint.keep)

    def _run_cell(self, index: int, cell: Cell) -> TrialRecord:
        reference = self._reference(cell)
        reports = self._run_trial(f"trial{index}", cell, observe=self._config.probes.enabled, reference=reference)
        evidence = merge_reports(cell, self._config, self._environment, reports)
        expected: dict[str, str] = {}
        if self._config.probes.enabled:
            expected = expected_verdicts(
                cell, self._config.expect, self._environment.torch, self._environment.device
            )
        result = TrialRecord.of(evidence, expected)
        if self._world.rank == 0:
            self._write_trial(result, reports)
        return result

    def _reference(self, cell: Cell) -> Tensor | None:
        """Return the synchronized run's parameters: plain DDP, wrapped(x), the same model, data and seed."""
        if cell.model not in self._references:
            synchronized = Cell(wrapper="ddp", path="call", model=cell.model)
            reports = self._run_trial(f"reference{len(self._references)}", synchronized, observe=False)
            self._references[cell.model] = reports[self._world.rank].parameters
        return self._references[cell.model]

    def _run_trial(
        self, name: str, cell: Cell, *, observe: bool, reference: Tensor | None = None
    ) -> list[RankReport]:
        self._where = f"{name} ({cell.label()})"
        trial = Trial(
            cell,
            self._config,
            self._split,
            self._world,
            self._accelerator,
            observe=observe,
            checkpoints=self._checkpoints(name),
            stop=self._guard.stop,
        )
        with self._guard.limit(self._where, self._config.trial_timeout_s):
            report = trial.run(name, reference)
            # Parameters stay where they are; everything else is small.
            parameters, report.parameters = report.parameters, None
            patience_s = self._config.trial_timeout_s
            if report.failure is not None:
                patience_s = min(patience_s, AFTER_FAILURE_SECONDS)
            reports = self._collect(name, report, patience_s)
        reports[self._world.rank].parameters = parameters
        return reports

    def _collect(self, name: str, report: RankReport, patience_s: float) -> list[RankReport]:
        """Collect the ranks' reports.

        Raises:
            RankFailed: On a rank that raised alone: the others waited for it in a collective, or wait still.
            RankLost: Some rank gave no report; on a rank that failed only because another one did.
        """
        try:
            reports = self._world.collect(f"{name}/report", report, patience_s)
        except RankLost:
            if report.failure is None or is_consequence(report.failure):
                raise
            raise _failed_alone(report.failure) from None
        failure = find_lone_failure(reports)
        if failure is None:
            return reports
        if failure.rank == self._world.rank:
            raise _failed_alone(failure)
        self._world.wait_for("the end that the rank which raised calls", AFTER_FAILURE_SECONDS)
        raise RankLost([failure.rank], name)

    def _write_trial(self, trial: TrialRecord, reports: list[RankReport]) -> None:
        timelines = [
            dataclasses.asdict(TimelineRecord.of(trial.cell, rank, timeline))
            for rank, report in enumerate(reports)
            if (timeline := report.parts.get("timeline")) is not None
        ]
        self._directory.append("evidence.jsonl", [trial.to_json()])
        self._directory.append("steps.jsonl", step_records(trial.cell, reports))
        self._directory.append("timeline.jsonl", timelines)
        assert trial.evidence is not None
        with writing(self._directory.path):
            if self._config.tensorboard:
                write_events(self._directory.path / "tensorboard", trial.evidence, reports)
            log_curves(self._config.logger.name, self._directory.path, trial.evidence, reports)


def merge_reports(
    cell: Cell, config: TrainConfig, environment: Environment, reports: list[RankReport]
) -> Evidence:
    """Merge what the ranks reported into the evidence of one trial."""
    failures = [report.failure for report in reports if report.failure is not None]
    return Evidence(
        cell=cell,
        environment=environment,
        seed=config.seed,
        steps=config.steps,
        step_ms=median_step_ms(reports[0]),
        data_parallel=WRAPPERS[cell.wrapper].data_parallel,
        failures=tuple(sorted(failures, key=lambda failure: (is_consequence(failure), failure.seconds))),
        **{
            probe.name: probe.merge([report.parts.get(probe.name) for report in reports], config.steps)
            for probe in PROBES
            if probe.name in Evidence.__dataclass_fields__
        },
        consequence=None if failures else _consequence(reports),
    )


def find_lone_failure(reports: list[RankReport]) -> Failure | None:
    """Return the failure of the rank that raised while all others waited for it, and failed only by that."""
    failures = [report.failure for report in reports if report.failure is not None]
    causes = [failure for failure in failures if not is_consequence(failure)]
    alone = len(failures) == len(reports) and 0 < len(causes) < len(reports)
    return min(causes, key=lambda failure: failure.seconds) if alone else None


def _failed_alone(failure: Failure) -> RankFailed:
    return RankFailed(
        f"rank {failure.rank} raised in step {failure.step}, and the others wait for it in a collective:\n"
        f"{failure.traceback}"
    )


def is_consequence(failure: Failure) -> bool:
    """Say whether a rank failed because another one did."""
    return any(phrase in failure.message.lower() for phrase in CONSEQUENCES)


def _consequence(reports: list[RankReport]) -> Consequence:
    losses = [report.test_loss for report in reports if report.test_loss is not None]
    accuracies = [report.test_accuracy for report in reports if report.test_accuracy is not None]
    distances = [report.distance for report in reports if report.distance is not None]
    return Consequence(
        test_loss=tuple(losses),
        test_accuracy=tuple(accuracies) or None,
        distance=tuple(distances) or None,
        spread=max((report.spread or 0.0 for report in reports), default=0.0),
        digest=tuple(report.digest for report in reports if report.digest is not None),
    )


def step_records(cell: Cell, reports: list[RankReport]) -> list[dict[str, Any]]:
    """Return one record for each finished step and rank: loss, time, accuracy and what the probes counted."""
    records = []
    for rank, report in enumerate(reports):
        for step, loss in enumerate(report.losses):
            record = {**dataclasses.asdict(cell), "rank": rank, "step": step, "loss": loss}
            record["step_ms"] = report.step_ms[step]
            record["accuracy"] = report.accuracies[step]
            record |= {name: column[step] for name, column in report.columns.items()}
            records.append(record)
    return records
