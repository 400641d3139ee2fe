"""The ledger, with simulated ranks on one store: who differs, who is missing, what it costs, what is left."""

import random
from collections import Counter
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from ddpcall.taps import CallSite
from ddpcall.watch.compare.store_protocol import Answer, Comparison, Ledger, Question, State, compare_details
from ddpcall.watch.compare.vitals import PARTS, Details, Facts, Vitals

HEALTHY: dict[str, int] = dict.fromkeys(PARTS, 1)


class CountingStore:
    """Counts the requests that pass through."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.requests: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        def request(*args: Any) -> Any:
            self.requests[name] += 1
            return getattr(self.store, name)(*args)

        return request


@pytest.fixture(scope="module")
def server() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def store(server: TCPStore, request: pytest.FixtureRequest) -> PrefixStore:
    return PrefixStore(request.node.name, server)


def make_ledgers(store: Any, world_size: int) -> list[Ledger]:
    return [Ledger(store, rank, world_size) for rank in range(world_size)]


def expect(step: int, vitals: dict[int, dict[str, int]], world_size: int) -> Comparison:
    """Compare all with all, the slow way."""
    differing, unlike, same = {}, [], []
    for part in PARTS:
        groups: dict[int | None, list[int]] = {}
        for rank in sorted(vitals):
            groups.setdefault(vitals[rank].get(part), []).append(rank)
        ordered = sorted(map(tuple, groups.values()), key=lambda ranks: (-len(ranks), ranks[0]))
        if len(groups) > 1 and part in ("rng", "batch"):
            unlike.append(part)
        elif len(groups) > 1:
            differing[part] = tuple(ordered)
        elif None not in groups:
            same.append(part)
    missing = tuple(rank for rank in range(world_size) if rank not in vitals)
    return Comparison(step, len(vitals), missing, tuple(same), differing, tuple(unlike))


@pytest.mark.parametrize("world_size", [1, 2, 7, 8, 9, 63, 64, 65, 200])
def test_all_that_differs_and_all_that_miss_are_named_in_any_order_of_arrival(store, world_size):
    generator = random.Random(world_size)
    ledgers = make_ledgers(store, world_size)
    for step in range(1, 12):
        vitals = {rank: dict(HEALTHY, batch=rank) for rank in range(world_size)}
        for rank in generator.sample(
            range(world_size), min(world_size, generator.choice([0, 0, 1, 3, world_size]))
        ):
            vitals[rank][generator.choice(PARTS)] = generator.choice([2, 3, -(2**63), 2**63 - 1])
        for rank in generator.sample(range(world_size), generator.choice([0, 0, world_size // 3])):
            del vitals[rank]
        order = generator.sample(sorted(vitals), len(vitals))
        for rank in order:
            ledgers[rank].post("attempt", Vitals(step, vitals[rank]))
        expected = expect(step, vitals, world_size)
        assert ledgers[0].is_complete("attempt", step) == (not expected.missing)
        assert tuple(ledgers[0].find_missing("attempt", step)) == expected.missing
        assert ledgers[0].compare("attempt", step) == expected


def test_a_part_that_one_rank_cannot_tell_differs(store):
    ledgers = make_ledgers(store, 3)
    for rank, parts in enumerate([HEALTHY, HEALTHY, {part: 1 for part in PARTS if part != "optimizer"}]):
        ledgers[rank].post("attempt", Vitals(1, parts))
    comparison = ledgers[0].compare("attempt", 1)
    assert comparison.differing == {"optimizer": ((0, 1), (2,))}
    assert "optimizer" not in comparison.same


def test_a_part_that_no_rank_can_tell_is_not_called_the_same(store):
    ledgers = make_ledgers(store, 2)
    for ledger in ledgers:
        ledger.post("attempt", Vitals(1, {"modes": 5}))
    assert ledgers[0].compare("attempt", 1) == Comparison(1, 2, (), ("modes",), {}, ())


def test_a_step_nobody_published_is_all_missing(store):
    assert make_ledgers(store, 10)[0].compare("attempt", 1) == Comparison(1, 0, tuple(range(10)), (), {}, ())


@pytest.mark.parametrize("world_size", [1, 2, 8, 64, 700])
def test_a_rank_makes_the_same_few_requests_however_many_ranks_there_are(world_size):
    store = CountingStore(HashStore())
    ledgers = make_ledgers(store, world_size)
    for rank, ledger in enumerate(ledgers):
        ledger.post("attempt", Vitals(1, dict(HEALTHY, batch=rank, rng=rank)))
    assert store.requests["compare_set"] == world_size
    assert store.requests["add"] <= world_size * 8 / 7 + 4
    assert set(store.requests) == {"compare_set", "add"}
    before = store.requests.total()
    ledgers[0].compare("attempt", 1)
    assert store.requests.total() - before == 2  # the root and the reference


@pytest.mark.parametrize("missing", [0, 1])
def test_one_missing_or_differing_rank_among_many_is_found_along_one_path(missing):
    store = CountingStore(HashStore())
    ledgers = make_ledgers(store, 4096)
    for rank, ledger in enumerate(ledgers):
        if rank != 1234:
            ledger.post("attempt", Vitals(1, HEALTHY))
        elif not missing:
            ledger.post("attempt", Vitals(1, dict(HEALTHY, modes=2)))
    store.requests.clear()
    comparison = ledgers[0].compare("attempt", 1)
    assert comparison.missing == ((1234,) if missing else ())
    assert list(comparison.differing) == ([] if missing else ["modes"])
    assert store.requests.total() <= 8


def test_every_key_is_deleted_once_compared(server, store):
    ledgers = make_ledgers(store, 70)
    before = server.num_keys()
    for step in range(1, 30):
        for rank, ledger in enumerate(ledgers):
            ledger.delete_created(step - 2)
            ledger.post("attempt", Vitals(step, dict(HEALTHY, batch=rank, modes=rank % 3)))
        ledgers[0].compare("attempt", step)
        if step == 2:
            after_two = server.num_keys()
    assert server.num_keys() == after_two
    for ledger in ledgers:
        ledger.delete_created(29)
    assert server.num_keys() == before


def test_keys_do_not_pile_up_when_nobody_compares(server, store):
    ledger = Ledger(store, 0, 1)
    before = server.num_keys()
    for step in range(500):
        ledger.post("attempt", Vitals(step, HEALTHY))
        ledger.delete_created(-1)
    assert server.num_keys() - before == 64 * 2


def test_more_differing_ranks_than_are_grouped_are_all_named():
    ledgers = make_ledgers(HashStore(), 1100)
    for rank, ledger in enumerate(ledgers):
        ledger.post("attempt", Vitals(1, dict(HEALTHY, parameters=1 if rank == 0 else 2)))
    comparison = ledgers[0].compare("attempt", 1)
    assert [len(group) for group in comparison.differing["parameters"]] == [1024, 1]
    assert comparison.ungrouped == tuple(range(1025, 1100))
    assert comparison.missing == ()


def test_attempts_do_not_see_each_other(store):
    first, second = make_ledgers(store, 2)
    first.post("old", Vitals(1, HEALTHY))
    second.post("new", Vitals(1, dict(HEALTHY, modes=9)))
    assert first.compare("new", 1) == Comparison(1, 1, (0,), PARTS, {}, ())


def test_the_state_survives_the_store(store):
    ledger = Ledger(store, 0, 1)
    assert ledger.read_state() is None
    state = State("attempt", 12, Question(3, 20, ("parameters", "modes"), (0, 5)), measure_from=40)
    for written in (state, State("other"), State("other", closed=True)):
        ledger.write_state(written)
        assert ledger.read_state() == written


def test_answers_are_compared_by_name(store):
    question = Question(1, 20, ("parameters", "optimizer"), (0, 1, 2))
    common: Details = {"a.weight": 2**63 - 1, "a.bias": -(2**63)}
    details: list[dict[str, Details]] = [
        {"parameters": common, "optimizer": {"lr": 0.1, "class": "SGD"}},
        {"parameters": {**common, "a.bias": 7}, "optimizer": {"lr": float("nan"), "class": "SGD"}},
        {"parameters": {**common, "extra": 1}, "optimizer": {"lr": 0.1, "class": "SGD"}},
    ]
    loaded = Facts(loads=(1, CallSite("train.py", 7, "main", CallSite("lib.py", 8, "load"))))
    ledgers = make_ledgers(store, 3)
    for ledger, each in zip(ledgers, details, strict=True):
        ledger.answer("attempt", question, Answer(each, {"parameters": {"a.bias": "1.0"}}, loaded))
    found = compare_details(question, ledgers[0].take_answers("attempt", question))
    assert (found.step, found.ranks, found.missing, found.forgotten) == (20, (0, 1, 2), (), ())
    assert found.differing["parameters"] == {"a.bias": {0: -(2**63), 1: 7, 2: -(2**63)}, "extra": {2: 1}}
    assert repr(found.differing["optimizer"]) == "{'lr': {0: 0.1, 1: nan, 2: 0.1}}"
    assert found.measures == {"parameters": {"a.bias": dict.fromkeys(range(3), "1.0")}}
    assert found.facts == dict.fromkeys(range(3), loaded)
    assert found.facts[0].loads[1].called_from == CallSite("lib.py", 8, "load")
    ledgers[0].delete_answers("attempt", question)
    assert ledgers[0].take_answers("attempt", question) == {}


def test_a_rank_that_kept_nothing_of_a_step_or_not_enough_has_forgotten_it(store):
    question = Question(1, 20, ("modes", "parameters"), (0, 1, 2, 3))
    ledgers = make_ledgers(store, 4)
    modes: dict[str, Details] = {"modes": {"a": "train"}}
    ledgers[0].answer("attempt", question, Answer({**modes, "parameters": {}}, {"parameters": {}}, Facts()))
    ledgers[1].answer("attempt", question, Answer(modes, {}, Facts()))
    ledgers[2].answer("attempt", question, None)
    found = compare_details(question, ledgers[0].take_answers("attempt", question))
    assert (found.ranks, found.missing, found.forgotten) == ((0,), (3,), (1, 2))
