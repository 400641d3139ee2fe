"""pytest plugin: tests that run on several ranks and are as easy as ordinary ones.

    import pytest

    @pytest.mark.ranks(2)
    def test_ranks_agree(rank):
        ...

The body runs on every rank, inside an initialized default process group, on a pool of warm processes
(ddpcall.ranks). This module is what pytest loads on every start: it imports no torch until a test needs ranks.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ddpcall.ranks.outcomes import RankOutcome
from ddpcall.ranks.place import Rank, current_rank
from ddpcall.ranks.pool import RankPool, explain_missing_gpus
from ddpcall.ranks.rank_session import RANK_KEY, SessionRequest, TestRequest, run_test
from ddpcall.ranks.reruns import prepare_rerun
from ddpcall.torch_version import explain_torch

if TYPE_CHECKING:
    from ddpcall.asserts import (
        assert_gradients_averaged,
        assert_gradients_synchronized,
        assert_hooks_fire,
        assert_replicated,
        assert_same_as_one_process,
        assert_same_on_all_ranks,
    )

__all__ = [
    "Rank",
    "assert_gradients_averaged",
    "assert_gradients_synchronized",
    "assert_hooks_fire",
    "assert_replicated",
    "assert_same_as_one_process",
    "assert_same_on_all_ranks",
]

_SIZE_FIXTURE = "_ddpcall_world_size"
_MARKER_LINE = (
    "ranks(size, *sizes, backend='gloo', timeout=None, fresh=False): run the test on `size` ranks, each in a "
    "process of its own; several sizes make several tests; `timeout` in seconds; `fresh` starts new interpreters"
)
_timeout_key = pytest.StashKey[float]()


def __getattr__(name: str) -> Any:
    """Import the asserts, and torch with them, when a test asks for one."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if trouble := explain_torch():
        raise pytest.Collector.CollectError(f"ddpcall: {trouble}")  # which pytest shows without a traceback
    from ddpcall import asserts

    return getattr(asserts, name)


@dataclass(frozen=True)
class RanksMark:
    """The arguments of `@pytest.mark.ranks`."""

    sizes: tuple[int, ...]
    backend: str = "gloo"
    timeout: float | None = None
    fresh: bool = False

    @staticmethod
    def of(item: pytest.Item) -> RanksMark | None:
        """Read the mark nearest to a test; None if it has none.

        Raises:
            pytest.UsageError: the mark's arguments make no sense.
        """
        if not isinstance(item, pytest.Function) or (mark := item.get_closest_marker("ranks")) is None:
            return None
        if not mark.args or not all(isinstance(size, int) and size > 0 for size in mark.args):
            raise pytest.UsageError(f"{item.nodeid}: ranks needs at least one positive number, as in ranks(2)")
        if unknown := set(mark.kwargs) - {"backend", "timeout", "fresh"}:
            raise pytest.UsageError(f"{item.nodeid}: ranks does not know {', '.join(sorted(unknown))}")
        return RanksMark(tuple(mark.args), **mark.kwargs)

    def world_size(self, item: pytest.Item) -> int:
        """The number of ranks of this instance of the test."""
        callspec = getattr(item, "callspec", None)
        return self.sizes[0] if callspec is None else callspec.params.get(_SIZE_FIXTURE, self.sizes[0])


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ranks", "tests on several ranks (ddpcall)")
    group.addoption(
        "--ranks-report", action="store_true", help="show the time of every test on ranks, slowest first"
    )
    parser.addini("ranks_timeout", "seconds a test on ranks may take (default 60)", default="60")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER_LINE)
    if not _is_rank(config):
        config.pluginmanager.register(RanksPlugin(config), "ddpcall-ranks")


def _is_rank(config: pytest.Config) -> bool:
    return RANK_KEY in getattr(config, "workerinput", {})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test per world size where a mark gives several."""
    mark = RanksMark.of(metafunc.definition)
    if mark is not None and len(mark.sizes) > 1:
        metafunc.fixturenames.append(_SIZE_FIXTURE)
        metafunc.parametrize(_SIZE_FIXTURE, mark.sizes, ids=[f"ranks{size}" for size in mark.sizes])


def _rank_scope(fixture_name: str, config: pytest.Config) -> str:
    """A rank is one for all examples that Hypothesis draws; each test on ranks tears down all scopes."""
    return "session" if _is_rank(config) else "function"


@pytest.fixture(scope=_rank_scope)  # pyright: ignore[reportCallIssue, reportArgumentType]
def rank(request: pytest.FixtureRequest) -> Rank:
    """The rank this test body runs on: `.rank`, `.world_size`, `.device`, `.barrier()`."""
    if not _is_rank(request.config):
        pytest.fail("the `rank` fixture needs ranks: mark the test with @pytest.mark.ranks(2)", pytrace=False)
    return current_rank()


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """Take pytest-timeout's limit over: the pool enforces it and shows every rank's stack."""
    if RanksMark.of(item) is None:
        return None
    item.stash[_timeout_key] = settings.timeout
    return True


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> bool | None:
    return None if RanksMark.of(item) is None else True


class RanksPlugin:
    """The plugin in the process the user started: sends marked tests to the ranks and merges what comes back.

    One pool serves the whole run; it starts once the collection has found a marked test.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._pool = RankPool()
        self._num_tests = 0
        self._request: SessionRequest | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        marked = [item for item in items if RanksMark.of(item) is not None]
        if marked and (trouble := explain_torch()):
            raise pytest.UsageError(f"{len(marked)} tests on ranks cannot run: {trouble}")
        if marked and (config.getoption("usepdb") or config.getoption("trace")):
            raise pytest.UsageError(
                f"--pdb cannot debug tests that run on ranks ({marked[0].nodeid} and {len(marked) - 1} more): "
                "their bodies run in other processes, which have no terminal. Deselect them (-m 'not ranks'), "
                "or run without --pdb: a failure shows every rank's traceback."
            )

    def pytest_collect_file(self, file_path: Path) -> None:
        """Start the pool as soon as a file mentions the mark: it imports torch while pytest imports the file."""
        option = self._config.option
        selects = option.keyword or option.markexpr  # the tests on ranks may not be among the selected ones
        if file_path.suffix != ".py" or selects or not self._runs_tests():
            return
        if _mentions_ranks(file_path) and not explain_torch():
            self._pool.warm_up()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        marks = [mark for item in session.items if (mark := RanksMark.of(item)) is not None]
        if self._runs_tests() and any(not mark.fresh for mark in marks):
            self._pool.warm_up()

    def _runs_tests(self) -> bool:
        """Whether this process runs tests itself: it does not only collect, nor only distribute to xdist."""
        return not self._config.option.collectonly and not self._config.pluginmanager.has_plugin("dsession")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if (mark := RanksMark.of(item)) is None:
            return None
        for attempt in itertools.count():
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            reports = self._run(item, mark)
            delay_s = prepare_rerun(item, reports, attempt)
            if delay_s is None and (failed := _tear_down_before(item, nextitem)):
                reports.append(failed)
            for report in reports:
                item.ihook.pytest_runtest_logreport(report=report)
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            if delay_s is None:
                break
            time.sleep(delay_s)
        return True

    def pytest_unconfigure(self) -> None:
        self._pool.close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._config.getoption("ranks_report"):
            _write_report(terminalreporter)

    def _run(self, item: pytest.Item, mark: RanksMark) -> list[pytest.TestReport]:
        """Run one test on its ranks; no fixture of it is built in this process."""
        if reason := _skip_reason(item, mark):
            return _report_skip(item, reason)
        from _pytest.skipping import evaluate_xfail_marks

        from ddpcall.ranks.reports import merge_reports, read_rank_test

        started_s = time.perf_counter()
        outcomes = self._dispatch(item, mark)
        duration_s = time.perf_counter() - started_s
        tests = [read_rank_test(outcome, item.config) for outcome in outcomes]
        self._forward_warnings(outcomes)
        xfail = evaluate_xfail_marks(item)
        # A mark that names an exception does not expect a process to die.
        expects_failure = xfail.reason if xfail and xfail.raises is None else None
        reports = merge_reports(item, tests, duration_s, expects_failure=expects_failure)
        record = {"size": len(tests), "wall_s": duration_s, "starts": self._pool.num_starts, "pid": os.getpid()}
        vars(reports[-1])["ddpcall_ranks"] = record
        return reports

    def _dispatch(self, item: pytest.Item, mark: RanksMark) -> list[RankOutcome]:
        arguments: dict[str, Any] = {
            "backend": mark.backend,
            "timeout_s": self._timeout_s(item, mark),
            "echo": None if self._captures() else _echo_line,
        }
        call = (run_test, mark.world_size(item), self._session_request(), self._test_request(item))
        if mark.fresh:
            with RankPool(fresh=True) as pool:
                return pool.run(*call, **arguments)
        return self._pool.run(*call, **arguments)

    def _timeout_s(self, item: pytest.Item, mark: RanksMark) -> float:
        """The mark's timeout, or else pytest-timeout's, or else the ini file's."""
        if mark.timeout is not None:
            return mark.timeout
        return item.stash.get(_timeout_key, None) or float(self._config.getini("ranks_timeout"))

    def _captures(self) -> bool:
        return self._config.getoption("capture") != "no"

    def _basetemp(self) -> Path:
        return self._config._tmp_path_factory.getbasetemp()  # pyright: ignore[reportAttributeAccessIssue]

    def _test_request(self, item: pytest.Item) -> TestRequest:
        self._num_tests += 1
        name = re.sub(r"\W", "_", item.name)[:30]
        return TestRequest(item.nodeid, str(item.path), str(self._basetemp() / f"{name}-ranks{self._num_tests}"))

    def _session_request(self) -> SessionRequest:
        if self._request is None:
            parameters = self._config.invocation_params
            no_cov = ["--no-cov"] if self._config.pluginmanager.has_plugin("pytest_cov") else []
            self._request = SessionRequest(
                args=(*(str(arg) for arg in parameters.args), *no_cov),
                directory=str(parameters.dir),
                basetemp=str(self._basetemp()),
                worker_id=getattr(self._config, "workerinput", {}).get("workerid", "master"),
                captures=self._captures(),
                seed=self._seed(),
                coverage=_read_coverage_options(),
            )
        return self._request

    def _seed(self) -> int:
        """Return pytest-randomly's seed where it has one, else one for this run."""
        seed = getattr(self._config.option, "randomly_seed", None)
        return seed if isinstance(seed, int) else random.getrandbits(32)

    def _forward_warnings(self, outcomes: list[RankOutcome]) -> None:
        """Give each warning once, however many ranks it was recorded on."""
        recorded = {entry for outcome in outcomes for entry in getattr(outcome.value, "warnings", ())}
        for when, nodeid, location, category, message, filename, line in sorted(recorded, key=repr):
            known = getattr(__import__("builtins"), category, UserWarning)
            shown = warnings.WarningMessage(known(message), known, filename, line)
            self._config.hook.pytest_warning_recorded.call_historic(
                kwargs={"warning_message": shown, "when": when, "nodeid": nodeid, "location": location}
            )


def _mentions_ranks(path: Path) -> bool:
    try:
        return b"mark.ranks(" in path.read_bytes()
    except OSError:
        return False


def _skip_reason(item: pytest.Item, mark: RanksMark) -> str:
    """Why a test need not go to the ranks at all: a skip mark, or missing GPUs."""
    from _pytest.skipping import evaluate_skip_marks

    if skipped := evaluate_skip_marks(item):
        return skipped.reason or "unconditional skip"
    return explain_missing_gpus(mark.backend, mark.world_size(item))


def _report_skip(item: pytest.Item, reason: str) -> list[pytest.TestReport]:
    def skip() -> None:
        raise pytest.skip.Exception(reason, _use_item_location=True)

    setup = pytest.CallInfo.from_call(skip, "setup")
    teardown = pytest.CallInfo.from_call(lambda: None, "teardown")
    make = item.ihook.pytest_runtest_makereport
    return [make(item=item, call=setup), make(item=item, call=teardown)]


def _tear_down_before(item: pytest.Item, nextitem: pytest.Item | None) -> pytest.TestReport | None:
    """Tear down what ordinary tests before this one left set up and no later test needs."""
    teardown_exact = item.session._setupstate.teardown_exact  # pyright: ignore[reportPrivateUsage]
    call = pytest.CallInfo.from_call(lambda: teardown_exact(nextitem), "teardown")
    return item.ihook.pytest_runtest_makereport(item=item, call=call) if call.excinfo else None


def _echo_line(rank: int, line: str) -> None:
    print(f"[rank {rank}] {line}", flush=True)


def _read_coverage_options() -> tuple[tuple[str, Any], ...]:
    """Describe the coverage measurement of this process, if one is running, so that ranks can join it."""
    coverage = sys.modules.get("coverage")
    measured = coverage.Coverage.current() if coverage is not None else None
    if measured is None:
        return ()
    names = ("run:source", "run:source_pkgs", "run:branch", "run:omit", "run:include")
    options = [(name, measured.get_option(name)) for name in names]
    files = [
        ("data_file", os.path.abspath(measured.config.data_file)),
        ("config_file", measured.config.config_file or False),
    ]
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in [*files, *options] if v is not None)


def _write_report(terminalreporter: pytest.TerminalReporter) -> None:
    """Write what each test on ranks took; works from the reports, so it counts xdist's workers too."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind]
    rows = [(r.ddpcall_ranks, r.nodeid) for r in reports if hasattr(r, "ddpcall_ranks")]
    if not rows:
        return
    starts: dict[int, int] = {}
    for record, _ in rows:
        starts[record["pid"]] = max(starts.get(record["pid"], 0), record["starts"])
    total_s = sum(record["wall_s"] for record, _ in rows)
    terminalreporter.section("ranks")
    for record, nodeid in sorted(rows, key=lambda row: -row[0]["wall_s"]):
        terminalreporter.write_line(f"{record['wall_s'] * 1e3:10.1f} ms  ranks({record['size']})  {nodeid}")
    terminalreporter.write_line(
        f"{len(rows)} tests on ranks in {total_s:.2f} s; pool starts: {sum(starts.values())}"
    )
