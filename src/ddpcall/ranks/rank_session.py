"""pytest inside a rank: one session per worker, kept warm, that runs one test at a time on request.

A rank loads the same configuration, plugins and conftest files as the process that asks, collects the file of a
test once, and runs the test through pytest's ordinary protocol. So fixtures, parametrize, skips, xfail, assertion
rewriting, capsys and caplog work because pytest does them, not because they are imitated. Reports go back.

Everything a test builds is torn down after it, whatever its scope: a module's or session's fixture on a rank
lives for one test, because the process group does.
"""

import contextlib
import functools
import gc
import importlib
import os
import sys
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ddpcall.launch_environment import read_place

RANK_KEY = "ddpcall_rank"  # in config.workerinput: this session runs inside a rank

# What belongs to the process that asks: selecting, stopping, reporting, distributing.
_PARENTS_OPTIONS: dict[str, Any] = {
    "keyword": "",
    "markexpr": "",
    "deselect": None,
    "maxfail": 0,
    "lf": False,
    "failedfirst": False,
    "newfirst": False,
    "stepwise": False,
    "cacheclear": False,
    "usepdb": False,
    "trace": False,
    "setuponly": False,
    "setupshow": False,
    "setupplan": False,
    "xmlpath": None,
    "log_file": os.devnull,
    "numprocesses": None,
    "maxprocesses": None,
    "dist": "no",
    "distload": False,
    "looponfail": False,
    "loadgroup": False,
    "tx": [],
}

# Plugins whose work is the parent's: showing progress, and running a test again (on all ranks together).
_PARENTS_PLUGINS = ("sugar", "rerunfailures")


@dataclass(frozen=True)
class SessionRequest:
    """What a rank needs to set up the same pytest session as its parent's.

    Attributes:
        args: the parent's command line.
        directory: where the parent was started.
        basetemp: directory for the temporary files of all ranks.
        worker_id: pytest-xdist's id of the parent, "master" without it.
        captures: whether output belongs into the reports; False under `-s`.
        seed: the parent's, for plugins that draw at random: all ranks must draw the same.
        coverage: options of the coverage measurement running in the parent, empty if there is none.
    """

    args: tuple[str, ...]
    directory: str
    basetemp: str
    worker_id: str
    captures: bool
    seed: int
    coverage: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class TestRequest:
    """One test for every rank."""

    __test__ = False

    nodeid: str
    path: str
    tmp_path: str


@dataclass
class RankTestResult:
    """What pytest reported on one rank.

    Attributes:
        reports: serialized test reports, in order.
        failed_s: monotonic time in seconds of the first failure, by phase.
        warnings: (when, nodeid, location, category, message, filename, line) of recorded warnings.
        error: why the test could not even be collected on this rank.
    """

    reports: list[dict[str, Any]] = field(default_factory=list)
    failed_s: dict[str, float] = field(default_factory=dict)
    warnings: list[tuple[Any, ...]] = field(default_factory=list)
    error: str = ""


def run_test(session_request: SessionRequest, test: TestRequest) -> RankTestResult:
    """Run one test in this rank's pytest session."""
    return _open_session(session_request).run(test)


@functools.cache
def _open_session(request: SessionRequest) -> "RankSession":
    return RankSession(request)


class RankSession:
    """A configured pytest session that collects files when it first needs them."""

    def __init__(self, request: SessionRequest) -> None:
        self._rank = str(read_place().rank)
        self._save_coverage = _start_coverage(dict(request.coverage))
        with contextlib.chdir(request.directory):
            self._config = _configure(request, self._rank)
        self._recorder = _Recorder(self._config, captures=request.captures)
        self._config.pluginmanager.register(self._recorder, "ddpcall-rank")
        self._session = pytest.Session.from_config(self._config)
        self._config.hook.pytest_sessionstart(session=self._session)
        self._items: dict[str, dict[str, pytest.Item]] = {}
        _forget_startup_garbage()

    def run(self, test: TestRequest) -> RankTestResult:
        """Run one test of the session as this rank."""
        result = self._recorder.begin(test)
        item = self._find_item(test)
        if item is None:
            result.error = result.error or f"rank {self._rank} collects no test {test.nodeid} in {test.path}"
            return result
        self._config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        self._save_coverage()
        return result

    def _find_item(self, test: TestRequest) -> pytest.Item | None:
        if test.path not in self._items:
            self._config.args = [test.path]
            self._config.hook.pytest_collection(session=self._session)
            self._items[test.path] = {item.nodeid: item for item in self._session.items}
            _forget_startup_garbage()
        items = self._items[test.path]
        # pytest-xdist's loadgroup appends "@group" to the ids of the parent
        return items.get(test.nodeid) or items.get(test.nodeid.rpartition("@")[0])


def _forget_startup_garbage() -> None:
    """Keep the collection after each test cheap: it need not look through modules and plugins."""
    gc.collect()
    gc.freeze()


def _configure(request: SessionRequest, rank: str) -> pytest.Config:
    from _pytest.config import _prepareconfig  # pyright: ignore[reportPrivateUsage]

    import ddpcall

    # The plugin's package cannot be rewritten here, it is imported already; without this mark pytest warns.
    ddpcall.__doc__ = f"{ddpcall.__doc__}\nPYTEST_DONT_REWRITE"
    config = _prepareconfig([*request.args, "--capture=no"], None)
    config.pluginmanager.set_blocked("terminalreporter")  # "-p no:terminal" would reject -q and -v as well
    for name in filter(config.pluginmanager.has_plugin, _PARENTS_PLUGINS):
        config.pluginmanager.unregister(name=name)
    config.addinivalue_line("markers", "flaky: rerunfailures' own mark, which its plugin would have declared here")
    for name, value in _PARENTS_OPTIONS.items():
        if hasattr(config.option, name):
            setattr(config.option, name, value)
    config.option.basetemp = str(Path(request.basetemp) / f"rank{rank}")
    # Plugins that write reports or caches leave that to the main process when they see this, as under xdist.
    worker_input = {"workerid": request.worker_id, "workercount": 1, "testrunuid": "", "mainargv": sys.argv}
    worker_input["randomly_seed"] = request.seed  # pytest-randomly looks there, as under xdist
    if getattr(config.option, "hypothesis_seed", 0) is None:
        config.option.hypothesis_seed = request.seed
    config.workerinput = worker_input | {RANK_KEY: rank}  # pyright: ignore[reportAttributeAccessIssue]
    config.workeroutput = {}  # pyright: ignore[reportAttributeAccessIssue]
    config._do_configure()  # pyright: ignore[reportPrivateUsage]
    sys.breakpointhook = _refuse_breakpoint
    return config


def _refuse_breakpoint(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "breakpoint() cannot work inside a rank: no terminal is attached to it. "
        "Print instead (pytest -s shows it with the rank's number), or debug the body in a test without ranks."
    )


def _start_coverage(options: dict[str, Any]) -> Any:
    """Measure this rank like its parent; returns the function that writes what was measured."""
    if not options:
        return lambda: None
    coverage = importlib.import_module("coverage")
    measured = coverage.Coverage(
        data_file=options.pop("data_file"), data_suffix=True, config_file=options.pop("config_file")
    )
    for name, value in options.items():
        measured.set_option(name, list(value) if isinstance(value, tuple) else value)
    for name in ("_warn_no_data", "_warn_unimported_source", "_warn_preimported_source"):
        setattr(measured, name, False)  # the parent gives these warnings, once
    measured.start()
    return measured.save


class _Recorder:
    """The plugin inside a rank: records reports, warnings and output, shares `tmp_path`."""

    def __init__(self, config: pytest.Config, *, captures: bool) -> None:
        self._config = config
        self._captures = captures
        self._result = RankTestResult()
        self._tmp_path = Path()

    def begin(self, test: TestRequest) -> RankTestResult:
        self._result = RankTestResult()
        self._tmp_path = Path(test.tmp_path)
        return self._result

    @pytest.fixture
    def tmp_path(self) -> Path:
        """One directory for all ranks of the test."""
        self._tmp_path.mkdir(parents=True, exist_ok=True)
        return self._tmp_path

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._result.error += report.longreprtext

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._result.failed_s.setdefault(str(report.when), time.monotonic())
        to_serializable = self._config.hook.pytest_report_to_serializable
        self._result.reports.append(to_serializable(config=self._config, report=report))

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: Any
    ) -> None:
        if when == "runtest":  # those of the collection are given by the parent
            w = warning_message
            text = (w.category.__name__, str(w.message), w.filename, w.lineno)
            self._result.warnings.append((when, nodeid, location, *text))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._sections(item, "setup"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._sections(item, "call"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._sections(item, "teardown"):
            return (yield)

    @contextlib.contextmanager
    def _sections(self, item: pytest.Item, when: str) -> Generator[None]:
        """Attach what a phase prints to its report, from the files that the rank's output goes to.

        pytest's own capture would keep it inside the rank, where it is lost when the rank is killed.
        """
        starts = {name: _output_size(descriptor) for name, descriptor in _STREAMS.items()}
        try:
            yield
        finally:
            for name, descriptor in _STREAMS.items() if self._captures else ():
                item.add_report_section(when, name, _read_output_from(descriptor, starts[name]))


_STREAMS = {"stdout": 1, "stderr": 2}


def _output_size(descriptor: int) -> int:
    getattr(sys, "stdout" if descriptor == 1 else "stderr").flush()
    return os.fstat(descriptor).st_size


def _read_output_from(descriptor: int, start: int, limit_bytes: int = 64_000) -> str:
    """Read what was written since `start`, at most `limit_bytes`, the middle left out."""
    size_bytes = _output_size(descriptor) - start
    with open(f"/proc/self/fd/{descriptor}", "rb") as file:
        file.seek(start)
        if size_bytes <= limit_bytes:
            return file.read().decode(errors="replace")
        head = file.read(limit_bytes // 2)
        file.seek(start + size_bytes - limit_bytes // 2)
        left_out = f"\n[... {size_bytes - limit_bytes:,} bytes left out ...]\n"
        return head.decode(errors="replace") + left_out + file.read().decode(errors="replace")
