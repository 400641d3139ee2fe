"""What a test on ranks is reported as: one project with every way to end, run once, and a claim about each."""

import re

import pytest

PROJECT = {
    "pytest.ini": """
        [pytest]
        filterwarnings = error
        addopts = -p no:asyncio -p no:randomly -p no:rerunfailures -p no:sugar
    """,
    "test_user.py": """
        import ctypes, os, signal, subprocess, sys, threading, time
        import pytest
        import torch.distributed as dist

        on_two = pytest.mark.ranks(2)
        quick = pytest.mark.ranks(2, timeout=15)

        @on_two
        def test_passes(rank):
            rank.barrier()

        @on_two
        def test_rank_1_raises(rank):
            print("printed by", rank.rank)
            if rank.rank == 1:
                raise ValueError("boom on one")
            rank.barrier()

        @on_two
        def test_assert_shows_values(rank):
            left, right = [1, 2, 3], [1, 2, 3 + rank.rank]
            assert left == right

        @on_two
        def test_rank_1_exits_with_3(rank):
            if rank.rank == 1:
                os._exit(3)
            rank.barrier()

        @on_two
        def test_rank_1_exits_with_0(rank):
            if rank.rank == 1:
                os._exit(0)

        @on_two
        def test_rank_1_calls_sys_exit(rank):
            if rank.rank == 1:
                sys.exit(0)

        @on_two
        def test_rank_1_is_killed(rank):
            if rank.rank == 1:
                print("last words")
                os.kill(os.getpid(), signal.SIGKILL)
            rank.barrier()

        @on_two
        def test_rank_1_crashes(rank):
            if rank.rank == 1:
                ctypes.string_at(0)
            rank.barrier()

        @quick
        def test_rank_1_is_stopped(rank):
            if rank.rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            rank.barrier()

        @quick
        def test_rank_1_hangs_in_python(rank):
            if rank.rank == 1:
                time.sleep(60)
            rank.barrier()

        @quick
        def test_ranks_hang_in_a_collective(rank):
            dist.recv(__import__("torch").ones(1), src=1 - rank.rank)

        @on_two
        def test_rank_1_leaves_early(rank):
            if rank.rank == 0:
                rank.barrier()

        @on_two
        def test_skips_on_rank_1(rank):
            if rank.rank == 1:
                pytest.skip("not here")
            rank.barrier()

        @on_two
        def test_skips_on_all(rank):
            pytest.skip("nowhere")

        @on_two
        def test_skips_on_rank_1_and_fails_on_rank_0(rank):
            if rank.rank == 1:
                pytest.skip("not here")
            raise ValueError("rank 0 is really wrong")

        @on_two
        @pytest.mark.skip(reason="marked")
        def test_skip_mark(rank): ...

        @on_two
        @pytest.mark.xfail(reason="known", strict=True)
        def test_xfail_on_rank_1(rank):
            if rank.rank == 1:
                raise ValueError
            rank.barrier()

        @on_two
        @pytest.mark.xfail(strict=True)
        def test_strict_xfail_that_passes(rank): ...

        @on_two
        @pytest.mark.xfail(raises=ValueError, strict=True)
        def test_xfail_for_another_exception(rank):
            raise KeyError("other")

        @on_two
        @pytest.mark.xfail(reason="dies")
        def test_xfail_that_dies(rank):
            os.kill(os.getpid(), signal.SIGKILL)

        @pytest.fixture
        def broken_on_rank_1(rank):
            if rank.rank == 1:
                raise ValueError("broken fixture")

        @on_two
        def test_fixture_fails_on_rank_1(broken_on_rank_1, rank):
            rank.barrier()

        @pytest.fixture
        def breaks_afterwards(rank):
            yield
            if rank.rank == 1:
                raise ValueError("broken teardown")

        @on_two
        def test_teardown_fails_on_rank_1(breaks_afterwards): ...

        @on_two
        def test_leaks_a_thread(rank):
            if rank.rank == 1:
                threading.Thread(target=time.sleep, args=(30,), name="prefetch").start()

        @on_two
        def test_leaks_a_child(rank):
            if rank.rank == 1:
                rank.__class__.kept = subprocess.Popen(["sleep", "31"])

        @on_two
        def test_prints_megabytes(rank):
            for _ in range(40):
                print("x" * 100_000)

        @on_two
        def test_prints_megabytes_and_fails(rank):
            for _ in range(40):
                print("x" * 100_000)
            assert rank.rank < 0, "after all that"

        @on_two
        def test_passes_after_all_that(rank):
            rank.barrier()

        def test_rank_without_mark(rank): ...

        @pytest.mark.ranks(64, backend="nccl")
        def test_needs_more_gpus_than_there_are(rank): ...
    """,
}


@pytest.fixture(scope="module")
def user_run(run_user_project):
    return run_user_project(PROJECT, "-v")


@pytest.mark.parametrize(
    ("name", "outcome", "says"),
    [
        ("test_passes", "passed", ""),
        ("test_rank_1_raises", "failed", "[rank 1] ValueError: boom on one"),
        ("test_assert_shows_values", "failed", "assert [1, 2, 3] == [1, 2, 4]"),
        ("test_rank_1_exits_with_3", "failed", "exited with status 3"),
        ("test_rank_1_exits_with_0", "failed", "exited with status 0 before the task was done"),
        ("test_rank_1_calls_sys_exit", "failed", "SystemExit"),
        ("test_rank_1_is_killed", "failed", "[rank 1] the process was killed by SIGKILL"),
        ("test_rank_1_crashes", "failed", "[rank 1] the process was killed by SIGSEGV"),
        ("test_rank_1_is_stopped", "failed", "[rank 1] stopped (SIGSTOP) in test_rank_1_is_stopped"),
        ("test_rank_1_hangs_in_python", "failed", "[rank 1] still running in test_rank_1_hangs_in_python"),
        ("test_ranks_hang_in_a_collective", "failed", "waiting for other ranks in"),
        ("test_rank_1_leaves_early", "failed", "did not issue the same collectives"),
        ("test_skips_on_rank_1", "skipped", "not here (only on rank 1 of 2)"),
        ("test_skips_on_all", "skipped", "nowhere"),
        ("test_skips_on_rank_1_and_fails_on_rank_0", "failed", "[rank 0] ValueError: rank 0 is really wrong"),
        ("test_skip_mark", "skipped", "marked"),
        ("test_xfail_on_rank_1", "xfailed", "known"),
        ("test_strict_xfail_that_passes", "failed", "[XPASS(strict)]"),
        ("test_xfail_for_another_exception", "failed", "KeyError: 'other'"),
        ("test_xfail_that_dies", "xfailed", "dies"),
        ("test_fixture_fails_on_rank_1", "error", "ValueError: broken fixture"),
        ("test_teardown_fails_on_rank_1", "error", "ValueError: broken teardown"),
        ("test_leaks_a_thread", "error", "non-daemon thread 'prefetch' is still running"),
        ("test_leaks_a_child", "error", "sleep 31"),
        ("test_prints_megabytes", "passed", ""),
        ("test_prints_megabytes_and_fails", "failed", "after all that"),
        ("test_passes_after_all_that", "passed", ""),
        ("test_rank_without_mark", "error", "mark the test with @pytest.mark.ranks(2)"),
        ("test_needs_more_gpus_than_there_are", "skipped", "64 ranks on nccl need 64 CUDA devices"),
    ],
)
def test_outcome_and_its_reason(user_run, name, outcome, says):
    assert user_run.outcomes[name] == outcome, user_run.texts[name]
    assert says in user_run.texts[name]


def test_every_test_of_the_project_has_a_claim(user_run):
    assert len(user_run.outcomes) == 29


def test_peers_are_folded_below_the_cause(user_run):
    text = user_run.texts["test_rank_1_raises"]
    assert text.index("boom on one") < text.index("Consequences (folded") < text.index("rank 0: RuntimeError")
    assert text.count("Traceback") == 0
    assert "rank.barrier()" not in text.partition("Consequences")[2].partition("printed by")[0]


def test_output_stands_under_its_rank(user_run):
    _, _, section = user_run.output.partition("test_rank_1_raises __")
    assert re.search(r"Captured stdout call \[rank 1\] -+\nprinted by 1", section)


def test_a_killed_rank_leaves_its_last_words(user_run):
    assert "last words" in user_run.texts["test_rank_1_is_killed"] + user_run.output


def test_megabytes_of_output_are_shortened(user_run):
    assert "bytes left out ...]" in user_run.output
    assert len(user_run.output) < 1_000_000


def test_hang_in_a_collective_shows_both_stacks(user_run):
    assert user_run.texts["test_ranks_hang_in_a_collective"].count("in test_ranks_hang_in_a_collective") >= 2


def test_summary_lines_name_the_rank(user_run):
    assert "test_rank_1_is_killed - [rank 1] the process was killed by" in user_run.output
