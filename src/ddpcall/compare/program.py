"""Run a training script unchanged under the recorder: on this rank, or through the launcher that starts it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddpcall.imports import after_import
from ddpcall.launch_environment import read_address, read_attempt, read_job, read_torch_place

FIRST_STEPS = 5
NOTHING = (
    "ddpcall record: nothing was recorded: no torch optimizer took a step of a model that this process called. "
    "Ranks that the script starts itself are not recorded: start them with torchrun"
)
META = "ddpcall-record.json"
RECORD_FILES = r"step\d{8}\.npz|ddpcall-record\.(json|new)"
_TORCHRUN = ("torchrun", "torch.distributed.run")


def prepare(directory: Path) -> None:
    """Make a directory for a record; an older record in it goes.

    Raises:
        ValueError: there is something else.
    """
    if directory.is_dir() and not all(map(_is_of_a_record, directory.iterdir())):
        raise ValueError(f"{directory} holds something that is no record: give --out a new directory")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: give --out a new directory")
    directory.mkdir(parents=True, exist_ok=True)


def _is_of_a_record(path: Path) -> bool:
    files = list(path.iterdir()) if path.is_dir() and re.fullmatch(r"rank\d+", path.name) else [path]
    return all(re.fullmatch(RECORD_FILES, file.name) for file in files)


def parse_steps(text: str) -> tuple[Callable[[int], bool], int | None]:
    """Read which steps are wanted, such as "0-4,8,100"; without any, the first five and powers of two.

    Returns:
        Says of a step whether it is wanted; how many there are, None where there is no end.

    Raises:
        ValueError: that is no list of steps.
    """
    if not text:
        return lambda step: step < FIRST_STEPS or step & (step - 1) == 0, None
    try:
        ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
        wanted = {step for ends in ranges for step in range(ends[0], ends[-1] + 1)}
    except ValueError:
        wanted = set()
    if not wanted:
        raise ValueError(f"--steps {text}: write numbers and ranges, such as --steps 0-4,8,100")
    return wanted.__contains__, len(wanted)


def record_program(
    program: Sequence[str], out: Path, wants: Callable[[int], bool], num_steps: int | None, max_mb: float
) -> Any:
    """Run a script, or `-m` and a module, as `__main__` and record its steps.

    The recorder comes when torch has been imported, so that what the script does before that is as without it.

    Args:
        program: The script, or `-m` and the module, and its own arguments.
        out: Directory of the record.
        wants: Says of a step's number whether it is recorded.
        num_steps: How many steps it wants; None where there is no end.
        max_mb: Megabytes that this rank may write.

    Returns:
        The program's exit code; 2 where it is 0, this process is no rank of a launcher and nothing was recorded.
    """
    recorders: list[Any] = []
    rank, num_ranks, run = _find_place()
    out = out.absolute()  # the script may change the directory

    def attach(_: Any) -> Callable[[], None]:
        from ddpcall.compare.files import Writer
        from ddpcall.compare.record import Recorder

        recorder = Recorder(Writer(out, rank, num_ranks, run, num_steps, max_mb), wants)
        recorder.install()
        recorders.append(recorder)
        return lambda: None

    stop = after_import("torch", attach)
    code: Any = 0
    try:
        _run(program)
    except SystemExit as exit_:
        code = exit_.code
    finally:
        stop()
        for recorder in recorders:
            recorder.close()
    if code or any(recorder.has_recorded for recorder in recorders):
        return code
    if rank == 0:
        print(NOTHING, file=sys.stderr)
    return code if num_ranks > 1 else 2  # a launcher would take 2 for a failure of the script


def _run(program: Sequence[str]) -> None:
    if program[0] == "-m":
        sys.argv = ["-m", *program[2:]]
        sys.path[0] = os.getcwd()
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(program)
        sys.path[0] = os.path.dirname(os.path.realpath(program[0]))
        runpy.run_path(program[0], run_name="__main__")


def _find_place() -> tuple[int, int, str]:
    """Return the rank, the number of ranks and a text that is the same on all ranks of one launch."""
    place = read_torch_place()
    if place is None:
        return 0, 1, uuid.uuid4().hex
    run = "-".join([read_job(), *read_address(), str(read_attempt())])
    return place.rank, place.num_ranks, run


def record_command(command: Sequence[str], options: Sequence[str], out: Path) -> int:
    """Run a launcher's command with the recorder between it and the script.

    Args:
        command: Such as `torchrun --nproc-per-node 2 train.py`, or `python train.py`.
        options: Of `ddpcall record`.
        out: Directory of the record.

    Returns:
        The command's exit code; 2 where it is 0 and nothing was recorded.

    Raises:
        ValueError: that is no command of torchrun or python.
    """
    code = subprocess.run(insert_recorder(command, ["-m", "ddpcall", "record", *options])).returncode
    return code if code or list(out.glob("rank0/step*.npz")) else 2


def insert_recorder(command: Sequence[str], recorder: Sequence[str]) -> list[str]:
    """Return the command with the recorder in front of the script.

    Raises:
        ValueError: that is no command of torchrun or python.
    """
    name = Path(command[0]).name
    if name.startswith("python"):
        place = 1
        while place < len(command) and command[place].startswith("-") and command[place][:2] not in ("-m", "-c"):
            place += 2 if command[place] in ("-X", "-W") else 1
        first, rest = command[:place], command[place:]
        if rest[:1] == ["-m"] and rest[1] in _TORCHRUN:
            return [*first, *rest[:2], *_insert_into_torchrun(rest[2:], recorder)]
        if not rest or rest[0].startswith("-c"):
            raise ValueError("say which script to record: ddpcall record --out DIRECTORY -- python train.py …")
        return [*first, *recorder, *rest]
    if name in _TORCHRUN:
        return [command[0], *_insert_into_torchrun(command[1:], recorder)]
    raise ValueError(
        f"{command[0]} is neither torchrun nor python. Put the recorder in front of the script yourself: "
        f"{command[0]} … -m ddpcall record --out DIRECTORY train.py …"
    )


def _insert_into_torchrun(arguments: Sequence[str], recorder: Sequence[str]) -> list[str]:
    from torch.distributed.run import parse_args

    settings = parse_args(list(arguments))
    if settings.no_python:
        raise ValueError("torchrun --no-python starts no Python: write torchrun … train.py without the option")
    num_own = len(arguments) - len(settings.training_script_args) - 1
    own = [argument for argument in arguments[:num_own] if argument not in ("-m", "--module", "--")]
    program = ["-m"] if settings.module else []
    return [*own, *recorder, *program, *arguments[num_own:]]
