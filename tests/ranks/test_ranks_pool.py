"""The pool: results from every rank, failures by cause, and nothing left running."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ddpcall.ranks import RankPool, RanksFailed, run_on_ranks


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def add_ranks(offset):
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return total.item()


def identify():
    return os.getpid(), os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]


def raise_on(rank, message="boom"):
    print("printed by", dist.get_rank())
    if dist.get_rank() == rank:
        raise ValueError(message)
    dist.barrier()


def end_on(rank, how):
    if dist.get_rank() == rank:
        how()
    dist.barrier()


def exit_with_3():
    os._exit(3)


def exit_with_0():
    os._exit(0)


def exit_politely():
    sys.exit(0)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def stop_itself():
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_for_long():
    time.sleep(60)


def return_unpicklable():
    return lambda: None


def skip_the_collective(rank):
    if dist.get_rank() != rank:
        dist.barrier()


def print_megabytes():
    for _ in range(50):
        print("x" * 100_000)
    if dist.get_rank() == 0:
        raise ValueError("after megabytes")


def leak_thread():
    threading.Thread(target=time.sleep, args=(30,), name="prefetch").start()


def leak_child():
    leak_child.__dict__["kept"] = subprocess.Popen(["sleep", "32"])


def train_briefly():
    model = DistributedDataParallel(torch.nn.Linear(3, 3))
    for _ in range(3):
        model(torch.randn(2, 3)).sum().backward()
    return model.module.weight.grad.sum().item()


def initialize_again():
    dist.destroy_process_group()
    dist.init_process_group("gloo")  # env://, as a training script does
    return add_ranks(0)


def failed(pool, *call, **options):
    """Run a task that must fail; returns the report and the outcomes."""
    outcomes = pool.run(*call, **options)
    assert any(outcome.failed for outcome in outcomes)
    return str(RanksFailed(call[0].__name__, outcomes)), outcomes


def test_results_come_back_in_rank_order(pool):
    outcomes = pool.run(identify, 3)
    assert [outcome.value[1:] for outcome in outcomes] == [(str(rank), str(rank), "3") for rank in range(3)]


def test_workers_are_kept_between_tasks(pool):
    first, second = ([outcome.value[0] for outcome in pool.run(identify, 2)] for _ in range(2))
    assert first == second


def test_run_on_ranks_pooled_and_fresh_agree():
    assert run_on_ranks(add_ranks, 2, 5) == run_on_ranks(add_ranks, 2, 5, fresh=True) == [11.0, 11.0]


def test_run_on_ranks_raises_with_every_ranks_outcome():
    with pytest.raises(RanksFailed, match=r"raise_on failed on rank 1 of 2\.") as caught:
        run_on_ranks(raise_on, 2, 1)
    assert [outcome.ending for outcome in caught.value.outcomes] == ["raised", "raised"]


def test_run_on_ranks_passes_keywords():
    assert run_on_ranks(add_ranks, 1, offset=2) == [2.0]


def test_fresh_ranks_are_new_processes():
    first, second = (run_on_ranks(identify, 1, fresh=True)[0][0] for _ in range(2))
    assert first != second


def test_ddp_trains_again_and_again(pool):
    for _ in range(10):
        assert not any(outcome.failed for outcome in pool.run(train_briefly, 2))


def test_a_task_may_initialize_its_own_group_from_the_environment(pool):
    for _ in range(10):
        assert [outcome.value for outcome in pool.run(initialize_again, 2)] == [1.0, 1.0]


@pytest.mark.parametrize("rank", [0, 1])
def test_exception_is_shown_with_output_and_peers_are_folded(pool, rank):
    message, _ = failed(pool, raise_on, 2, rank)
    cause, _, consequences = message.partition("Consequences")
    assert f"rank {rank}: ValueError: boom" in cause
    assert "in raise_on" in cause
    assert f"printed by {rank}" in cause
    assert f"rank {1 - rank}: RuntimeError" in consequences


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (exit_with_3, "the process exited with status 3 before the task was done"),
        (exit_with_0, "the process exited with status 0 before the task was done"),
        (exit_politely, "SystemExit: 0"),
        (kill_itself, "the process was killed by SIGKILL"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_ends_is_the_cause(pool, how, says, rank):
    message, outcomes = failed(pool, end_on, 2, rank, how)
    assert message.splitlines()[1].startswith(f"----- rank {rank}: {says}")
    assert all(outcome.failed for outcome in outcomes)


def test_a_stopped_rank_is_the_cause(pool):
    message, _ = failed(pool, end_on, 2, 1, stop_itself, timeout_s=4)
    assert "----- rank 1: stopped (SIGSTOP) in" in message
    assert "rank 0: waiting for other ranks in end_on" in message.partition("Consequences")[2]


def test_a_rank_that_hangs_in_python_shows_its_stack(pool):
    message, _ = failed(pool, end_on, 2, 1, sleep_for_long, timeout_s=4)
    assert "----- rank 1: still running in sleep_for_long" in message
    assert "in end_on" in message


def test_a_skipped_collective_is_named_as_such(pool):
    message, _ = failed(pool, skip_the_collective, 2, 1, timeout_s=10)
    assert "rank 1 returned without an error." in message
    assert "did not issue the same collectives" in message


def test_an_unpicklable_result_is_explained(pool):
    message, _ = failed(pool, return_unpicklable, 2)
    assert "----- ranks 0, 1: TypeError: the function returned something that cannot be pickled" in message


def test_megabytes_of_output_are_shortened(pool):
    message, _ = failed(pool, print_megabytes, 2)
    assert "bytes left out" in message
    assert len(message) < 300_000


@pytest.mark.parametrize(
    ("leak", "says"),
    [(leak_thread, "non-daemon thread 'prefetch' is still running"), (leak_child, "is still running: sleep 32")],
)
def test_leaks_are_named_and_do_not_reach_the_next_task(pool, leak, says):
    message, _ = failed(pool, leak, 2)
    assert says in message
    assert not any(outcome.failed for outcome in pool.run(add_ranks, 2, 0))


def test_unpicklable_arguments_are_refused_before_anything_starts():
    with RankPool() as unused:
        with pytest.raises(TypeError, match="Define the function at the top level"):
            unused.run(lambda: None, 2)
        assert unused.num_starts == 0


@pytest.mark.parametrize(
    ("world_size", "backend", "says"), [(0, "gloo", "at least one rank"), (64, "nccl", "64 CUDA")]
)
def test_impossible_requests_are_refused(world_size, backend, says):
    with pytest.raises(ValueError, match=says):
        run_on_ranks(identify, world_size, backend=backend)


def test_a_pool_survives_the_death_of_its_workers_between_tasks(pool):
    os.kill(pool.run(identify, 2)[1].value[0], signal.SIGKILL)
    time.sleep(0.1)
    assert [outcome.value for outcome in pool.run(add_ranks, 2, 0)] == [1.0, 1.0]


def test_echo_delivers_lines_while_ranks_run(pool):
    lines = []
    pool.run(raise_on, 2, 7, echo=lambda rank, line: lines.append((rank, line)))
    assert sorted(lines) == [(0, "printed by 0"), (1, "printed by 1")]


SCRIPT = """
    import os, sys, time
    from ddpcall.ranks import run_on_ranks

    def report(seconds):
        print(os.getpid(), os.getppid(), file=open(sys.argv[1] + os.environ["RANK"], "w"), flush=True)
        time.sleep(seconds)
        return __name__

    if __name__ == "__main__":
        sys.argv[1] = os.path.abspath(sys.argv[1])
        for _ in range(int(sys.argv[3])):
            assert run_on_ranks(report, 2, float(sys.argv[2])) == ["__mp_main__"] * 2
"""


def start_script(tmp_path, seconds, times=1):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return subprocess.Popen([sys.executable, script, tmp_path / "pids", str(seconds), str(times)])


def read_pids(tmp_path):
    texts = [path.read_text() for path in tmp_path.glob("pids*")]
    return {int(pid) for text in texts for pid in text.split()} if len(texts) == 2 and all(texts) else set()


def wait_until(condition, timeout_s=120.0):
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return found


def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_die_with_their_parent(tmp_path, number):
    with start_script(tmp_path, seconds=60) as script:
        pids = wait_until(lambda: read_pids(tmp_path))
        script.send_signal(number)
        script.wait()
    assert len(pids) == 3, "two ranks and the fork server they were forked from"
    assert wait_until(lambda: not any(map(is_alive, pids)))


def test_a_script_ends_cleanly_and_leaves_nothing(tmp_path):
    before = set(Path("/tmp").glob("ddpcall-ranks-*"))
    with start_script(tmp_path, seconds=0, times=2) as script:
        assert script.wait(60) == 0
    assert not any(map(is_alive, read_pids(tmp_path)))
    assert not {path for path in set(Path("/tmp").glob("ddpcall-ranks-*")) - before if not any(path.iterdir())}


def test_many_pools_run_at_once(tmp_path):
    directories = [tmp_path / str(index) for index in range(4)]
    for directory in directories:
        directory.mkdir()
    with contextlib.ExitStack() as stack:
        scripts = [stack.enter_context(start_script(directory, 0, times=20)) for directory in directories]
        assert [script.wait(120) for script in scripts] == [0] * 4


@pytest.mark.ranks(8, timeout=240)
def test_eight_ranks_are_on_tap(rank):
    total = torch.tensor(rank.rank)
    dist.all_reduce(total)
    assert total == sum(range(8))
