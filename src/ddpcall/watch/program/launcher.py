"""Start the ranks with torch's launcher, and answer when all have ended: `ddpcall watch -n 2 train.py`.

The ranks run `ddpcall watch` themselves and take part in this process's watch (`program.inherited`): they
print no answer and end with the script's exit codes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpcall.watch.launch import current_launch
from ddpcall.watch.options import Options
from ddpcall.watch.program.inherited import hand_on
from ddpcall.watch.program.script import load_module, load_script
from ddpcall.watch.session import Session

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SHELL_SIGNAL = 128  # a shell's exit code for a process that a signal ended, plus the signal's number


def run_ranks(num_ranks: str, command: list[str], options: Options) -> None:
    """Run a script or module on ranks of this host, print the answer and leave.

    Args:
        num_ranks: As torchrun's `--nproc-per-node`.
        command: The script, or `-m` and the module, and its own arguments; or `--`, torchrun's options and these.
        options: The watch's.

    Raises:
        SystemExit: The exit code of the rank that failed first; as in a shell, 128 and the signal's number for
            one that died by a signal. Where none failed, 1 if findings reach `fail_on`, 2 if too little was seen.
        OSError: The script cannot be read, or the findings file cannot be written.
        ImportError: There is no such module.
        ValueError: An option of torchrun's cannot be.
    """
    settings, name = _parse(num_ranks, command)
    session = Session(options, current_launch())
    session.script = name
    session.open()
    hand_on(session, to_all=options.children)
    ended_by, failures = _launch(settings)
    code = _tell(_find_first(failures)) if failures else 0
    if ended_by is not None or code != 0:
        session.note_exit(code if ended_by is None else SHELL_SIGNAL + ended_by)
    session.close(in_order=code == 0 and ended_by is None)
    verdict = session.report()
    if ended_by is not None:
        signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    sys.exit(code or verdict)


def _parse(num_ranks: str, command: list[str]) -> tuple[Any, str]:
    """Return torchrun's settings, for the watch as the module that the ranks run; and what the watch runs."""
    from torch.distributed.run import config_from_args, parse_args

    if "LOGLEVEL" not in os.environ:  # the ranks say what there is to say
        logging.disable(logging.ERROR)
    # Without options of torchrun's it gets the name alone: it drops a `--` that the script's arguments begin with.
    num_read = len(command) if command[0] == "--" else 1 + (command[0] == "-m")
    settings = parse_args(["--nproc-per-node", num_ranks, *command[command[0] == "--" : num_read]])
    settings.training_script_args += command[num_read:]
    if settings.no_python:
        raise ValueError("--no-python starts no Python, which alone can be watched; leave it out")
    script, is_module = settings.training_script, settings.module
    (load_module if is_module else load_script)(script)
    config_from_args(settings)
    if settings.rdzv_endpoint == "" and settings.nnodes in ("1", "1:1"):
        settings.standalone = True  # a free port, whatever else runs here
    program = ["-m", script] if is_module else [script]
    settings.training_script_args = ["watch", *program, *settings.training_script_args]
    settings.training_script, settings.module = "ddpcall", True
    return settings, " ".join(program)


def _launch(settings: Any) -> tuple[signal.Signals | None, list[ProcessFailure]]:
    """Start the ranks and wait; return the signal that ended this, if any, and how ranks failed, first to last."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run

    try:
        run(settings)
    except ChildFailedError as error:
        return None, list(error.failures.values())
    except SignalException as error:
        return error.sigval, []
    except KeyboardInterrupt:
        return signal.SIGINT, []
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)  # what comes now comes too late, or a second time
        _kill_children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
    return None, []


def _kill_children() -> None:
    """Kill what is left of the ranks, where a second signal ended the launcher's own shutdown."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with contextlib.suppress(OSError):
                # A rank leads a session of its own; other children are torch's, and end with this process.
                if os.getpgid(int(child)) == int(child):
                    os.killpg(int(child), signal.SIGKILL)


def _find_first(failures: list[ProcessFailure]) -> ProcessFailure:
    """Return the failure that is the cause: ranks that lost a peer end with 1, and the launcher ends the rest."""
    begun = min(failure.timestamp for failure in failures)
    early = [failure for failure in failures if failure.timestamp <= begun + 1]  # whole seconds
    return min(early, key=lambda failure: (failure.exitcode == -signal.SIGTERM, failure.exitcode == 1))


def _tell(failure: ProcessFailure) -> int:
    """Say how a rank ended, and return the exit code that a shell would give it."""
    code = failure.exitcode
    how = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    print(f"ddpcall watch: rank {failure.local_rank} of this host {how}", file=sys.stderr)
    return code if code >= 0 else SHELL_SIGNAL - code
