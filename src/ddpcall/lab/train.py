"""The entry point behind `launch/train.py` and `ddpcall train`: Hydra composes, the lab runs."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ddpcall.lab.errors import EXIT_FAILED, EXIT_OK, EXIT_WRONG_USE, WrongUse
from ddpcall.lab.overrides import check_composed, check_overrides
from ddpcall.lab.run_directory import RunDirectory, new_run_id
from ddpcall.lab.schema import TrainConfig, register_schema
from ddpcall.lab.sweep import exit_codes as sweep_exit_codes
from ddpcall.launch_environment import Place, read_torch_place

if TYPE_CHECKING:
    from ddpcall.lab.world import World

LEAVE_SECONDS = 20.0
_LOOKING_ONLY = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--resolve")


def main() -> None:
    """Compose the configuration from the command line and run it; exits with 0, 1 or 2.

    Under torchrun every rank calls this. Hydra's own messages (a typo, an unknown option) come from rank 0 only.
    """
    register_schema()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that model._target_=my.module.MyNet finds the user's module
    place = read_torch_place() or Place()
    rank, world_size = place.rank, place.num_ranks
    exit_codes: list[int] = []
    run_ids, world = _agree_on_run_id(rank, world_size)
    try:
        _refuse_multirun(rank, world_size)
        _refuse_unknown_keys(rank)
        OmegaConf.register_new_resolver("run_id", lambda resume="never": run_ids[resume], replace=True)
        OmegaConf.register_new_resolver("on_rank_0", lambda text: text if rank == 0 else None, replace=True)
        _compose_and_run(rank, exit_codes)
        code = max([*exit_codes, *sweep_exit_codes], default=EXIT_OK)
    except SystemExit as stop:
        # Before the job began, Hydra found the command line wrong and has said so.
        code = EXIT_WRONG_USE if stop.code and not exit_codes else stop.code
    if code == EXIT_WRONG_USE and world is not None:
        _leave_together(world)
    sys.exit(code)


def _refuse_multirun(rank: int, world_size: int) -> None:
    if world_size == 1 or not {"-m", "--multirun"} & set(sys.argv[1:]):
        return
    if rank == 0:
        _complain(
            "--multirun on several ranks would let them drift apart. Start one process and let every job "
            "start its own ranks: python launch/train.py --multirun …; or write the sweep as one "
            "grid: grid.path=[…]"
        )
    sys.exit(EXIT_WRONG_USE)


def _refuse_unknown_keys(rank: int) -> None:
    if {"-sc", "--shell-completion"} & set(sys.argv[1:]):
        return  # its `install=bash` is no override
    try:
        check_overrides(sys.argv[1:])
    except WrongUse as error:
        if rank == 0:
            _complain(str(error))
        sys.exit(EXIT_WRONG_USE)


def _leave_together(world: World) -> None:
    """Wait for the others: the first rank that leaves makes the launcher stop rank 0 before it has spoken."""
    from ddpcall.lab.world import RankLost

    if not world.has("config", world.rank):
        world.publish("config", None)  # those that came further wait for it
    with contextlib.suppress(RankLost, RuntimeError):
        world.collect("wrong use", True, LEAVE_SECONDS)


def _compose_and_run(rank: int, exit_codes: list[int]) -> None:
    with contextlib.ExitStack() as silence:
        if rank != 0:
            silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))

        @hydra.main(version_base="1.3", config_path="pkg://ddpcall.conf", config_name="train")
        def job(composed: DictConfig) -> None:
            silence.close()
            exit_codes.append(EXIT_FAILED)  # until the run says otherwise
            exit_codes[-1] = _run(composed)

        job()


def _run(composed: DictConfig) -> int:
    """Turn the composed configuration into typed objects, and run it on as many ranks as it needs."""
    from torch.distributed.elastic.multiprocessing.errors import record

    from ddpcall.lab.experiment import run_experiment

    config = OmegaConf.to_object(composed)
    assert isinstance(config, TrainConfig)
    place = read_torch_place() or Place()
    try:
        check_composed(config)
    except WrongUse as error:
        if place.rank == 0:
            _complain(str(error))
        return EXIT_WRONG_USE
    directory = Path(HydraConfig.get().runtime.output_dir)
    if place.num_ranks < config.ranks:
        return _run_on_missing_ranks(config, directory, place)
    code = record(run_experiment)(config, directory)
    return EXIT_FAILED if code is None else code


def _run_on_missing_ranks(config: TrainConfig, directory: Path, place: Place) -> int:
    """Start the ranks that the launcher did not, on this machine, from one of its processes."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ddpcall.lab.console import say
    from ddpcall.lab.experiment import check_config, run_experiment
    from ddpcall.lab.report.command import leave_report
    from ddpcall.lab.world import World, launch_local_ranks

    if place.num_ranks > place.num_local:
        if place.rank == 0:
            _complain(
                f"experiment {config.name} needs {config.ranks} ranks and {place.num_ranks} were started on "
                f"several machines. Start more of them, or write ranks={place.num_ranks}"
            )
        return EXIT_WRONG_USE
    if place.rank != 0:
        return EXIT_OK  # rank 0 starts all ranks anew
    try:
        check_config(config, World(local_world_size=config.ranks))
    except WrongUse as error:
        _complain(str(error))
        return EXIT_WRONG_USE
    say(
        f"{config.name} needs {config.ranks} ranks, {place.num_ranks} was started: "
        f"starting {config.ranks} on this machine"
    )
    try:
        return launch_local_ranks(run_experiment, config.ranks, config, directory)
    except SignalException as stopped:
        _complain(f"stopped by {stopped.sigval.name}; the ranks were stopped too")
        return EXIT_FAILED
    except ChildFailedError as error:
        first, failure = error.get_first_failure()
        RunDirectory(directory).fail("failed", failure.message.splitlines()[-1], first)
        leave_report(directory, config.report)
        summary = RunDirectory(directory).read_summary()
        _complain(
            f"{summary.get('outcome', 'failed')}: {summary.get('reason', failure.message)}\n{failure.message}"
        )
        return EXIT_FAILED


def _agree_on_run_id(rank: int, world_size: int) -> tuple[dict[str, str], World | None]:
    """Return one id for all ranks, agreed on before Hydra composes: two clocks would make two directories.

    Returns:
        By `checkpoint.resume`: `never`, an id of this attempt's own; `auto`, one for all attempts of a launch. The
        world they were agreed on in; None where there is one rank, or nothing to run.
    """
    if world_size == 1 or any(argument in _LOOKING_ONLY for argument in sys.argv[1:]):
        return defaultdict(new_run_id), None
    from ddpcall.lab.world import NobodyListens, open_world

    try:
        world = open_world()
    except WrongUse as error:
        if rank == 0 or (rank == 1 and isinstance(error, NobodyListens)):
            _complain(str(error))
        sys.exit(EXIT_WRONG_USE)
    of_attempt: Any = world.store
    stores = {"never": of_attempt, "auto": of_attempt.underlying_store}
    return {
        resume: store.compare_set("ddpcall/run_id", "", new_run_id()).decode() for resume, store in stores.items()
    }, world


def _complain(message: str) -> None:
    print(f"ddpcall: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
