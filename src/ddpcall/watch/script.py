"""Run a training script under the watch: argv, `__main__`, tracebacks, exit code and signals stay as without."""

from __future__ import annotations

import atexit
import importlib.util
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import Any

from ddpcall.watch.options import Options


@dataclass(frozen=True)
class Program:
    """A script or module, ready to run as `__main__`.

    Attributes:
        code: Its compiled code.
        name: What `sys.argv[0]` is to be.
        file: What `__file__` is to be.
        directory: What `sys.path[0]` is to be.
        spec: A module's spec; None for a script.
    """

    code: CodeType
    name: str
    file: str
    directory: str
    spec: Any = None


def load_script(path: str) -> Program:
    """Compile a script.

    Raises:
        OSError: It cannot be read.
    """
    source = Path(path).read_bytes()
    directory = os.path.dirname(os.path.realpath(path))
    file = os.path.abspath(path)
    return Program(compile(source, file, "exec", dont_inherit=True), path, file, directory)


def load_module(name: str) -> Program:
    """Find and compile `name`, or `name.__main__` where it is a package.

    Raises:
        ImportError: There is none such, or it has no code.
    """
    sys.path[0] = os.getcwd()
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    loader: Any = None if spec is None else spec.loader
    if spec is None or not hasattr(loader, "get_code"):
        raise ImportError(f"No module named {name}")
    file = spec.origin or name
    return Program(loader.get_code(spec.name), file, file, os.getcwd(), spec)


def run_program(program: Program, arguments: list[str], options: Options) -> None:
    """Run a program as `__main__` under a watch, then leave as it would have left.

    Args:
        program: The program.
        arguments: Its own arguments.
        options: The watch's.

    Raises:
        SystemExit: The program's own exit code; 1 when it succeeded, this rank is the last of its host to
            leave and findings reach `fail_on`.
    """
    sys.argv = [program.name, *arguments]
    sys.path[0] = program.directory
    main = _make_main(program)
    farewell = _Farewell()
    from ddpcall.watch.session import Session  # imports torch: after the arguments were checked

    session = Session(options).start()
    code: Any = 0
    try:
        exec(program.code, main.__dict__)
    except SystemExit as exit_:
        code = exit_.code
    except BaseException as error:
        _show(error)
        session.explain_crash(error)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            farewell.signal = signal.SIGINT
    session.close(in_order=code in (None, 0))
    if session.is_last():
        failed = session.reaches_failure()
        session.report()
        if code in (None, 0) and failed:
            code = 1
    sys.exit(code)


def _make_main(program: Program) -> ModuleType:
    """Put a fresh `__main__` in place, as the interpreter does."""
    main = ModuleType("__main__")
    spec = program.spec
    main.__dict__.update(
        __file__=program.file,
        __builtins__=__builtins__,
        __spec__=spec,
        __package__=None if spec is None else spec.parent,
        __loader__=None if spec is None else spec.loader,
        __cached__=None,
    )
    sys.modules["__main__"] = main
    return main


def _show(error: BaseException) -> None:
    """Print an uncaught exception the way the interpreter would, without the watch's frames in front."""
    trace = error.__traceback__
    while trace is not None and _is_ours(trace):
        trace = trace.tb_next
    error.__traceback__ = trace  # the default hook prints this one, whatever it is handed
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    sys.excepthook(type(error), error, trace)


def _is_ours(trace: TracebackType) -> bool:
    return trace.tb_frame.f_code.co_filename == __file__


class _Farewell:
    """Dies by a signal after everything else, as the interpreter does on an unhandled KeyboardInterrupt.

    Registered before the script runs, so that it is the last exit handler to be called.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        atexit.register(self._leave)

    def _leave(self) -> None:
        if self.signal is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            signal.signal(self.signal, signal.SIG_DFL)
            os.kill(os.getpid(), self.signal)
