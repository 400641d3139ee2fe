"""An experiment of comparisons: would one process with the whole batch have computed the same?"""

from __future__ import annotations

from typing import Any

from ddpcall.compare import CAUSES, same_as_one_process
from ddpcall.lab.console import Progress
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.guarded_run import GuardedRun
from ddpcall.lab.one_process_cases import find_case, share_nothing
from ddpcall.lab.records import ComparisonRecord
from ddpcall.lab.report.terminal import print_comparisons
from ddpcall.lab.run_directory import RunDirectory
from ddpcall.lab.schema import OneProcessConfig, TrainConfig
from ddpcall.lab.trial import build_optimizer
from ddpcall.lab.world import World, choose_accelerator, process_group
from ddpcall.wrappers import WRAPPERS

CRASHED = "crashed"


def check_comparisons(config: TrainConfig) -> None:
    """Refuse what cannot work before anything starts.

    Raises:
        WrongUse: with what to write instead.
    """
    if config.grid.cells or any(getattr(config.grid, axis) for axis in vars(config.grid)) or config.expect:
        raise WrongUse(
            "one_process stands in place of a grid of trials: take grid and expect out, and say expect with "
            "every case"
        )
    if config.ranks < 2:
        raise WrongUse(f"ranks={config.ranks}: one rank is one process; write ranks=2 or more")
    if config.device not in ("auto", "cpu"):
        raise WrongUse(f"device={config.device}: the cases of one_process run on the CPU; write device=cpu")
    if config.checkpoint.every or config.checkpoint.resume != "never":
        raise WrongUse("comparisons with one process are neither saved nor resumed: leave checkpoint out")
    for entry in config.one_process:
        _check_entry(entry)


def _check_entry(entry: OneProcessConfig) -> None:
    case = find_case(entry.case)
    if entry.expect not in (*CAUSES, CRASHED):
        raise WrongUse(
            f"one_process: {entry.case}: expect: {entry.expect!r} is unknown; write one of: "
            f"{', '.join((*CAUSES, CRASHED))}"
        )
    if entry.wrapper is not None and case.wrap is not None:
        raise WrongUse(f"one_process: {entry.case} wraps its model itself: leave wrapper={entry.wrapper} out")
    if entry.wrapper is not None and entry.wrapper not in WRAPPERS:
        raise WrongUse(f"one_process: wrapper {entry.wrapper!r} is unknown; write one of: {', '.join(WRAPPERS)}")


class ComparisonsRun(GuardedRun):
    """A list of comparisons, each in a process group of its own; on the CPU, over gloo.

    Raises:
        WrongUse: there is one rank only.
    """

    def __init__(self, config: TrainConfig, world: World, directory: RunDirectory) -> None:
        if world.world_size < 2:
            raise WrongUse("one_process compares ranks with one process, and there is one rank: write ranks=2")
        accelerator = choose_accelerator("cpu", "gloo", world.local_rank, world.local_world_size)
        super().__init__(config, world, directory, accelerator)
        self._results: list[ComparisonRecord] = []

    def _measure(self) -> None:
        entries = self._config.one_process
        with Progress(len(entries), enabled=self._world.rank == 0) as progress:
            for index, entry in enumerate(entries):
                wrapper = entry.wrapper or find_case(entry.case).wrapper
                progress.begin(f"{entry.case} × {wrapper}")
                self._results.append(self._compare(f"comparison{index}", entry, wrapper))
                if self._world.rank == 0:
                    self._directory.write_summary(self._summary("running"))
                progress.finish()

    def _compare(self, name: str, entry: OneProcessConfig, wrapper: str) -> ComparisonRecord:
        case, seconds = find_case(entry.case), self._config.trial_timeout_s
        self._where = f"{name} ({entry.case} × {wrapper})"
        found, message, comparison = CRASHED, "", None
        with self._guard.limit(self._where, seconds), process_group(self._world, self._accelerator, name, seconds):
            try:
                comparison = same_as_one_process(
                    case.step,
                    case.make_model(),
                    case.make_batch(self._world.world_size),
                    wrap=case.choose_wrap(wrapper),
                    optimizer=lambda parameters: build_optimizer(parameters, self._config.optimizer),
                    steps=self._config.steps,
                    split=share_nothing if WRAPPERS[wrapper].same_batch else case.split,
                    timeout_s=seconds / 3,
                )
                found, message = comparison.cause, comparison.message
            except (RuntimeError, ValueError) as error:  # on all ranks alike
                message = str(error)
        return ComparisonRecord(
            case=entry.case,
            wrapper=wrapper,
            about=case.about,
            expected=entry.expect,
            found=found,
            message=message,
            comparison=comparison and comparison.to_json(),
        )

    def _has_failed(self) -> bool:
        return not all(result.is_met for result in self._results)

    def _print(self) -> None:
        print_comparisons(self._config, self._environment, self._results, self._directory.path)

    def _describe(self) -> dict[str, Any]:
        return {
            "num_comparisons": len(self._config.one_process),
            "trials": [],
            "comparisons": [result.summarize() for result in self._results],
        }
