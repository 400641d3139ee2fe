"""Run a training script under the watch: argv, `__main__`, tracebacks, exit code and signals stay as without."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.util
import math
import os
import runpy
import signal
import sys
import threading
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

from ddpcall.imports import Undo, after_import
from ddpcall.watch.options import Options
from ddpcall.watch.output.streams import say
from ddpcall.watch.program.inherited import hand_on, read_inherited
from ddpcall.watch.program.tracebacks import drop_own_frames
from ddpcall.watch.session import Session

OTHERS_LEAVE_S = 60.0


@dataclass(frozen=True)
class Program:
    """What is to run as `__main__`.

    Attributes:
        name: The script's path or the module's full name.
        source: The script; None for a module.
    """

    name: str
    source: bytes | None = None


def load_script(path: str) -> Program:
    """Read a script.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return Program(path, file.read())


def load_module(name: str) -> Program:
    """Look for a module; its packages are not imported yet.

    Raises:
        ImportError: There is none such.
    """
    _set_search_path(os.getcwd())
    if importlib.util.find_spec(name.split(".", maxsplit=1)[0]) is None:
        raise ImportError(f"No module named {name}")
    return Program(name)


def run_program(program: Program, arguments: list[str], options: Options) -> None:
    """Run a program as `__main__` under a watch, then leave as it would have left.

    The watch attaches when torch is imported, so that what the program does before that (environment variables,
    `--help`) is as without it.

    Args:
        program: The program.
        arguments: Its own arguments.
        options: The watch's.

    Raises:
        OSError: The file for the findings cannot be written.
        SystemExit: The program's own exit code; 1 when it succeeded, this rank is the last of its host to
            leave and findings reach `fail_on`.
    """
    Ending.stand_down()
    inherited = None if options.json or options.sarif else read_inherited()
    if inherited is None or not inherited.is_of_another_rank():
        session = Session(options)
        session.script = program.name if program.source is not None else f"-m {program.name}"
    else:  # a rank of a watched run: what holds there holds here
        session = inherited.make_session()
    session.open()
    hand_on(session, to_all=options.children)
    ending = Ending(session)
    ending.await_torch()
    code = _execute(program, arguments, session, ending)
    if ending.is_ours():
        code = ending.finish(code)
    sys.exit(code)


def _execute(program: Program, arguments: list[str], session: Session, ending: Ending) -> Any:
    """Run the program and return its exit code; an uncaught exception is shown as the interpreter shows it."""
    try:
        if program.source is None:
            _run_module(program.name, arguments)
        else:
            _run_script(program.name, program.source, arguments)
        return 0
    except SystemExit as exit_:
        return exit_.code
    except BaseException as error_:
        error = error_
    # Out of the handler: in it, an exception of the hook's own would have this one for a context.
    try:
        code = _show(error)
    except Exception:  # there is no stderr
        code = 1
    session.explain_crash(error)
    if isinstance(error, KeyboardInterrupt):
        ending.signal = signal.SIGINT
    return code


def _run_script(path: str, source: bytes, arguments: list[str]) -> None:
    sys.argv = [path, *arguments]
    _set_search_path(os.path.dirname(os.path.realpath(path)))
    file = os.path.join(os.getcwd(), path)  # not normalized: the interpreter does not either
    main = _make_main()
    vars(main).update(__file__=file, __loader__=SourceFileLoader("__main__", file), __cached__=None)
    exec(compile(source, file, "exec", dont_inherit=True), vars(main))


def _run_module(name: str, arguments: list[str]) -> None:
    """Hand over to what `python -m` calls, so that its frames, errors and `__spec__` are there.

    Source: `Modules/main.c`, `pymain_run_module`.
    """
    sys.argv = ["-m", *arguments]
    _set_search_path(os.getcwd())
    _make_main()
    runpy._run_module_as_main(name)  # pyright: ignore[reportAttributeAccessIssue]


def _set_search_path(first: str) -> None:
    if not sys.flags.safe_path:  # otherwise nothing was put in front
        sys.path[0] = first


def _make_main() -> ModuleType:
    """Put a fresh `__main__` in place, as the interpreter does."""
    main = ModuleType("__main__")
    vars(main).update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    return main


def _show(error: BaseException) -> Any:
    """Print an uncaught exception the way the interpreter would, without the watch's frames.

    Returns:
        The exit code: 1, unless a hook of the script's leaves with another.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace  # the default hook prints this one, whatever it is handed
    drop_own_frames(error)
    trace = error.__traceback__
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    setattr(sys, "last_exc", error)  # noqa: B010 (from Python 3.12 on)
    try:
        sys.excepthook(type(error), error, trace)
    except SystemExit as exit_:
        return exit_.code
    except BaseException as another:
        another.__traceback__ = another.__traceback__ and another.__traceback__.tb_next
        print("Error in sys.excepthook:", file=sys.stderr)
        sys.__excepthook__(type(another), another, another.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(type(error), error, trace)
    return 1


class Ending:
    """Everything that has to happen when the program ends, by whichever of the ways there are."""

    _of_child: Ending | None = None

    def __init__(self, session: Session) -> None:
        """Register for the end: before the script runs, so as to be the last exit handler that is called."""
        self.signal: signal.Signals | None = None
        self._session = session
        self._process = os.getpid()
        self._leave = os._exit
        self.is_finished = False
        self._is_failing = False
        self._stop_awaiting: Undo = lambda: None
        os._exit = self._leave_at_once
        atexit.register(self._depart)

    @classmethod
    def for_child(cls, session: Session) -> Ending:
        """Return the ending of a watch that began by itself; `stand_down` takes it off for another watch."""
        cls._of_child = cls(session)
        return cls._of_child

    @classmethod
    def stand_down(cls) -> None:
        """End a watch that began by itself, for one that the process starts on purpose."""
        ending, cls._of_child = cls._of_child, None
        if ending is not None:
            ending.is_finished = True
            ending._stop_awaiting()
            os._exit = ending._leave
            Session.abandon_inherited()

    def is_ours(self) -> bool:
        """Say whether this is the process that was started, not one it forked."""
        return os.getpid() == self._process

    def await_torch(self) -> None:
        """Attach once torch has been imported, or now."""
        self._stop_awaiting = after_import("torch", self.attach)

    def attach(self, _: ModuleType) -> Undo:
        """Attach the watch: torch was imported. An error of the watch's own is said and goes no further."""
        session = self._session
        if self.is_ours() and not self.is_finished and not session.is_attached:  # it is, where torch is reloaded
            try:
                session.start()
                from ddpcall.watch.program.spawned import watch_spawned  # imports torch

                watch_spawned(session)
            except Exception as error:
                session.note_missing("spawned processes" if session.is_attached else "torch", error)
        return lambda: None

    def finish(self, code: Any, in_order: bool = True) -> Any:
        """End the watch and return the exit code to leave with. Nothing that goes wrong here is the script's.

        A code that would make the launcher train again what has succeeded is withheld.
        """
        self.is_finished = True
        self._stop_awaiting()
        session = self._session
        succeeded = code is None or code == 0
        if not succeeded:
            session.note_exit(code)
        try:
            session.close(in_order=succeeded and in_order, stays=True)
        except Exception as error:
            session.note_fault(error)
            say(f"ddpcall watch: an error of its own at the end: {error!r}")
        try:
            verdict = session.report() if session.is_last() else 0
        except Exception as error:
            verdict = 2
            say(f"ddpcall watch: an error of its own at the end: {error!r}")
        self._is_failing = succeeded and verdict != 0 and not session.launch.may_restart
        return verdict if self._is_failing else code

    def _leave_at_once(self, status: int) -> None:
        """Stand in for `os._exit`, which skips every exit handler; forked children have their own end."""
        if self.is_ours() and not self.is_finished:
            status = self.finish(status, in_order=threading.current_thread() is threading.main_thread())
            with contextlib.suppress(Exception):  # closed, or None
                sys.stderr.flush()
            self._let_others_go_first()
        elif not self.is_ours() and self._session.has_said:  # a rank that `multiprocessing.Process` forked
            self._session.close(in_order=status == 0)
        self._leave(status)

    def _let_others_go_first(self) -> None:
        """Leave with a failure of the watch's own after the other ranks: their launcher stops who is left then.

        They came to their end too, and may be busy in exit handlers.
        """
        if self._is_failing:
            self._session.findings_file.wait_for_others_to_exit(
                math.inf if self._session.is_alone else OTHERS_LEAVE_S
            )

    def _depart(self) -> None:
        """Die by the signal, where there was one, as the interpreter does on an unhandled KeyboardInterrupt."""
        if not self.is_ours():
            return
        self._let_others_go_first()
        if self.signal is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            signal.signal(self.signal, signal.SIG_DFL)
            os.kill(os.getpid(), self.signal)
