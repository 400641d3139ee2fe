"""One watched run on this rank, start to end. Torch is imported when the watch attaches, not before."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ddpcall.findings import Finding
from ddpcall.watch import report
from ddpcall.watch.journal import Journal, Key, Said, key_of, merge_findings
from ddpcall.watch.launch import Launch, current_launch, is_running, is_started_alone
from ddpcall.watch.options import Options, parse_codes
from ddpcall.watch.report import WatchError
from ddpcall.watch.watched import Answer, Watched, merge_watched, weigh

if TYPE_CHECKING:
    from torch import nn

    from ddpcall.watch.attach import Attachment
    from ddpcall.watch.events import Event

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
        self._found: dict[Key, Finding] = {}
        self._attachment: Attachment | None = None
        self._collected: list[Finding] | None = None
        self._is_open = True
        self._has_failed = False
        self._error = ""
        self._watched: Watched | None = None
        self._all_watched: Watched | None = None
        self._next_write = 0.0
        self._rank = self.launch.rank
        self._may_raise = options.on_finding == "raise"
        self._lock = threading.RLock()
        self.has_said = False
        self.journal = Journal(options.json or self.launch.file, self.launch.run)

    def open(self) -> Session:
        """Write the empty JSON file, so that there is one whatever happens.

        Raises:
            OSError: It cannot be written.
        """
        if self.launch.begins_run and self.launch.spans_hosts and self._is_shared():
            self.journal.discard()
        if self.options.json is not None and self.launch.rank == 0:
            self.journal.write(self.launch.author, [], self.watched)
        return self

    def start(self) -> Session:
        """Attach to torch.

        Raises:
            RuntimeError: Another watch is running in this process.
        """
        if Session._running is not None:
            raise RuntimeError("Another ddpcall watch is running in this process; leave it before starting one.")
        from ddpcall.watch.attach import Attachment

        self._attachment = Attachment(
            self._receive,
            missing=self.note_missing,
            every=self.options.every,
            compared=self._record,
            withdraw=self._withdraw,
            retract=self._retract,
            explained=self._is_divergence_explained,
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
            print(f"ddpcall watch: not watched: {part} ({reason})", file=sys.stderr, flush=True)

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
        return merge_findings(self._found.values())

    @property
    def watched(self) -> Watched:
        """What this rank has watched so far; after the end, all that it has."""
        if self._attachment is not None:
            self._watched = self._attachment.look(self._standing())
        record = self._watched or self._standing()
        ended = {"error": self._error, "ended": not self._is_open}
        return dataclasses.replace(record, not_attached=dict(self.not_attached), **ended)

    def _standing(self) -> Watched:
        """Return what is known of this rank's place before anything is watched."""
        launch = self.launch
        # A process group may be of this rank alone, whatever the launcher started.
        is_told = launch.num_ranks > 1 or self._attachment is None
        return Watched(
            script=self.script,
            ranks=(launch.rank if is_told else self._this_rank(),),
            world_size=launch.num_ranks,
            elsewhere=launch.ranks_elsewhere,
            idle_ranks=(launch.rank,),
            started_alone=is_started_alone(),
        )

    def all_watched(self) -> Watched:
        """What the ranks of this host, and processes they spawned, have watched so far, merged."""
        if self._all_watched is not None:
            return self._all_watched
        return merge_watched({**self.journal.read_watched(), self.launch.author: self.watched}.values())

    def answer(self) -> Answer:
        """Say what that amounts to: whether "no findings" means something."""
        return weigh(self.all_watched())

    def all_findings(self) -> list[Finding]:
        """What the ranks of this host, and processes they spawned, have found so far, merged."""
        if self._collected is not None:
            return self._collected
        return merge_findings([*self.findings, *self.journal.read()])

    def close(self, in_order: bool = True) -> None:
        """Detach, and leave this rank's last word in the journal.

        Args:
            in_order: Whether the script came to its end; where it did not, no other rank is waited for.

        Raises:
            WatchError: With `on_finding="raise"`, for what only the end of the run showed.
        """
        try:
            if self._attachment is not None:
                Session._running = None
                self._attachment.close(in_order)
        finally:
            if self._attachment is not None:
                self._watched = self._attachment.look(self._standing())
                self._attachment = None
            if self._is_open:
                self._is_open = False
                self._await_children(CHILDREN_LEAVE_S if in_order else FAILED_LEAVE_S)
                self._leave()

    def _await_children(self, patience_s: float) -> None:
        """Wait for ranks that this process started: they are at their end too, and about to say what they found.

        Args:
            patience_s: Seconds after which the wait ends all the same.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            present = self.journal.find_present(self.launch.author) if self.journal.has_begun() else set()
            if not any(is_running(author.rsplit(".", 1)[1]) for author in present):
                return
            time.sleep(0.01)

    def _leave(self) -> None:
        """Say the last word; the last of this host to do so collects what all have said, and clears up."""
        author = self.launch.author
        done = self._write(done=True).done if self._is_shared() else {author}
        reporter = self.launch.reporter
        if reporter is not None and not is_running(reporter):  # it died: what is left of the run reports
            left = not self.journal.find_present(self.launch.above)
        else:
            left = bool(self.launch.on_host) and self.launch.on_host <= done | {author}
        if not left:
            return
        self._all_watched = self.all_watched()
        self._collected = self.all_findings()
        if self.launch.may_restart:
            return
        if self.options.json is None:
            self.journal.remove_state(keep=False)
        elif not self.launch.spans_hosts or self.launch.everywhere <= done:
            self.journal.remove_state(keep=True)

    @staticmethod
    def _forked() -> None:
        """Go on in a forked child as another author: it may be a rank that `multiprocessing.Process` started."""
        session = Session._running
        if session is not None:
            session.launch = session.launch.forked()
            session._lock = threading.RLock()
            session._found = {}
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

    def report(self) -> None:
        """Print what all ranks found to stderr, and write what other tools read."""
        from ddpcall.watch.terminal import print_findings

        findings = self.all_findings()
        conclusion = report.conclude(findings, self.answer())
        print_findings(findings, conclusion, sys.stderr)
        if self.options.sarif is not None:
            from ddpcall.watch.sarif import write_sarif

            write_sarif(findings, self.options.sarif)
        if self.options.github:
            from ddpcall.watch import github

            github.annotate(findings, sys.stderr)
            github.append_summary(findings, conclusion)

    def exit_code(self) -> int:
        """Return 1 where a finding reaches `fail_on`, 2 where none does and too little was watched, else 0."""
        if any(self.options.fails(finding.severity) for finding in self.all_findings()):
            return 1
        return 0 if self.answer().is_evidence or self.options.fail_on == "never" else 2

    def _is_shared(self) -> bool:
        return self.options.json is not None or len(self.launch.on_host) != 1 or self.journal.has_begun()

    def _receive(self, event: Event) -> None:
        from ddpcall.watch.diagnose import diagnose

        self._record(diagnose(event, self._this_rank()))

    def _retract(self, event: Event) -> None:
        from ddpcall.watch.diagnose import diagnose

        self._withdraw(diagnose(event, self._this_rank()))

    def _this_rank(self) -> int:
        """Return the process group's rank, also after it is gone; the launcher's where there was none."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            self._rank = dist.get_rank()
        return self._rank

    def _is_divergence_explained(self) -> bool:
        return any(finding.code < "DC2" for finding in self.all_findings())

    def _withdraw(self, finding: Finding) -> None:
        with self._lock:
            if self._found.pop(key_of(finding), None) is not None and self._is_shared():
                self._write()

    def _write(self, done: bool = False) -> Said:
        """Put on disk what was found; where that fails it is said once, and the run goes on."""
        self.has_said = True
        try:
            return self.journal.write(self.launch.author, list(self._found.values()), self.watched, done)
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                print(f"ddpcall watch: cannot write findings to {self.journal.path}: {error}", file=sys.stderr)
            return Said(set(self._found), set())

    def _keep_up(self) -> None:
        """Put on disk, at most once a second, what was watched: a rank that is killed has said it."""
        if self._is_shared() and time.monotonic() >= self._next_write:
            with self._lock:
                self._write()
                self._next_write = time.monotonic() + 1.0

    def _record(self, finding: Finding, in_haste: bool = False) -> None:
        """Keep a finding, put it on disk and say it; of one found in haste nothing is said: a better follows."""
        if not self.options.wants(finding):
            return
        with self._lock:
            key = key_of(finding)
            known = self._found.get(key)
            count = 1 if known is None else known.count + 1
            merged = finding if known is None else merge_findings([known, finding])[0]
            self._found[key] = dataclasses.replace(merged, count=count)
            is_new_here = known is None
            is_new_anywhere = is_new_here
            if self._is_shared() and count & (count - 1) == 0:  # at 1, 2, 4, …: not at every step
                is_new_anywhere = key in self._write().new
        if not is_new_here or in_haste:
            return
        if self._may_raise:
            raise WatchError(finding)
        if self.options.on_finding != "record" and is_new_anywhere:
            render = report.render_line if self.options.brief else report.render_text
            print(render(finding), file=sys.stderr, flush=True)


def watch(
    model: nn.Module | None = None,
    *,
    on_finding: str = "warn",
    json: str | Path | None = None,
    sarif: str | Path | None = None,
    every: int = 10,
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
        only: Codes to report; all others are left out.
        ignore: Codes to leave out.

    Returns:
        The running session, a context manager; `session.close()` takes everything off again.

    Raises:
        ValueError: An option is not among those listed.
        RuntimeError: Another watch is running in this process.
    """
    options = Options(
        on_finding=on_finding,
        json=None if json is None else Path(json),
        sarif=None if sarif is None else Path(sarif),
        every=every,
        only=parse_codes(only),
        ignore=parse_codes(ignore),
    )
    if Session._running is not None and Session._running.launch.reporter is not None:
        Session._running.close()  # it began by itself, in a child of a watched process
    session = Session(options).open().start().adopt()
    if model is not None:
        session.adopt(model)
    return session
