"""Reruns that pytest-rerunfailures asks for: a test that failed runs again on all of its ranks together.

That plugin runs a test itself, in its own process, where a test on ranks has no group. So its settings are read
here.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def prepare_rerun(item: pytest.Item, reports: Sequence[pytest.TestReport], attempt: int) -> float | None:
    """Decide whether a test runs again, and mark the reports of this attempt for it.

    Args:
        item: the test.
        reports: the merged reports of this attempt.
        attempt: how often the test ran before.

    Returns:
        Seconds to wait before the next attempt; None if there is none.

    Blind to: rerunfailures' growing delays, its excluded paths, and workers of xdist that crash.
    """
    plugin = item.config.pluginmanager.get_plugin("rerunfailures")
    if plugin is None:
        return None
    item.execution_count = attempt + 1  # pyright: ignore[reportAttributeAccessIssue]  # for its --fail-on-flaky
    for report in reports:
        vars(report)["rerun"] = attempt  # its summary lists the attempts
    failed = [report for report in reports if report.failed]
    if not failed or attempt >= (plugin.get_reruns_count(item) or 0) or not plugin.get_reruns_condition(item):
        return None
    if not all(_filters_admit(plugin, item, report) for report in failed) or not _suite_admits(item.config):
        return None
    for report in failed:
        vars(report)["outcome"] = "rerun"
    return float(plugin.get_reruns_delay(item))


def _filters_admit(plugin: Any, item: pytest.Item, report: pytest.TestReport) -> bool:
    """Apply `--only-rerun` and `--rerun-except` to the error of the rank that failed first."""
    only, never = (plugin._get_rerun_filter_regex(item, name) for name in ("only_rerun", "rerun_except"))
    crash = getattr(report.longrepr, "reprcrash", None)
    error = re.sub(r"^\[rank \d+\] ", "", crash.message) if crash is not None else report.longreprtext
    return (not only or _matches(only, error)) and not (never and _matches(never, error))


def _matches(patterns: Iterable[str | type], error: str) -> bool:
    return any(re.search(p if isinstance(p, str) else rf"\b{p.__name__}\b", error) for p in patterns)


def _suite_admits(config: Any) -> bool:
    limit = getattr(config.option, "max_suite_reruns", None)
    return limit is None or config.failures_db.try_increment_suite_reruns(limit)
