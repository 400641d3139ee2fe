"""One watched run on this rank, start to end. Torch is imported when the watch attaches, not before."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from ddpcall.findings import Finding
from ddpcall.launch_environment import is_started_alone
from ddpcall.torch_version import require_torch
from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.launch import Launch, current_launch, is_running
from ddpcall.watch.options import Options, parse_codes
from ddpcall.watch.output import text
from ddpcall.watch.output.findings_file import Contents, FindingsFile, WriteResult, key_of
from ddpcall.watch.output.streams import check_output, print_anywhere, say
from ddpcall.watch.output.text import WatchError
from ddpcall.watch.output.watched import Answer, Watched, weigh

if TYPE_CHECKING:
    from torch import nn

    from ddpcall.watch.attach import Attachment

__all__ = ["Session", "WatchError", "watch"]

CHILDREN_LEAVE_S = 20.0
FAILED_LEAVE_S = 2.0


class Session:
    """Watches this process from `start` to `close`.

    Attributes:
        script: What is watched, as it was named on the command line.
        has_said: Whether this process has written to the findings file.
        not_attached: What of a script is not watched, in plain words, and why in one line; empty when all is.
    """

    _running: Session | None = None
    _follows_forks = False

    def __init__(self, options: Options, launch: Launch | None = None) -> None:
        """Take the options and where this process stands; nothing is attached yet."""
        self.options = options
        self.launch = current_launch() if launch is None else launch
        self.script = "train.py"
        self.not_attached: dict[str, str] = {}
        self.book = FindingsBook(self)
        self._attachment: Attachment | None = None
        self._collected: tuple[list[Finding], Watched] | None = None
        self._is_open = True
        self._not_written: list[str] = []
        self._faults: list[str] = []
        self._error = ""
        self._watched: Watched | None = None
        self._next_write = 0.0
        self._rank = self.launch.rank
        self._may_raise = options.on_finding == "raise"
        self._lock = threading.RLock()
        paths = dict.fromkeys(path.absolute() for path in (options.json or self.launch.file, self.launch.file))
        self._files = [FindingsFile(path, self.launch.run) for path in paths]
        self._writable = list(self._files)
        self.findings_file = self._files[0]
        self.is_alone = False
        self._has_left = False
        self.has_said = False

    def open(self) -> Session:
        """Make sure that the answer can be written; write the empty JSON file, so that there is one in any case.

        Raises:
            OSError: A file cannot be written.
            ValueError: A file is something that must not be replaced.
            BusyError: Another watch that is still running writes to the same file.
            RuntimeError: Another watch is running in this process.
        """
        if Session._running is not None:
            raise RuntimeError("Another ddpcall watch is running in this process; leave it before starting one.")
        for path, option in ((self.options.json, "--json"), (self.options.sarif, "--sarif")):
            if path is not None:
                check_output(path, option)
        if self._is_shared():
            begins = self.launch.begins_run and self.launch.spans_hosts
            self.findings_file.hold_presence(self.launch.writer, self.script, begins)
            self.findings_file.write(self.launch.writer, [], self.watched)
        return self

    def start(self) -> Session:
        """Attach to torch.

        Raises:
            ImportError: torch is missing or too old.
        """
        require_torch()
        from ddpcall.watch.attach import Attachment

        self._attachment = Attachment(
            self.book,
            missing=self.note_missing,
            every=self.options.every,
            hang_after_s=self.options.hang_after,
            vitals_taken=self._keep_up,
        )
        if Session._running is None and not Session._follows_forks:
            Session._follows_forks = True
            os.register_at_fork(after_in_child=Session._forked)
        Session._running = self
        self._keep_up()
        return self

    @staticmethod
    def is_running() -> bool:
        """Say whether a watch is on torch in this process."""
        return Session._running is not None

    @property
    def is_attached(self) -> bool:
        """Whether the watch is on torch now."""
        return self._attachment is not None

    def note_missing(self, part: str, error: Exception) -> None:
        """Keep, and say on rank 0, that a part of the watch could not attach; the others are there."""
        if part in self.not_attached:
            return
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        self.not_attached[part] = reason
        if self.launch.rank == 0:
            say(f"ddpcall watch: not watched: {part} ({reason})")

    def __enter__(self) -> Session:
        """Watch until the block ends."""
        return self if self._attachment is not None else self.open().start().adopt()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching; an exception of the block goes on its way."""
        if error is not None:
            self.explain_crash(error)
        self.close(in_order=error is None)

    def explain_crash(self, error: BaseException) -> None:
        """Record what the watch knows about the exception that ends the script; none of its own comes after."""
        self._may_raise = False
        self._error = type(error).__name__
        if self._attachment is not None:
            self._attachment.explain_crash(error)

    def note_fault(self, error: Exception) -> None:
        """Keep an error of the watch's own at the end; a rank that could not leave in order reports by itself."""
        self._faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
        if not self._has_left:
            self.is_alone = True
            self._collected = self.findings, self.watched

    def note_exit(self, code: Any) -> None:
        """Keep the exit code of a script that failed, where no exception ended it."""
        self._error = self._error or (f"exit code {code}" if isinstance(code, int) else "an error message")

    def adopt(self, model: nn.Module | None = None) -> Session:
        """Watch a model that was wrapped before the watch began; without one, all that live in this process."""
        assert self._attachment is not None, "start() comes first"
        if model is None:
            self._attachment.adopt_living()
        else:
            self._attachment.adopt(model)
        return self

    @property
    def findings(self) -> list[Finding]:
        """What this rank has found so far."""
        return self.book.findings()

    @property
    def watched(self) -> Watched:
        """What this rank has watched so far; after the end, all that it has."""
        if self._attachment is not None:
            self._watched = self._attachment.look(self._standing())
        record = self._watched or self._standing()
        return dataclasses.replace(
            record,
            not_attached=dict(self.not_attached),
            not_written=tuple(self._not_written),
            faults=(*record.faults, *self._faults),
            error=self._error,
            ended=not self._is_open,
        )

    def _standing(self) -> Watched:
        """Return what is known of this rank's place before anything is watched."""
        launch = self.launch
        # A process group may be of this rank alone, whatever the launcher started.
        is_told = launch.num_ranks > 1 or self._attachment is None
        return Watched(
            script=self.script,
            ranks=(launch.rank if is_told else self.rank,),
            world_size=launch.num_ranks,
            elsewhere=launch.ranks_elsewhere,
            idle_ranks=(launch.rank,),
            started_alone=is_started_alone(),
        )

    def collect(self) -> tuple[list[Finding], Watched]:
        """Return what the ranks of this host and processes they spawned have found and watched so far, merged."""
        if self._collected is not None:
            return self._collected
        contents = Contents()
        for file in self._files:
            contents.update(file.read())
        contents.update(Contents({self.launch.writer: self.findings}, {self.launch.writer: self.watched}))
        if self.launch.spans_hosts:  # other hosts may go on still, and say themselves what they watched
            here = self.launch.on_host | {self.launch.writer}
            contents.watched = {a: each for a, each in contents.watched.items() if a.partition(".")[0] in here}
        return contents.merged()

    def all_findings(self) -> list[Finding]:
        """What the ranks of this host, and processes they spawned, have found so far, merged."""
        return self.collect()[0]

    def answer(self) -> Answer:
        """Say what was watched, and whether that is enough for "no findings" to mean something."""
        return weigh(self.collect()[1])

    def close(self, in_order: bool = True, stays: bool = False) -> None:
        """Detach, and leave this rank's last word in the findings file.

        Args:
            in_order: Whether the script came to its end; where it did not, no other rank is waited for.
            stays: Whether the process ends soon, and other ranks are to see when it has.

        Raises:
            WatchError: With `on_finding="raise"`, for what only the end of the run showed.
        """
        try:
            if self._attachment is not None:
                Session._running = None
                self._attachment.close(in_order, is_over=stays)
        finally:
            if self._attachment is not None:
                self._watched = self._attachment.look(self._standing())
                self._attachment = None
            if self._is_open:
                self._is_open = False
                self._await_children(CHILDREN_LEAVE_S if in_order else FAILED_LEAVE_S)
                self._leave()
            if not stays:
                self.findings_file.release_presence()

    def _await_children(self, patience_s: float) -> None:
        """Wait for ranks that this process started: they are at their end too, and about to say what they found.

        Args:
            patience_s: Seconds after which the wait ends all the same.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            present = (
                self.findings_file.find_present(self.launch.writer) if self.findings_file.has_begun() else set()
            )
            if not any(is_running(writer.rsplit(".", 1)[1]) for writer in present):
                return
            time.sleep(0.01)

    def _leave(self) -> None:
        """Say the last word; the last of this host to do so collects what all have said, and clears up.

        A rank whose last word nobody can read reports by itself, with what it can read.
        """
        writer = self.launch.writer
        said = self._write(done=True) if self._is_shared() else WriteResult(set(), {writer})
        self.is_alone = said is None
        reporter = self.launch.reporter
        if reporter is not None and not is_running(reporter):  # it died: what is left of the run reports
            left = not self.findings_file.find_present(self.launch.above)
        else:
            expected = self.launch.on_host
            if self._watched is not None and self._watched.process_group >= len(self.launch.everywhere):
                # All ranks are there: one that has not come to this file is not watched, or writes another.
                expected &= self.findings_file.writers()
            left = bool(self.launch.on_host) and (said is None or expected <= said.done | {writer})
        self._has_left = True
        if not left:
            return
        self._collected = self.collect()
        if said is not None:
            self._clear_up(said.done)

    def _clear_up(self, done: set[str]) -> None:
        assert self._collected is not None
        findings, watched = self._collected
        if self.launch.may_restart and watched.error:
            return
        is_kept = self.options.json is not None or bool(self._withheld_code())
        if self._not_written:  # what the other file holds, this one may hold now
            try:
                self.findings_file.publish(findings, watched)
            except OSError:
                self._files[-1].remove_state(keep=True)
                return
        for file in self._files[1:]:
            file.remove_state(keep=False)
        if not is_kept:
            self.findings_file.remove_state(keep=False)
        elif not self.launch.spans_hosts or self.launch.everywhere <= done:
            self.findings_file.remove_state(keep=True)

    @staticmethod
    def _forked() -> None:
        """Go on in a forked child as another writer: it may be a rank that `multiprocessing.Process` started."""
        session = Session._running
        if session is not None:
            session.launch = session.launch.forked()
            session._lock = threading.RLock()
            session.book.clear()
            session._watched = None
            session.has_said = False

    @staticmethod
    def abandon_inherited() -> None:
        """Detach, in a forked child, what it has from its parent: the run is the parent's."""
        session, Session._running = Session._running, None
        if session is not None and session._attachment is not None:
            session._attachment.detach()
            session._attachment = None
            session._is_open = False

    def keep(self, undo: Callable[[], None]) -> None:
        """Take an undo, for when the watch detaches."""
        assert self._attachment is not None, "start() comes first"
        self._attachment.keep(undo)

    def is_last(self) -> bool:
        """Say whether all ranks of this host have left: the last one reports. Nobody waits for anybody."""
        return self._collected is not None

    def report(self) -> int:
        """Write what other tools read, print what all ranks found, and return the exit code; raises nothing.

        Returns:
            1 where a finding reaches `fail_on`; 2 where none does and too little was watched, or the answer could
            not be written; else 0.
        """
        findings, watched = self.collect()
        conclusion = self._write_for_tools(findings, watched)

        def print_list(stream: TextIO) -> None:
            from ddpcall.watch.output.terminal import print_findings

            print_findings(findings, conclusion, stream)

        if not print_anywhere(print_list) and self.options.json is None:
            self._not_written.append("stderr and stdout")
        return self._exit_code()

    def _write_for_tools(self, findings: list[Finding], watched: Watched) -> str:
        """Write the SARIF log and GitHub's summary; return the last line, which tells of what could not be."""
        from ddpcall.watch.output import github, sarif

        if self.options.sarif is not None:
            self._try_to_write(str(self.options.sarif), sarif.write_sarif, findings, watched, self.options.sarif)
        conclusion = self._conclude()
        if self.options.github:
            print_anywhere(lambda stream: github.annotate(findings, stream))
            self._try_to_write("GITHUB_STEP_SUMMARY", github.append_summary, findings, conclusion)
        return self._conclude()

    def _try_to_write(self, name: str, write: Callable[..., None], *args: Any) -> None:
        try:
            write(*args)
        except Exception as error:
            self._not_written.append(f"{name} ({error})")

    def _conclude(self) -> str:
        """Return the last line of the answer."""
        findings, watched = self.collect()
        not_written = tuple(dict.fromkeys([*watched.not_written, *self._not_written]))
        line = text.conclude(findings, weigh(dataclasses.replace(watched, not_written=not_written)))
        code = self._withheld_code()
        if code:
            line += (
                f". Exit code {code} is withheld: with --max-restarts the launcher would train again. "
                f"The findings are in {self.findings_file.path}"
            )
        return line

    def _exit_code(self) -> int:
        if any(self.options.fails(finding.severity) for finding in self.all_findings()):
            return 1
        is_answer = self.answer().is_evidence and not self._not_written
        return 0 if is_answer or self.options.fail_on == "never" else 2

    def _withheld_code(self) -> int:
        """Return the exit code that would make the launcher train again what succeeded; 0 where there is none."""
        _, watched = self.collect()
        return self._exit_code() if self.launch.may_restart and not watched.error else 0

    def _is_shared(self) -> bool:
        return self.options.json is not None or len(self.launch.on_host) != 1 or self.findings_file.has_begun()

    @property
    def rank(self) -> int:
        """The process group's rank, also after it is gone; the launcher's where there was none."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            self._rank = dist.get_rank()
        return self._rank

    @property
    def stops(self) -> bool:
        """Whether a finding is raised where it is reported."""
        return self._may_raise

    def wants(self, finding: Finding) -> bool:
        """Say whether the user wants to hear of a finding."""
        return self.options.wants(finding)

    def republish(self) -> None:
        """Put on disk what is left after a finding was withdrawn."""
        with self._lock:
            if self._is_shared():
                self._write()

    def _write(self, done: bool = False) -> WriteResult | None:
        """Put on disk what was found: in the findings file; where that fails, in the temporary directory.

        Returns:
            What that changed; None where neither can be written. The run goes on all the same.
        """
        self.has_said = True
        for file in list(self._writable):
            try:
                said = file.write(self.launch.writer, self.findings, self.watched, done)
            except OSError as error:
                self._writable.remove(file)
                self._not_written.append(f"{file.path} ({error.strerror or error})")
                others = f"; findings go to {self._writable[0].path}" if self._writable else ""
                say(f"ddpcall watch: cannot write findings to {self._not_written[-1]}{others}")
            else:
                elsewhere = [other.read_done() for other in self._files if done and other is not file]
                return WriteResult(said.new, said.done.union(*elsewhere))
        return None

    def _keep_up(self) -> None:
        """Put on disk, at most once a second, what was watched: a rank that is killed has said it."""
        if self._is_shared() and time.monotonic() >= self._next_write:
            with self._lock:
                self._write()
                self._next_write = time.monotonic() + 1.0

    def publish(self, finding: Finding) -> None:
        """Put a finding on disk, and say it where no rank of this host has.

        Args:
            finding: With its count so far.

        Raises:
            WatchError: With `on_finding="raise"`, for one that is new on this rank.
        """
        is_new_here = is_new_anywhere = finding.count == 1
        with self._lock:
            if self._is_shared() and finding.count & (finding.count - 1) == 0:  # at 1, 2, 4, …: not at every step
                said = self._write()
                is_new_anywhere = is_new_here if said is None else key_of(finding) in said.new
        if not is_new_here:
            return
        if self._may_raise:
            raise WatchError(finding)
        if self.options.on_finding != "record" and is_new_anywhere:
            render = text.render_line if self.options.brief else text.render_text
            say(render(finding))


def watch(
    model: nn.Module | None = None,
    *,
    on_finding: str = "warn",
    json: str | Path | None = None,
    sarif: str | Path | None = None,
    every: int = 10,
    hang_after: float = 60.0,
    only: Any = (),
    ignore: Any = (),
) -> Session:
    """Start watching this process: models that are wrapped, compiled or hooked already, and all from now on.

    Args:
        model: A model that is wrapped already, or holds wrapped ones; for a process with so many objects that
            the search for it is given up.
        on_finding: `warn` prints once to stderr, `raise` raises WatchError where the harm is done, `record` only
            collects in `session.findings`.
        json: File for the findings, kept up to date as they happen.
        sarif: File for the same in SARIF 2.1.0, written by `session.report()`.
        every: Ranks compare vitals every so many optimizer steps; 0 for never.
        hang_after: Seconds in a collective after which it is said where all ranks are; 0 for never.
        only: Codes to report; all others are left out.
        ignore: Codes to leave out.

    Returns:
        The running session, a context manager; `session.close()` takes everything off again.

    Raises:
        ImportError: torch is missing or too old.
        ValueError: An option is not among those listed.
        RuntimeError: Another watch is running in this process.
    """
    options = Options(
        on_finding=on_finding,
        json=None if json is None else Path(json),
        sarif=None if sarif is None else Path(sarif),
        every=every,
        hang_after=hang_after,
        only=parse_codes(only),
        ignore=parse_codes(ignore),
    )
    if Session._running is not None and Session._running.launch.reporter is not None:  # pyright: ignore[reportPrivateUsage]
        # It began by itself, in a child of a watched process.
        Session._running.close()  # pyright: ignore[reportPrivateUsage]
    session = Session(options).open().start().adopt()
    if model is not None:
        session.adopt(model)
    return session
