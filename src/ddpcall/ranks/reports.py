"""One pytest report per phase out of those of all ranks.

A test passes when it passes on every rank. It fails when any rank fails, dies, hangs or leaks, with the cause
shown first; it is skipped when any rank skips and none fails on its own account. A rank that only lost its peer
(because that one skipped, or failed as an xfail expects) does not count as failed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from _pytest._code.code import ReprEntryNative, ReprExceptionInfo, ReprFileLocation, ReprTraceback

from ddpcall.ranks.outcomes import RankOutcome, describe_failure, is_consequence, split_causes
from ddpcall.ranks.rank_session import RankTestResult

_STRICT_XPASS = "[XPASS(strict)]"


@dataclass(frozen=True)
class RankTest:
    """One rank's part of a test: how the task ended, and pytest's reports by phase if it got that far."""

    outcome: RankOutcome
    reports: dict[str, pytest.TestReport]
    failed_s: dict[str, float]

    @property
    def rank(self) -> int:
        """The rank whose part this is."""
        return self.outcome.rank

    def failure(self, phases: Sequence[str]) -> RankOutcome | None:
        """This rank's first failure in these phases, as the pool would describe it."""
        for phase in phases:
            report = self.reports.get(phase)
            if report is not None and report.failed:
                return RankOutcome(
                    self.rank,
                    "raised",
                    error=_error_line(report),
                    details=report.longreprtext,
                    ended_s=self.failed_s.get(phase, 0.0),
                )
        if "call" in phases and self.outcome.ending in ("raised", "died", "hung"):
            return _without_output(self.outcome)
        if "teardown" in phases and self.outcome.ending == "leaked":
            return _without_output(self.outcome)
        return None


def _without_output(outcome: RankOutcome) -> RankOutcome:
    """Output goes into the report's sections instead."""
    return RankOutcome(
        outcome.rank, outcome.ending, error=outcome.error, details=outcome.details, ended_s=outcome.ended_s
    )


def _error_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else report.longreprtext.strip() or "failed"


def read_rank_test(outcome: RankOutcome, config: pytest.Config) -> RankTest:
    """Turn what came back from a rank into reports."""
    result = outcome.value
    if not isinstance(result, RankTestResult):
        return RankTest(outcome, {}, {})
    if result.error:
        failed = RankOutcome(
            outcome.rank,
            "raised",
            error="the test cannot be collected on this rank",
            details=result.error,
            ended_s=outcome.ended_s,
            stdout=outcome.stdout,
            stderr=outcome.stderr,
        )
        return RankTest(failed, {}, {})
    restore = config.hook.pytest_report_from_serializable
    reports = [restore(config=config, data=data) for data in result.reports]
    return RankTest(outcome, {report.when: report for report in reports}, result.failed_s)


def merge_reports(
    item: pytest.Item, tests: Sequence[RankTest], duration_s: float, *, expects_failure: str | None
) -> list[pytest.TestReport]:
    """Merge the ranks' reports into those of one test.

    Args:
        item: the test.
        tests: one entry per rank.
        duration_s: wall time of the whole task in seconds, the duration where no rank reports one.
        expects_failure: reason of an xfail mark that also covers ranks that die or hang, None without one.

    Returns:
        Reports of setup, call (unless the setup failed or skipped) and teardown, in this order.
    """
    body = _merge_body(item, tests, duration_s, expects_failure)
    teardown = _merge_teardown(item, tests)
    for report in (*body, teardown):
        report.sections = _merge_sections(tests, str(report.when))
    body[-1].user_properties = _merge_properties(tests)
    return [*body, teardown]


def _merge_body(
    item: pytest.Item, tests: Sequence[RankTest], duration_s: float, expects_failure: str | None
) -> list[pytest.TestReport]:
    failures = {test.rank: failure for test in tests if (failure := test.failure(("setup", "call")))}
    causes = [o for o in failures.values() if not is_consequence(o.error) and _STRICT_XPASS not in o.error]
    if causes and expects_failure is not None and all(o.ending in ("died", "hung") for o in causes):
        return _expect_failure(item, tests, duration_s, expects_failure)
    if not causes and (skip := _merge_skips(item, tests)):
        return skip
    if failures:
        return _fail(item, tests, failures, duration_s)
    setup = _pass(item, tests, "setup", 0.0)
    call = _pass(item, tests, "call", duration_s)
    if expected := [t.reports["call"].wasxfail for t in tests if hasattr(t.reports["call"], "wasxfail")]:
        call.wasxfail = expected[0]
    return [setup, call]


def _fail(
    item: pytest.Item, tests: Sequence[RankTest], failures: dict[int, RankOutcome], duration_s: float
) -> list[pytest.TestReport]:
    outcomes = [failures.get(test.rank, RankOutcome(test.rank, "returned")) for test in tests]
    first = split_causes(outcomes)[0][0]
    in_setup = any(t.rank == first.rank and "setup" in t.failed_s for t in tests)
    longrepr = _represent(item, outcomes, first)
    if in_setup:
        return [_make(item, "setup", "failed", _duration(tests, "setup", duration_s), longrepr)]
    call = _make(item, "call", "failed", _duration(tests, "call", duration_s), longrepr)
    return [_pass(item, tests, "setup", 0.0), call]


def _merge_skips(item: pytest.Item, tests: Sequence[RankTest]) -> list[pytest.TestReport]:
    """The report of a skip or an expected failure on any rank; empty if there is neither."""
    found = [(t.rank, r) for t in tests for r in t.reports.values() if r.skipped and r.when != "teardown"]
    if not found:
        return []
    expected = [report for _, report in found if hasattr(report, "wasxfail")]
    chosen = expected[0] if expected else found[0][1]
    phase = str(chosen.when)
    report = _make(item, phase, "skipped", _duration(tests, phase, 0.0), chosen.longrepr)
    if expected:
        report.wasxfail = chosen.wasxfail
    elif len(found) < len(tests) and isinstance(chosen.longrepr, tuple):
        path, line, reason = chosen.longrepr
        ranks = ", ".join(str(rank) for rank, _ in found)
        report.longrepr = (path, line, f"{reason} (only on rank {ranks} of {len(tests)})")
    return [report] if phase == "setup" else [_pass(item, tests, "setup", 0.0), report]


def _expect_failure(
    item: pytest.Item, tests: Sequence[RankTest], duration_s: float, reason: str
) -> list[pytest.TestReport]:
    call = _make(item, "call", "skipped", duration_s, None)
    call.wasxfail = f"reason: {reason}" if reason else ""
    return [_pass(item, tests, "setup", 0.0), call]


def _merge_teardown(item: pytest.Item, tests: Sequence[RankTest]) -> pytest.TestReport:
    failures = {test.rank: failure for test in tests if (failure := test.failure(("teardown",)))}
    if not failures:
        return _pass(item, tests, "teardown", 0.0)
    outcomes = [failures.get(test.rank, RankOutcome(test.rank, "returned")) for test in tests]
    longrepr = _represent(item, outcomes, split_causes(outcomes)[0][0])
    return _make(item, "teardown", "failed", _duration(tests, "teardown", 0.0), longrepr)


def _represent(item: pytest.Item, outcomes: Sequence[RankOutcome], first: RankOutcome) -> ReprExceptionInfo:
    """A failure that terminals, junit XML and xdist can all handle; the summary line names the rank."""
    lines = f"{describe_failure(item.name, outcomes)}\n".splitlines(keepends=True)
    path, line, _ = item.reportinfo()
    headline = next(iter(first.error.splitlines()), first.ending)
    return ReprExceptionInfo(
        reprtraceback=ReprTraceback([ReprEntryNative(lines)], extraline=None, style="native"),
        reprcrash=ReprFileLocation(str(path), (line or 0) + 1, f"[rank {first.rank}] {headline}"),
    )


def _make(item: pytest.Item, when: str, outcome: Any, duration_s: float, longrepr: Any) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=outcome,
        longrepr=longrepr,
        when=when,  # pyright: ignore[reportArgumentType]
        duration=duration_s,
    )


def _pass(item: pytest.Item, tests: Sequence[RankTest], when: str, duration_s: float) -> pytest.TestReport:
    return _make(item, when, "passed", _duration(tests, when, duration_s), None)


def _duration(tests: Sequence[RankTest], when: str, default_s: float) -> float:
    """The slowest rank's."""
    return max((test.reports[when].duration for test in tests if when in test.reports), default=default_s)


def _merge_sections(tests: Sequence[RankTest], when: str) -> list[tuple[str, str]]:
    """What was captured in a phase, each title with its rank; the files' text where a rank gave no report."""
    sections = []
    for test in tests:
        if report := test.reports.get(when):
            sections += [(f"{title} [rank {test.rank}]", text) for title, text in report.sections if text]
        elif when == "call" and not test.reports:
            streams = (("stdout", test.outcome.stdout), ("stderr", test.outcome.stderr))
            sections += [(f"Captured {name} call [rank {test.rank}]", text) for name, text in streams if text]
    return sections


def _merge_properties(tests: Sequence[RankTest]) -> list[tuple[str, object]]:
    """What `record_property` recorded, once where the ranks agree."""
    merged: list[tuple[str, object]] = []
    for test in tests:
        for report in test.reports.values():
            merged += [pair for pair in report.user_properties if pair not in merged]
    return merged
