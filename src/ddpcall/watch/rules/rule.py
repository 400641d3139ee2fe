"""What every rule is: told of backwards, of steps and of the end, it reports findings into the run's book."""

from __future__ import annotations

from typing import Any

from ddpcall.findings import CATALOGUE, Finding, Place, Severity
from ddpcall.taps import CallSite, Undo
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.clipping import Clipping
from ddpcall.watch.sensors.steps import Step


class Rule:
    """A family of findings: when there is one, what is said, what to write instead, and what it cannot see."""

    part = ""
    """What its sensor watches, in plain words; empty for a rule that has none of its own."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def attach(self) -> Undo:
        """Attach its sensor; returns the undo."""
        raise NotImplementedError

    def report(self, code: str, cause: str, site: CallSite, message: str, *, step: int = 0, **more: Any) -> None:
        """Report a finding; see `make_finding`. Without a step it is of the one that is being prepared."""
        step = step or self._run.steps.preparing()
        self._run.book.report(make_finding(code, cause, site, message, step=step, **more))

    def before_backward(self) -> None:
        """A backward that accumulates gradients is about to run."""

    def clipping(self, clipping: Clipping) -> None:
        """Gradients are about to be clipped."""

    def before_step(self, step: Step) -> None:
        """An optimizer is about to step; gradients may be made or reduced still."""

    def judge(self, step: Step) -> None:
        """The gradients are what the optimizer uses: before the step, or after it where they are made in it."""

    def after_step(self, step: Step) -> None:
        """An optimizer has stepped."""

    def close(self, in_order: bool) -> None:
        """The run is over.

        Args:
            in_order: Whether the script came to its end; other ranks are not waited for where it did not.
        """


def make_finding(
    code: str,
    cause: str,
    site: CallSite,
    message: str,
    *,
    step: int,
    ranks: tuple[int, ...] = (),
    parameters: tuple[str, ...] = (),
    fix: str = "",
    severity: Severity | None = None,
) -> Finding:
    """Return a finding, with what the catalogue has of its code.

    Args:
        code: DC and three digits.
        cause: One word for the mechanism.
        site: The user's line to blame.
        message: What happened, with numbers.
        step: Optimizer step, from 1, in which it did harm.
        ranks: None for this rank.
        parameters: Names of those concerned, as in the wrapped module's `state_dict`.
        fix: What to write instead, where the catalogue's is too general.
        severity: Where it differs from the catalogue's.
    """
    entry, caller = CATALOGUE[code], site.called_from
    return Finding(
        code=code,
        name=entry.name,
        severity=severity or entry.severity,
        message=message,
        file=site.file,
        line=site.line,
        function=site.function,
        ranks=ranks,
        step=step,
        parameters=parameters,
        cause=cause,
        fix=fix or entry.fix,
        called_from=None if caller is None else Place(caller.file, caller.line, caller.function),
    )


def count_parameters(names: tuple[str, ...]) -> str:
    """Return `1 parameter`, `2 parameters`."""
    return f"{len(names)} parameter{'s' * (len(names) != 1)}"


def and_lines(site: CallSite, others: tuple[CallSite, ...]) -> str:
    """Return ` (and lines 3, 5)` for further lines of the same file."""
    lines = sorted({other.line for other in others if other.file == site.file} - {site.line})
    return f" (and line{'s' * (len(lines) > 1)} {', '.join(map(str, lines))})" if lines else ""
