"""One watched run on this rank, start to end."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall.findings import Finding
from ddpcall.watch import report
from ddpcall.watch.attach import Attachment
from ddpcall.watch.diagnose import diagnose
from ddpcall.watch.events import Event
from ddpcall.watch.journal import Journal, Key, key_of, merge_findings
from ddpcall.watch.options import Options, parse_codes
from ddpcall.watch.report import WatchError

__all__ = ["Session", "WatchError", "watch"]


class Session:
    """Watches this process from `start` to `close`."""

    def __init__(self, options: Options) -> None:
        """Take the options; nothing is attached yet."""
        self.options = options
        self._found: dict[Key, Finding] = {}
        self._attachment: Attachment | None = None
        self._is_last = False
        self._lock = threading.RLock()
        self._journal = Journal(options.json or _default_path(), run_id())

    def start(self) -> Session:
        """Attach to torch, and write the empty JSON file.

        Raises:
            RuntimeError: Another watch is running in this process.
        """
        if Session._running is not None:
            raise RuntimeError("Another ddpcall watch is running in this process; leave it before starting one.")
        self._attachment = Attachment(
            self._receive,
            every=self.options.every,
            compared=self._record,
            withdraw=self._withdraw,
            retract=lambda event: self._withdraw(diagnose(event, this_rank())),
            explained=self._is_divergence_explained,
        )
        Session._running = self
        if self.options.json is not None and this_rank() == 0:
            self._journal.write(0, [])
        return self

    _running: Session | None = None

    def __enter__(self) -> Session:
        """Watch until the block ends."""
        return self if self._attachment is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching; an exception of the block goes on its way."""
        if error is not None:
            self.explain_crash(error)
        self.close(in_order=error is None)

    def explain_crash(self, error: BaseException) -> None:
        """Record what the watch knows about the exception that ends the script."""
        if self._attachment is not None:
            self._attachment.explain_crash(error)

    def adopt(self, model: nn.Module) -> None:
        """Watch a model that was wrapped before the watch began."""
        assert self._attachment is not None, "start() comes first"
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                self._attachment.adopt(module)

    @property
    def findings(self) -> list[Finding]:
        """What this rank has found so far."""
        return merge_findings(self._found.values())

    def all_findings(self) -> list[Finding]:
        """What the ranks of this host have found so far, merged."""
        return self._journal.read() if self._is_shared() else self.findings

    def close(self, in_order: bool = True) -> None:
        """Detach, and leave this rank's last word in the journal.

        Args:
            in_order: Whether the script came to its end; where it did not, no other rank is waited for.
        """
        if self._attachment is None:
            return
        attachment, self._attachment = self._attachment, None
        Session._running = None
        try:
            attachment.close(in_order)
        finally:
            if self._is_shared():
                done = self._journal.write(this_rank(), self.findings, done=True).done
                self._is_last = local_ranks() <= done

    def is_last(self) -> bool:
        """Say whether all ranks of this host have left: the last one reports. Nobody waits for anybody."""
        return not self._is_shared() or self._is_last

    def report(self) -> None:
        """Print what all ranks found to stderr, and write the SARIF file."""
        from ddpcall.watch.terminal import print_findings

        findings = self.all_findings()
        print_findings(findings, sys.stderr)
        if self.options.sarif is not None:
            report.write_sarif(findings, self.options.sarif)
        if self._is_shared():
            self._journal.remove_state(keep=self.options.json is not None)

    def reaches_failure(self) -> bool:
        """Say whether a finding reaches `fail_on`."""
        return any(self.options.fails(finding.severity) for finding in self.all_findings())

    def _is_shared(self) -> bool:
        return self.options.json is not None or len(local_ranks()) > 1

    def _receive(self, event: Event) -> None:
        self._record(diagnose(event, this_rank()))

    def _is_divergence_explained(self) -> bool:
        return any(finding.code < "DC2" for finding in self.all_findings())

    def _withdraw(self, finding: Finding) -> None:
        with self._lock:
            if self._found.pop(key_of(finding), None) is not None and self._is_shared():
                self._journal.write(this_rank(), self._found.values())

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
                is_new_anywhere = key in self._journal.write(this_rank(), self._found.values()).new
        if not is_new_here or in_haste:
            return
        if self.options.on_finding == "raise":
            raise WatchError(finding)
        if self.options.on_finding == "warn" and is_new_anywhere:
            print(report.render_text(finding), file=sys.stderr, flush=True)


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
    """Start watching this process; every model wrapped from now on is watched, and `model` if given.

    Args:
        model: A model that is wrapped already, or holds wrapped ones.
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
    session = Session(options).start()
    if model is not None:
        session.adopt(model)
    return session


def this_rank() -> int:
    """Return this process's rank: the process group's, or the launcher's, or 0."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def local_ranks() -> set[int]:
    """Return the ranks that the launcher started on this host."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    first = int(os.environ.get("RANK", 0)) - int(os.environ.get("LOCAL_RANK", 0))
    return set(range(first, first + count))


def run_id() -> str:
    """Return an id that the ranks of one launch share and no other launch has."""
    parts = [
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    ]
    launcher = os.getppid() if len(local_ranks()) > 1 else os.getpid()
    return "-".join([*parts, str(launcher)])


def _default_path() -> Path:
    name = "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in run_id())
    return Path(tempfile.gettempdir()) / f"ddpcall-{os.getuid()}-{name}.json"
