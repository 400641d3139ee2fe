"""Tests on ranks beside other plugins of pytest, all at once; docs/testing.md lists what is tried here."""

import importlib.metadata
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANDOMLY = """
    import random
    import pytest, torch, torch.distributed as dist

    @pytest.mark.ranks(2)
    def test_drawn(rank):
        drawn = torch.tensor([random.random()], dtype=torch.float64)
        total = drawn.clone()
        dist.all_reduce(total)
        assert total == 2 * drawn

    @pytest.mark.ranks(2)
    def test_fails_on_one(rank):
        assert rank.rank == 0
"""
HYPOTHESIS = """
    import pytest, torch, torch.distributed as dist
    from hypothesis import given, settings, strategies

    @pytest.mark.ranks(2)
    @settings(max_examples=5, deadline=None, database=None)
    @given(number=strategies.integers(0, 10**6))
    def test_drawn(rank, number):
        total = torch.tensor([number])
        dist.all_reduce(total)
        assert total == 2 * number

    @pytest.mark.ranks(2)
    def test_fails_on_one(rank):
        assert rank.rank == 0
"""
ASYNCIO = """
    import asyncio
    import pytest, pytest_asyncio, torch, torch.distributed as dist

    @pytest_asyncio.fixture
    async def doubled(rank):
        await asyncio.sleep(0)
        return torch.tensor(2 * rank.rank)

    @pytest.mark.asyncio
    @pytest.mark.ranks(2)
    async def test_on_ranks(rank, doubled):
        await asyncio.sleep(0)
        dist.all_reduce(doubled)
        assert doubled == 2

    @pytest.mark.asyncio
    @pytest.mark.ranks(2)
    async def test_fails_on_one(rank):
        await asyncio.sleep(0)
        assert rank.rank == 0

    @pytest.mark.asyncio
    async def test_beside():
        await asyncio.sleep(0)
"""
RERUNS = """
    from pathlib import Path
    import pytest

    def count_runs(rank):
        with Path(f"runs{rank.rank}").open("a") as file:
            file.write("x")
        rank.barrier()
        runs = [len(Path(f"runs{other}").read_text()) for other in range(2)]
        assert runs[0] == runs[1], "the ranks did not run together"
        return runs[0]

    @pytest.mark.ranks(2)
    def test_fails_once_on_one(rank):
        runs = count_runs(rank)
        assert rank.rank == 0 or runs == 2

    @pytest.mark.flaky(reruns=1, only_rerun=["TimeoutError"])
    @pytest.mark.ranks(2)
    def test_another_error(rank):
        assert rank.rank == 0
"""
SUGAR = """
    import pytest

    @pytest.mark.ranks(2)
    def test_passes(rank):
        rank.barrier()

    @pytest.mark.ranks(2)
    def test_fails_on_one(rank):
        assert rank.rank == 0
"""
TIMEOUT = """
    import os, threading
    import pytest

    @pytest.mark.ranks(2)
    def test_before(rank):  # pays for what the ranks import
        rank.barrier()

    @pytest.mark.timeout(6)
    @pytest.mark.ranks(2)
    def test_hangs(rank):
        print("pid", os.getpid())
        if rank.rank == 1:
            threading.Event().wait()
        rank.barrier()
"""
COVERED = """
    def only_on_ranks(rank):
        if rank == 0:
            return "zero"
        return "other"

    def never():
        return "never"
"""
COV = """
    import pytest
    import user_model

    @pytest.mark.ranks(2)
    def test_it(rank):
        assert user_model.only_on_ranks(rank.rank)
"""
FAILS_ON_ONE = r"test_fails_on_one - \[rank 1\]"


@dataclass(frozen=True)
class Beside:
    """A run of a small file beside a plugin: what becomes of its tests, and patterns of what is shown."""

    plugin: str
    source: str
    outcomes: dict[str, str]
    shown: tuple[str, ...]
    args: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


PASS_AND_FAIL = {"test_drawn": "passed", "test_fails_on_one": "failed"}
RUNS = [
    Beside("pytest-randomly", RANDOMLY, PASS_AND_FAIL, ("Using --randomly-seed", FAILS_ON_ONE)),
    Beside("hypothesis", HYPOTHESIS, PASS_AND_FAIL, (FAILS_ON_ONE,)),
    Beside(
        "pytest-asyncio",
        ASYNCIO,
        {"test_on_ranks": "passed", "test_beside": "passed", "test_fails_on_one": "failed"},
        (FAILS_ON_ONE,),
    ),
    Beside(
        "pytest-rerunfailures",
        RERUNS,
        {"test_fails_once_on_one": "passed", "test_another_error": "failed"},
        ("1 failed, 1 passed, 1 rerun", r"test_another_error - \[rank 1\]"),
        ("--reruns", "1", "--strict-markers"),
    ),
    Beside(
        "pytest-sugar",
        SUGAR,
        {"test_passes": "passed", "test_fails_on_one": "failed"},
        (r"test_passes\S* ✓", r"test_fails_on_one\S* ⨯", FAILS_ON_ONE),
        ("--force-sugar", "-v"),
    ),
    Beside(
        "pytest-xdist",
        SUGAR,
        {"test_passes": "passed", "test_fails_on_one": "failed"},
        ("2 workers", "2 tests on ranks", FAILS_ON_ONE),
        ("-n", "2", "--ranks-report"),
    ),
    Beside(
        "pytest-cov",
        COV,
        {"test_it": "passed"},
        (r"user_model.py +6 +1 ",),
        ("--cov=user_model", "--cov-report=term-missing"),
        {"user_model.py": COVERED},
    ),
    Beside(
        "pytest-timeout",
        TIMEOUT,
        {"test_before": "passed", "test_hangs": "failed"},
        (r"\[rank 1\] still running in ", r"\(timeout 6 s\)", r"(?m)^pid \d+$"),
        ("-p", "no:randomly"),
    ),
]


@pytest.mark.parametrize("beside", RUNS, ids=lambda beside: beside.plugin)
def test_ranks_beside(beside, run_user_project):
    try:
        importlib.metadata.version(beside.plugin)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{beside.plugin} is not installed")
    config = "[pytest]\nasyncio_default_fixture_loop_scope = function\nranks_timeout = 240\n"
    files = {"test_user.py": beside.source, "pytest.ini": config, **beside.files}
    run = run_user_project(files, *beside.args)
    assert run.outcomes == beside.outcomes, run.output
    assert [pattern for pattern in beside.shown if not re.search(pattern, run.output)] == [], run.output
    assert [pid for pid in re.findall(r"^pid (\d+)$", run.output, re.M) if Path(f"/proc/{pid}").exists()] == []


def test_the_table_in_the_docs_has_what_is_tried_here():
    page = (ROOT / "docs" / "testing.md").read_text()
    table = page[page.index("<!-- plugins -->") : page.index("<!-- end plugins -->")]
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", table, re.MULTILINE)
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert rows == [(beside.plugin, pinned[beside.plugin]) for beside in RUNS]
