"""A run on this process's ranks, whatever it measures: guarded, and with a summary that says how it ended."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from ddpcall.accelerator import Accelerator, name_device
from ddpcall.evidence import Environment
from ddpcall.lab import crash
from ddpcall.lab.console import warn
from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_WRONG_USE, WrongUse
from ddpcall.lab.guard import FAREWELL_SECONDS, Guard
from ddpcall.lab.report.command import leave_report
from ddpcall.lab.run_directory import NotWritten, RunDirectory
from ddpcall.lab.schema import TrainConfig
from ddpcall.lab.world import RankLost, World
from ddpcall.launch_environment import read_address

GATHER_SECONDS = 30.0


class GuardedRun(ABC):
    """The run in progress on one rank; rank 0 also writes."""

    def __init__(
        self, config: TrainConfig, world: World, directory: RunDirectory, accelerator: Accelerator
    ) -> None:
        self._config = config
        self._world = world
        self._directory = directory
        self._accelerator = accelerator
        self._environment = describe_environment(accelerator, world.world_size)
        self._where = "the start"
        self._guard = Guard(world, self._report_hang, self._report_signal, self._report_store_lost)

    def run_guarded(self) -> int:
        """Run, and whatever happens leave a summary that says how it ended."""
        try:
            with crash.keep_stack_of_crash(self._directory.path, self._world.rank), self._guard.watch():
                return self._run()
        except WrongUse as error:
            self._close_failed("wrong use", str(error), None)
            if self._world.rank == 0:
                warn(str(error))
            return EXIT_WRONG_USE
        except RankLost as error:
            self._close_lost(error)
            self._world.end()
            raise SystemExit(EXIT_FAILED) from None
        except NotWritten as error:
            self._close_failed("failed", str(error), None)
            self._world.end()
            raise SystemExit(EXIT_FAILED) from None
        except (SystemExit, KeyboardInterrupt) as error:
            cause = "KeyboardInterrupt" if isinstance(error, KeyboardInterrupt) else f"sys.exit({error.code!r})"
            self._close_failed("failed", f"the code under test left with {cause}", self._world.rank)
            self._world.end()
            raise SystemExit(EXIT_FAILED) from None
        except dist.DistNetworkError:
            time.sleep(FAREWELL_SECONDS)  # the guard asks the store too: it tells of it, and ends this process
            raise
        except Exception as error:
            self._close_failed("failed", f"{type(error).__name__}: {error}", self._world.rank)
            self._world.end()
            raise

    def _run(self) -> int:
        self._begin()
        self._measure()
        failed = self._has_failed()
        if self._world.rank == 0:
            self._directory.write_summary(self._summary("expectations failed" if failed else "ok"))
            self._print()
            leave_report(self._directory.path, self._config.report)
        # A rank that leaves with an exit code makes the launcher stop the others: leave together.
        self._world.collect("finished", True, GATHER_SECONDS)
        return EXIT_FAILED if failed else EXIT_OK

    def _begin(self) -> None:
        """Start the run directory; called on every rank.

        Raises:
            WrongUse: On every rank: it cannot be written.
        """
        failure = None
        if self._world.rank == 0:
            try:
                self._directory.occupy()
                self._start_directory()
            except NotWritten as error:
                failure = WrongUse(f"{error}. Write another hydra.run.dir")
        failure = self._world.collect("begun", failure, GATHER_SECONDS)[0]
        if failure is not None:
            raise failure

    def _start_directory(self) -> None:
        """Create the run directory; called on rank 0."""
        self._create_directory()

    def _create_directory(self, *, anew: bool = True) -> None:
        config_yaml = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self._config)))
        environment = dataclasses.asdict(self._environment)
        self._directory.create(config_yaml, environment, self._summary("running"), anew=anew)

    @abstractmethod
    def _measure(self) -> None:
        """Measure everything; called on every rank."""

    @abstractmethod
    def _has_failed(self) -> bool:
        """Say whether an expectation does not hold."""

    @abstractmethod
    def _print(self) -> None:
        """Show what was measured; on rank 0."""

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """Return what the summary says of what was measured so far."""

    def _summary(self, outcome: str) -> dict[str, Any]:
        return {
            "experiment": self._config.name,
            "question": self._config.question,
            "outcome": outcome,
            "reason": None,
            "first_failing_rank": None,
            "environment": dataclasses.asdict(self._environment),
            **self._describe(),
        }

    def _close_failed(self, outcome: str, reason: str, first_failing_rank: int | None, **more: Any) -> None:
        if self._world.claim("summary_closer"):
            self._directory.fail(outcome, f"{self._where}: {reason}", first_failing_rank, **more)
            if outcome != "wrong use":
                leave_report(self._directory.path, self._config.report)
            if outcome != "wrong use":
                warn(f"{outcome}: {self._where}: {reason}\nWhat was measured before is in {self._directory.path}")

    def _close_lost(self, error: RankLost) -> None:
        """Close a run that lost ranks, with the stack of each that crashed and of those that saw it."""
        directory, world = self._directory.path, self._world
        crashed = {rank: crash.read_stack_of_crash(directory, rank) for rank in error.ranks}
        reason = str(error)
        for rank, stack in crashed.items():
            if stack:
                reason += f"\nrank {rank} crashed here ({crash.FOLDER}/rank{rank}.txt):\n{stack.rstrip()}"
        others = {r: world.read("stacks", r) for r in range(world.world_size) if world.has("stacks", r)}
        crash.remove_empty(directory, *range(world.world_size))
        self._close_failed("rank lost", reason, error.ranks[0], stacks={**others, **crashed})

    def _report_signal(self, signal_name: str, missing: list[int]) -> None:
        """Tell a rank that died (the launcher then stops the others) from a run that somebody stopped."""
        if missing:
            self._close_lost(RankLost(missing, self._where))
        else:
            saved = self._guard.stop.saved_step
            standing = f"; a checkpoint of step {saved} was saved" if saved is not None else ""
            self._close_failed("interrupted", f"stopped by {signal_name}{standing}", None)

    def _report_store_lost(self) -> None:
        store = ":".join(read_address())
        self._close_failed("failed", f"the store at {store} is gone: the launcher or host that ran it ended", None)

    def _report_hang(self, name: str, stacks: dict[int, str], missing: list[int]) -> None:
        seconds = self._config.trial_timeout_s
        reason = f"no end after {seconds:g} s (trial_timeout_s)"
        if missing:
            reason += f"; no answer from rank {', '.join(map(str, missing))}: dead or stopped"
        for rank, stack in sorted(stacks.items()):
            warn(f"rank {rank} was here when {name} was cut:\n{stack}")
        self._close_failed("hung", reason, missing[0] if missing else None, stacks=stacks)


def describe_environment(accelerator: Accelerator, world_size: int) -> Environment:
    """Describe what this process runs on."""
    device = accelerator.device
    versions = {
        package: importlib.metadata.version(package)
        for package in ("ddpcall", "hydra-core", "numpy", "scikit-learn")
    }
    return Environment(
        torch=torch.__version__,
        python=platform.python_version(),
        backend=accelerator.backend,
        device=device.type,
        device_name=name_device(device),
        world_size=world_size,
        versions=versions,
    )
