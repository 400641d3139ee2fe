"""The exchange on real ranks: each part with both controls, uneven steps, the second round, and faults."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, PrefixStore, TCPStore

from ddpcall.watch.compare.drift import read_drift
from ddpcall.watch.compare.exchange import Comparison, Exchange, RunExchange, find_store
from ddpcall.watch.compare.store_protocol import RankStore
from ddpcall.watch.compare.vitals import (
    AT_THE_END,
    GRADIENTS,
    PARTS,
    REPLICAS,
    Details,
    Facts,
    Vitals,
    VitalsTaker,
)

HEALTHY: dict[str, int] = dict.fromkeys(PARTS, 1)
PROCESS = Path(__file__).with_name("exchange_process.py")


@contextmanager
def open_exchange(wait_s: float = 30.0) -> Iterator[Exchange]:
    """An exchange over the default group's store; rank 0 closes last, when all are through."""
    store = find_store()
    assert store is not None
    exchange = Exchange(store, dist.get_rank(), dist.get_world_size(), wait_s=wait_s)
    dist.barrier()
    try:
        yield exchange
    finally:
        dist.barrier()
        exchange.close()
    assert exchange.failure is None


def train(disturb: Callable[[int, nn.Module, Any], None]) -> Comparison | None:
    """Take two steps, disturb a rank after the first, and compare the second."""
    torch.manual_seed(0)
    random.seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taker = VitalsTaker(model, optimizer)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with open_exchange() as exchange:
        exchange.publish(taker.take(1, torch.randn(2, 4, generator=generator)))
        disturb(dist.get_rank(), model, optimizer)
        exchange.publish(taker.take(2, torch.randn(2, 4, generator=generator)))
        first, second = exchange.compare(1, wait=True), exchange.compare(2, wait=True)
    if dist.get_rank() == 0:
        own = ("parameters", "buffers", "modes", "optimizer", "rng")
        assert first == Comparison(1, dist.get_world_size(), (), own, {}, ("batch",))
    else:
        assert first is None
    return second


def leave_alone(rank, model, optimizer):
    pass


def move_a_weight(rank, model, optimizer):
    if rank == 1:
        model[0].weight.data.view(torch.int32)[2, 2] ^= 1


def move_a_buffer(rank, model, optimizer):
    if rank == 1:
        model[1].running_mean += 1


def evaluate(rank, model, optimizer):
    if rank == 1:
        model[2].eval()


def change_the_rate(rank, model, optimizer):
    optimizer.param_groups[0]["lr"] = 0.1 + (rank == 1)


def draw(rank, model, optimizer):
    if rank == 1:
        torch.rand(1)


@pytest.mark.ranks(2, 4)
def test_ranks_that_agree_differ_in_nothing_but_the_batch():
    comparison = train(leave_alone)
    if dist.get_rank() == 0:
        assert comparison is not None
        assert comparison.differing == {}
        assert comparison.unlike == ("batch",)


CONTROLS = {
    "parameters": move_a_weight,
    "buffers": move_a_buffer,
    "modes": evaluate,
    "optimizer": change_the_rate,
}


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("part", CONTROLS)
def test_a_rank_that_differs_is_named_with_the_part(part):
    comparison = train(CONTROLS[part])
    if dist.get_rank() == 0:
        agreeing = tuple(rank for rank in range(dist.get_world_size()) if rank != 1)
        assert comparison is not None
        assert comparison.differing == {part: (agreeing, (1,))}
        assert comparison.missing == ()


@pytest.mark.ranks(2)
def test_generators_that_differ_are_told_from_equal_ones():
    comparison = train(draw)
    if dist.get_rank() == 0:
        assert comparison is not None
        assert comparison.unlike == ("rng", "batch")
        assert comparison.differing == {}


@pytest.mark.ranks(2)
def test_the_same_batch_on_every_rank_is_told():
    with open_exchange() as exchange:
        taker = VitalsTaker(nn.Linear(1, 1), None)
        exchange.publish(taker.take(1, torch.ones(3)))
        exchange.publish(taker.take(2, torch.full((3,), float(dist.get_rank()))))
        same, unlike = exchange.compare(1, wait=True), exchange.compare(2, wait=True)
    if dist.get_rank() == 0:
        assert same is not None
        assert unlike is not None
        assert "batch" in same.same
        assert "batch" in unlike.unlike


def wait_for_posts(last: dict[int, int]) -> None:
    """Wait until the comparing rank has left its state and each rank its vitals up to its last step."""
    store = find_store()
    assert store is not None
    watch = PrefixStore("ddpcall/exchange/0/1", store)
    ranks = RankStore(watch, dist.get_rank(), dist.get_world_size())
    while ranks.read_state() is None:
        time.sleep(0.01)
    for rank, step in last.items():
        while rank in ranks.compare(REPLICAS, step).missing:
            time.sleep(0.01)


@pytest.mark.ranks(4)
def test_ranks_that_take_fewer_steps_are_missing_and_waited_for_once():
    """Rank r stops after 1 + r steps, rank 0 goes on."""
    wait_s = 1.5
    last = {1: 2, 2: 3, 3: 4}
    with open_exchange(wait_s=wait_s) as exchange:
        wait_for_posts({})
        if dist.get_rank() > 0:
            for step in range(1, last[dist.get_rank()] + 1):
                exchange.publish(Vitals(step, HEALTHY))
        else:
            wait_for_posts(last)
            began = time.monotonic()
            comparisons: list[Comparison | None] = []
            for step in range(1, 9):
                exchange.publish(Vitals(step, HEALTHY))
                comparisons.append(exchange.compare(step, wait=True))
            seconds = time.monotonic() - began
            missing = [comparison.missing for comparison in comparisons if comparison]
            assert missing == [(), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2, 3)]
            assert 3 * wait_s <= seconds < 6 * wait_s, "three ranks are waited for at six steps, once each"


@pytest.mark.parametrize("tells", [True, False])
def test_a_rank_that_says_it_has_ended_is_not_waited_for(tells):
    """Three ranks in one process; rank 2 ends after its first step."""
    wait_s = 60.0 if tells else 2.0
    store = HashStore()
    first, second, early = [Exchange(store, rank, 3, wait_s=wait_s) for rank in range(3)]
    for exchange in (first, second, early):
        exchange.publish(Vitals(1, HEALTHY))
    if tells:
        early.leave()
    begun = time.monotonic()
    for step in (2, 3):
        first.publish(Vitals(step, HEALTHY))
        second.publish(Vitals(step, HEALTHY))
    told = [first.compare(step, wait=True) for step in (1, 2, 3)]
    seconds = time.monotonic() - begun
    assert [comparison.missing for comparison in told if comparison] == [(), (2,), (2,)]
    assert seconds < 30 if tells else seconds >= wait_s
    if tells:
        early.serve()  # it is not asked any more
        assert time.monotonic() - begun < 30
    for exchange in (early, second, first):
        exchange.close()
    assert [exchange.failure for exchange in (first, second, early)] == [None, None, None]


def test_a_step_that_was_measured_on_one_rank_alone_holds_the_next_up_no_longer_than_that():
    """Rank 0's sensors saw something before steps 3 and 4; both ranks measure 2 and 8."""
    store = HashStore()
    first, _ = exchanges = [Exchange(store, rank, 2, wait_s=60) for rank in range(2)]
    begun = time.monotonic()
    for step in (2, 3, 4, 8):
        for exchange in exchanges if step in (2, 8) else [first]:
            exchange.publish(
                Vitals(step, {"used": 1}, kind=GRADIENTS, judge=lambda comparison, told: comparison.num_ranks)
            )
    assert first.judged(wait=True) == [(2, 2), (3, 1), (4, 1), (8, 2)]
    assert time.monotonic() - begun < 30
    for exchange in reversed(exchanges):
        exchange.close()


def test_a_step_that_one_rank_alone_measured_is_looked_for_less_and_less_often(monkeypatch):
    """Nothing later comes: rank 1 is given up after a few dozen looks; then replicas are compared at once."""
    looks, look = [], RankStore.is_complete
    monkeypatch.setattr(
        RankStore, "is_complete", lambda self, kind, step: looks.append(kind) or look(self, kind, step)
    )
    store = HashStore()
    first, second = exchanges = [Exchange(store, rank, 2, wait_s=3) for rank in range(2)]
    first.publish(Vitals(17, {"used": 1}, kind=GRADIENTS, judge=lambda comparison, told: comparison.missing))
    while not (judged := first.judged()):
        time.sleep(0.01)
    assert judged == [(17, (1,))]
    assert 5 < len(looks) < 28  # every 0.1 s would be 35
    begun = time.monotonic()
    for exchange in exchanges:
        exchange.publish(Vitals(20, HEALTHY))
    comparison = first.compare(20, wait=True)
    assert comparison is not None
    assert comparison.missing == ()
    assert time.monotonic() - begun < 2.5
    for exchange in (second, first):
        exchange.close()


def test_questions_of_both_kinds_are_answered_in_any_order():
    """Rank 1 sleeps while it is asked for its record, and then for details; of details it was asked before."""
    store = HashStore()
    first, second = exchanges = [Exchange(store, rank, 2, wait_s=60) for rank in range(2)]

    ranks = RankStore(PrefixStore("ddpcall/exchange/0/1", store), 0, 2)

    def publish(step: int, rank: int) -> None:
        details: dict[str, Callable[[], Details]] = {"modes": lambda: {"a": str(rank)}}
        exchanges[rank].publish(Vitals(step, dict(HEALTHY, modes=rank), details=details))

    def wait_for_questions() -> None:
        while (state := ranks.read_state()) is None or not state.questions:
            time.sleep(0.01)

    publish(1, 0)
    publish(1, 1)
    comparison = first.compare(1, wait=True)
    assert comparison is not None
    first.ask(comparison)
    wait_for_questions()
    publish(2, 1)
    assert first.details(wait=True) is not None
    begun = time.monotonic()
    for rank in (1, 0):
        exchanges[rank].publish(
            Vitals(
                1,
                {"used": rank},
                kind=GRADIENTS,
                record=lambda: b"record",
                choose=lambda comparison: (1,),
                judge=lambda comparison, told: told,
            )
        )
    wait_for_questions()
    first.ask(comparison)
    second.leave()
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(second.serve)
        assert first.judged(wait=True) == [(1, {1: b"record"})]
        details = first.details(wait=True)
        first.close()
        served.result()
    assert details is not None
    assert details.differing == {"modes": {"a": {0: "0", 1: "1"}}}
    assert time.monotonic() - begun < 30
    second.close()


def test_an_error_in_judging_is_handed_back_and_nothing_more_fails():
    exchange = Exchange(HashStore(), 0, 1)
    exchange.publish(Vitals(1, {}, kind=GRADIENTS, judge=lambda comparison, told: [][0]))
    exchange.publish(Vitals(1, HEALTHY))
    [(step, error)] = exchange.judged(wait=True)
    assert (step, type(error)) == (1, IndexError)
    assert exchange.compare(1, wait=True)
    exchange.close()


def test_a_store_that_fails_at_the_beginning_is_told():
    class Broken:
        def add(self, *_):
            raise RuntimeError("no such host")

    store: Any = Broken()
    exchange = Exchange(store, 0, 2)
    assert exchange.failure == "RuntimeError: no such host"
    exchange.publish(Vitals(1, HEALTHY))
    assert exchange.compare(1, wait=True) is None
    exchange.close()


def test_a_launcher_that_does_not_answer_is_a_trouble_that_is_told(monkeypatch):
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(held.getsockname()[1]))
        monkeypatch.setattr("ddpcall.watch.compare.exchange._CONNECT_S", 0.2)
        exchange = RunExchange()
        assert exchange.begin() is None
    assert exchange.trouble.startswith("DistNetworkError: ")
    exchange.end()


def test_a_rank_that_is_not_watched_is_not_waited_for():
    """Rank 1 of two never announced itself; in the test above rank 2 has, and is waited for."""
    exchange = Exchange(HashStore(), 0, 2, wait_s=60)
    begun = time.monotonic()
    for step in (1, 2):
        exchange.publish(Vitals(step, HEALTHY))
    told = [exchange.compare(step, wait=True) for step in (1, 2)]
    assert [comparison.missing for comparison in told if comparison] == [(1,), (1,)]
    assert time.monotonic() - begun < 30
    exchange.close()


@pytest.mark.ranks(2)
def test_comparing_does_not_touch_the_users_collectives():
    with open_exchange() as exchange:
        for step in range(1, 30):
            exchange.publish(Vitals(step, HEALTHY))
            total = torch.tensor([float(step)])
            dist.all_reduce(total)
            assert total.item() == 2 * step
            if dist.get_rank() == 0 and step > 1:
                exchange.compare(step - 1)


@pytest.mark.ranks(4)
def test_what_differs_is_named_by_rank_for_the_step_that_was_compared():
    """The ranks change everything after that step: the answers are of the step itself."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    last = nn.Linear(2, 2)
    model = nn.Sequential(nn.Linear(2, 2), last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 if rank == 3 else 0.1)
    with torch.no_grad():
        last.bias.add_(float(rank >= 2))
    taker = VitalsTaker(model, optimizer)
    facts = Facts(written=rank)
    with open_exchange() as exchange:
        exchange.publish(taker.take(10, closely=True, facts=lambda: facts))
        optimizer.param_groups[0]["lr"] = 7.0
        with torch.no_grad():
            last.weight.fill_(rank)
        comparison = exchange.compare(10, wait=True)
        if comparison is not None:
            assert comparison.differing["optimizer"] == ((0, 1, 2), (3,))
            assert comparison.differing["parameters"] == ((0, 1), (2, 3))
            exchange.ask(comparison)
            # The others look when they next publish, and never again here: the question must be there by then.
            with exchange._changed:
                exchange._await(lambda: bool(exchange._inbox.state and exchange._inbox.state.questions))
        dist.barrier()
        exchange.publish(taker.take(20))  # which wakes the threads: they read the question
        found = exchange.details(wait=True)
        dist.barrier()
    if rank == 0:
        assert found is not None
        assert (found.step, found.ranks, found.missing) == (10, (0, 2, 3), ())
        assert found.differing["optimizer"] == {"group 0 lr": {0: 0.1, 2: 0.1, 3: 0.2}}
        assert list(found.differing["parameters"]) == ["1.bias"]
        digests = found.differing["parameters"]["1.bias"]
        assert digests[0] != digests[2] == digests[3]
        # About the square root of 2, as sketches tell.
        assert 0.7 < read_drift(found.measures["parameters"]["1.bias"]).distance < 2.8
        assert {rank: fact.written for rank, fact in found.facts.items()} == {0: 0, 2: 2, 3: 3}


@pytest.mark.ranks(2)
def test_a_step_that_is_no_longer_kept_is_forgotten_and_measuring_begins_everywhere():
    model = nn.Linear(1, 1)
    model.train(dist.get_rank() == 0)
    taker = VitalsTaker(model, None)
    with open_exchange() as exchange:
        exchange.publish(taker.take(1))
        comparison = exchange.compare(1, wait=True)
        for step in range(2, 11):
            exchange.publish(taker.take(step))
        exchange.compare(10, wait=True)
        if comparison is not None:
            exchange.measure_from(11)
            exchange.ask(comparison)
        dist.barrier()
        store = find_store()
        assert store is not None
        found, step = None, 11
        if dist.get_rank() == 0:
            exchange.publish(taker.take(step))
            found = exchange.details(wait=True)
            store.set("found", "")
        while dist.get_rank() == 1 and not store.check(["found"]):  # a thread looks when something is published
            exchange.publish(taker.take(step))
            step += 1
        dist.barrier()
        assert exchange.measures(11)
        assert not exchange.measures(10)
    if dist.get_rank() == 0:
        assert found is not None
        assert (found.ranks, found.forgotten) == ((), (0, 1))


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("deviant", [0, 1, None])
def test_ranks_that_leave_answer_about_what_they_leave_with(deviant):
    """What it is made of is read when it is asked for."""
    rank = dist.get_rank()
    store = find_store()
    assert store is not None
    exchange = Exchange(store, rank, dist.get_world_size(), wait_s=30)
    dist.barrier()
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(float(rank == deviant))
        model.bias.zero_()
    taker = VitalsTaker(model, None)
    exchange.publish(taker.take(1))
    wait_for_posts(dict.fromkeys(range(dist.get_world_size()), 1))
    dist.barrier()
    began = time.monotonic()
    exchange.leave(taker.take_last(1))
    found = None
    if rank == 0:
        end = exchange.compare(AT_THE_END, wait=True)
        assert end is not None
        if end.differing:
            exchange.ask(end)
            found = exchange.details(wait=True)
    else:
        exchange.serve()
    exchange.close()
    assert exchange.failure is None
    assert time.monotonic() - began < 25
    if rank == 0 and deviant is not None:
        assert found is not None
        assert list(found.differing["parameters"]) == ["weight"]
        assert set(found.ranks) == {0, 1}
        assert set(found.measures["parameters"]) == {"weight", "bias"}
    else:
        assert found is None


def test_one_rank_compares_with_itself():
    exchange = Exchange(HashStore(), 0, 1)
    exchange.publish(Vitals(1, HEALTHY))
    assert exchange.compare(1, wait=True) == Comparison(1, 1, (), PARTS, {}, ())
    assert exchange.compare(1) is None
    exchange.publish(Vitals(5, HEALTHY))
    exchange.publish(Vitals(9, HEALTHY))
    assert exchange.compare(9, wait=True)
    assert [comparison.step for comparison in exchange.comparisons()] == [5]
    # What was taken already is not waited for.
    began_s = time.monotonic()
    assert exchange.compare(5, wait=True) is None
    assert time.monotonic() - began_s < 10  # the half of what it would wait
    exchange.close()
    with pytest.raises(ValueError, match="step 9 were published after those of step 9"):
        exchange.publish(Vitals(9, HEALTHY))


def test_a_restart_on_the_same_store_starts_anew():
    """As after torchrun's restart: the first attempt's keys and state are still there."""
    store = HashStore()
    first = [Exchange(store, rank, 2, wait_s=5) for rank in range(2)]
    for exchange in first:
        exchange.publish(Vitals(1, HEALTHY))
        exchange.publish(Vitals(2, dict(HEALTHY, modes=exchange._rank)))
    assert first[0].compare(2, wait=True)
    second = [Exchange(store, rank, 2, wait_s=5) for rank in range(2)]
    for exchange in second:
        exchange.publish(Vitals(2, HEALTHY))
    comparison = second[0].compare(2, wait=True)
    assert comparison == Comparison(2, 2, (), PARTS, {}, ())
    for exchange in (*second, *first):
        exchange.close()


@contextmanager
def start_world(
    actions: tuple[str, ...], wait_s: float
) -> Iterator[tuple[list[subprocess.Popen], Callable[[], list[Any]]]]:
    """Ranks in processes of their own, each doing its action after step 2. Yields them and a step of rank 0."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, str(PROCESS), str(server.port)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(len(actions)), str(wait_s), action],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, action in enumerate(actions)
    ]

    def take_step() -> list[Any]:
        assert processes[0].stdin
        assert processes[0].stdout
        processes[0].stdin.write("\n")
        processes[0].stdin.flush()
        return json.loads(processes[0].stdout.readline())

    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        yield processes, take_step
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()


def test_ranks_that_are_killed_leave_or_stop_are_missing_and_waited_for_once():
    with start_world(("none", "kill", "leave", "stop", "none"), wait_s=8) as (processes, take_step):
        steps = [take_step() for _ in range(2)]
        assert [missing for _, missing, *_ in steps] == [[], []]
        assert processes[1].wait(60) == -signal.SIGKILL
        assert processes[2].wait(60) == 0
        third = take_step()
        assert third[1] == [1, 2, 3]
        assert 7 < third[2] < 16
        later = [take_step() for _ in range(5)]
        assert [missing for _, missing, *_ in later] == [[1, 2, 3]] * 5
        assert max(seconds for *_, seconds, _ in later) < 7
        os.kill(processes[3].pid, signal.SIGCONT)
        assert any(take_step()[1] == [1, 2] for _ in range(1000))


def test_a_store_that_stops_answering_holds_nobody_up():
    code = (
        "import sys; from torch.distributed import TCPStore\n"
        "server = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(server.port, flush=True); sys.stdin.read()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    assert server.stdin
    try:
        port = int(server.stdout.readline())
        store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        exchange = Exchange(store, 0, 1, wait_s=2)
        exchange.publish(Vitals(1, HEALTHY))
        assert exchange.compare(1, wait=True)
        server.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for step in range(2, 100):
            exchange.publish(Vitals(step, HEALTHY))
        assert time.monotonic() - began < 10  # asked one by one it would take 98 times 2 s
        assert exchange.compare(2, wait=True) is None
        exchange.close()
        assert time.monotonic() - began < 30
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait()
        exchange._thread.join(30)
        assert not exchange._thread.is_alive()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        server.stdin.close()


def test_a_store_that_dies_is_told_and_stops_the_thread():
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    exchange = Exchange(client, 0, 1, wait_s=2)
    exchange.publish(Vitals(1, HEALTHY))
    assert exchange.compare(1, wait=True)
    del server
    exchange.publish(Vitals(2, HEALTHY))
    assert exchange.compare(2, wait=True) is None
    exchange._thread.join(30)
    assert exchange.failure
    exchange.close()


def test_torchruns_restart_on_the_agents_store_starts_anew():
    script = Path(__file__).with_name("exchange_restart.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert f"1 {[(step, (), True) for step in range(1, 6)]}" in done.stdout.splitlines()


def test_no_thread_is_left_after_close():
    before = threading.active_count()
    exchange = Exchange(HashStore(), 0, 1)
    assert threading.active_count() == before + 1
    exchange.close()
    exchange.close()
    assert threading.active_count() == before


@pytest.mark.ranks(2)
def test_shards_are_no_replicas_and_replicated_dtensors_are():
    """Shards differ by design; a DTensor placed as a replica must not."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    model = nn.Module()
    for name, placement in (("shard", Shard(0)), ("replica", Replicate())):
        local = torch.full((2, 2), float(rank))
        model.register_parameter(name, nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False)))
    taker = VitalsTaker(model, None)
    assert taker.details("parameters")["shard"] == 0
    with open_exchange() as exchange:
        exchange.publish(taker.take(1))
        with torch.no_grad():
            model.get_parameter("replica").to_local().fill_(5)  # type: ignore[operator]
        exchange.publish(taker.take(2))
        first, second = exchange.compare(1, wait=True), exchange.compare(2, wait=True)
    if rank == 0:
        assert first is not None
        assert second is not None
        assert first.differing == {"parameters": ((0,), (1,))}
        assert second.differing == {}
