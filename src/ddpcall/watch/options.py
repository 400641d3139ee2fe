"""What a watch is asked to do. No torch: the command line is parsed before the script's imports."""

from __future__ import annotations

import linecache
import re
from dataclasses import dataclass
from pathlib import Path

from ddpcall.findings import Finding, Severity, find_rule

ON_FINDING = ("warn", "raise", "record")
FAIL_ON = ("error", "warning", "never")
_IGNORE = re.compile(r"#\s*ddpcall:\s*ignore(?:\[([^\]]*)\])?")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of one watch.

    Attributes:
        on_finding: `warn` (a message on stderr, once), `raise` (WatchError where the harm is done) or `record`.
        json: File for the findings, kept up to date as they happen; None for none.
        sarif: File for the same in SARIF 2.1.0, written at the end.
        every: Ranks compare vitals every so many optimizer steps; 0 for never.
        hang_after: Seconds in a collective after which it is said where all ranks are; 0 for never.
        only: Codes or names to report; empty for all.
        ignore: Codes or names not to report.
        fail_on: The least severity that makes a successful script exit with 1.
        brief: With `warn`, say one line when it happens: a list at the end says the rest.
        children: Whether ranks that the script starts itself are watched too.
        github: Write annotations and the job's summary for GitHub Actions at the end.
    """

    on_finding: str = "warn"
    json: Path | None = None
    sarif: Path | None = None
    every: int = 10
    hang_after: float = 60.0
    only: frozenset[str] = frozenset()
    ignore: frozenset[str] = frozenset()
    fail_on: str = "error"
    brief: bool = False
    children: bool = True
    github: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: One is not among those listed.
        """
        for name, allowed in (("on_finding", ON_FINDING), ("fail_on", FAIL_ON)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; write one of {', '.join(allowed)}.")
        if self.every < 0:
            raise ValueError(f"every is {self.every}; write a number of optimizer steps, or 0 to compare nothing.")
        if not 0 <= self.hang_after < float("inf"):
            raise ValueError(f"hang_after is {self.hang_after}; write a number of seconds, or 0 for never.")

    def wants(self, finding: Finding) -> bool:
        """Say whether a finding is to be reported: by code, and by a comment on its line."""
        if finding.code in self.ignore or (self.only and finding.code not in self.only):
            return False
        return not is_ignored_inline(finding)

    def fails(self, severity: str) -> bool:
        """Say whether a severity reaches `fail_on`."""
        return self.fail_on != "never" and Severity(severity).rank >= Severity(self.fail_on).rank


def parse_codes(text: str | frozenset[str] | set[str] | list[str] | tuple[str, ...]) -> frozenset[str]:
    """Return the codes named in `DC101,replicas-diverged` or a collection of such.

    Raises:
        ValueError: There is no such finding.
    """
    names = text.split(",") if isinstance(text, str) else text
    return frozenset(find_rule(name).code for name in names if name.strip())


def is_ignored_inline(finding: Finding) -> bool:
    """Say whether the finding's line says `# ddpcall: ignore[DC101] reason`; without brackets, any code.

    So may the user's line that led into an installed library.
    """
    places = [(finding.file, finding.line)]
    if finding.called_from is not None:
        places.append((finding.called_from.file, finding.called_from.line))
    matches = [_IGNORE.search(linecache.getline(file, line)) for file, line in places if line]
    return any(
        match is not None and (match[1] is None or finding.code in parse_codes(match[1])) for match in matches
    )
