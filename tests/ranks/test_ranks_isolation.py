"""What a task does to a warm worker does not reach the next task."""

import datetime
import os
import random
import signal
import sys
import time
import warnings
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist

from ddpcall.asserts import assert_same_on_all_ranks
from ddpcall.ranks import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def describe_state():
    return {
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "autocast_dtype": str(torch.get_autocast_dtype("cpu")),
        "environ": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "filters": [repr(entry) for entry in warnings.filters],
        "alarm": repr(signal.getsignal(signal.SIGALRM)),
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
        "recompile_limit": torch._dynamo.config.recompile_limit,
        "draws": (random.random(), float(numpy.random.rand()), torch.rand(1).item()),
        "groups": len(dist.distributed_c10d._world.pg_map),
    }


def disturb(name):
    DISTURBANCES[name]()


DISTURBANCES = {
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "anomaly mode": lambda: torch.set_anomaly_enabled(True),
    "deterministic mode": lambda: torch.use_deterministic_algorithms(True),
    "threads": lambda: torch.set_num_threads(2),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16).__enter__(),
    "environment": lambda: os.environ.update(LEAKED="1", RANK="9"),
    "removed variable": lambda: os.environ.pop("WORLD_SIZE"),
    "directory": lambda: os.chdir("/"),
    "import path": lambda: sys.path.insert(0, "/leaked"),
    "warnings filters": lambda: warnings.simplefilter("ignore"),
    "signal handler": lambda: signal.signal(signal.SIGALRM, lambda *_: None),
    "global hook": lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    "compiler settings": lambda: setattr(torch._dynamo.config, "recompile_limit", 1),
    "seeds": lambda: (torch.manual_seed(5), random.seed(5), numpy.random.seed(5)),
    "process groups": lambda: dist.new_group([0, 1]),
    "no process group": lambda: dist.destroy_process_group(),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_state_is_restored(pool, name):
    before = [outcome.value for outcome in pool.run(describe_state, 2)]
    assert not any(outcome.failed for outcome in pool.run(disturb, 2, name))
    assert [outcome.value for outcome in pool.run(describe_state, 2)] == before


def make_a_group_and_return():
    store = dist.distributed_c10d._get_default_store()
    group: Any = dist.new_group(timeout=datetime.timedelta(seconds=1))
    if dist.get_rank() == 0:
        store.set("returned", "")
        return None
    store.wait(["returned"])
    time.sleep(0.5)
    try:
        dist.recv(torch.ones(1), 0, group)
    except RuntimeError as error:
        return str(error)


def test_a_rank_that_returns_at_once_keeps_connections_for_the_slower_ones(pool):
    """As in a group that is still being made there."""
    _, told = [outcome.value for outcome in pool.run(make_a_group_and_return, 2)]
    assert "Timed out" in told
    assert "closed" not in told


def count_compilations():
    torch._dynamo.utils.counters.clear()
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.randn(3, 2))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_code_is_dropped(pool):
    assert [[outcome.value for outcome in pool.run(count_compilations, 2)] for _ in range(2)] == [[1, 1], [1, 1]]


def draw():
    assert_same_on_all_ranks(torch.rand(2))
    return torch.rand(1).item()


def test_every_task_starts_from_the_same_seed_on_every_rank(pool):
    values = {outcome.value for _ in range(2) for outcome in pool.run(draw, 2)}
    assert len(values) == 1


def read_variable(name):
    return os.environ.get(name)


def test_ranks_see_the_callers_environment_at_the_time_of_the_call(pool, monkeypatch):
    pool.run(read_variable, 2, "CALLERS")
    monkeypatch.setenv("CALLERS", "now")
    assert [outcome.value for outcome in pool.run(read_variable, 2, "CALLERS")] == ["now", "now"]
