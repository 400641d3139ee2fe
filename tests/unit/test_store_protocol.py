"""The store protocol, ranks simulated on one store: who differs, who is missing, what it costs, what is left."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore, PrefixStore, TCPStore

from ddpcall.taps import CallSite
from ddpcall.watch.compare.store_protocol import Answer, Comparison, Question, RankStore, State, compare_details
from ddpcall.watch.compare.summary import MAX_GROUPS
from ddpcall.watch.compare.vitals import GRADIENTS, PARTS, REPLICAS, Details, Facts, Vitals

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


def make_ranks(store: Any, world_size: int) -> list[RankStore]:
    return [RankStore(store, rank, world_size) for rank in range(world_size)]


def done(step: int) -> dict[str, int]:
    return {REPLICAS: step, GRADIENTS: step}


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
    ranks = make_ranks(store, world_size)
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
            ranks[rank].post(Vitals(step, vitals[rank]))
        expected = expect(step, vitals, world_size)
        assert ranks[0].is_complete(REPLICAS, step) == (not expected.missing)
        assert ranks[0].compare(REPLICAS, step).missing == expected.missing
        assert ranks[0].compare(REPLICAS, step) == expected


def test_a_part_that_one_rank_cannot_tell_differs(store):
    ranks = make_ranks(store, 3)
    for rank, parts in enumerate([HEALTHY, HEALTHY, {part: 1 for part in PARTS if part != "optimizer"}]):
        ranks[rank].post(Vitals(1, parts))
    comparison = ranks[0].compare(REPLICAS, 1)
    assert comparison.differing == {"optimizer": ((0, 1), (2,))}
    assert "optimizer" not in comparison.same


def test_a_part_that_no_rank_can_tell_is_not_called_the_same(store):
    ranks = make_ranks(store, 2)
    for each in ranks:
        each.post(Vitals(1, {"modes": 5}))
    assert ranks[0].compare(REPLICAS, 1) == Comparison(1, 2, (), ("modes",), {}, ())


def test_a_step_nobody_published_is_all_missing(store):
    assert make_ranks(store, 10)[0].compare(REPLICAS, 1) == Comparison(1, 0, tuple(range(10)), (), {}, ())


@pytest.mark.parametrize("world_size", [1, 2, 8, 64, 700])
def test_a_rank_makes_the_same_few_requests_however_many_ranks_there_are(world_size):
    store = CountingStore(HashStore())
    ranks = make_ranks(store, world_size)
    for rank, each in enumerate(ranks):
        each.post(Vitals(1, dict(HEALTHY, batch=rank, rng=rank)))
    # Two for what a rank says, and three for each eight of them: read, and the same one level up.
    assert store.requests["append"] == store.requests["add"] <= world_size * 8 / 7 + 4
    assert store.requests["compare_set"] <= world_size / 7 + 4
    assert set(store.requests) == {"append", "compare_set", "add"}
    before = store.requests.total()
    ranks[0].compare(REPLICAS, 1)
    assert store.requests.total() - before == 1  # the root


@pytest.mark.parametrize("missing", [0, 1])
def test_one_missing_or_differing_rank_among_many_is_found_along_one_path(missing):
    store = CountingStore(HashStore())
    ranks = make_ranks(store, 4096)
    for rank, each in enumerate(ranks):
        if rank != 1234:
            each.post(Vitals(1, HEALTHY))
        elif not missing:
            each.post(Vitals(1, dict(HEALTHY, modes=2)))
    store.requests.clear()
    comparison = ranks[0].compare(REPLICAS, 1)
    assert comparison.missing == ((1234,) if missing else ())
    assert list(comparison.differing) == ([] if missing else ["modes"])
    assert store.requests.total() <= 8


def test_every_key_is_deleted_once_compared(server, store):
    ranks = make_ranks(store, 70)
    before = server.num_keys()
    for step in range(1, 30):
        for rank, each in enumerate(ranks):
            each.delete_created(done(step - 2))
            each.post(Vitals(step, dict(HEALTHY, batch=rank, modes=rank % 3)))
        ranks[0].compare(REPLICAS, step)
        if step == 2:
            after_two = server.num_keys()
    assert server.num_keys() == after_two
    for each in ranks:
        each.delete_created(done(29))
    assert server.num_keys() == before


def test_keys_do_not_pile_up_when_nobody_compares(server, store):
    [rank] = make_ranks(store, 1)
    before = server.num_keys()
    for step in range(500):
        rank.post(Vitals(step, HEALTHY))
        rank.delete_created({})
    assert server.num_keys() - before == 64 * 2


def test_more_digests_than_are_grouped_leave_the_other_ranks_named():
    ranks = make_ranks(HashStore(), 1100)
    for rank, each in enumerate(ranks):
        each.post(Vitals(1, dict(HEALTHY, parameters=rank if rank < 40 else 99)))
    comparison = ranks[0].compare(REPLICAS, 1)
    groups = comparison.differing["parameters"]
    assert groups[0] == tuple(range(40, 1100))
    assert {*comparison.ungrouped, *(rank for group in groups for rank in group)} == set(range(1100))
    assert 2 <= len(groups) <= MAX_GROUPS
    assert comparison.missing == ()


def test_any_number_of_vitals_of_any_name_are_compared(store):
    many = dict.fromkeys(map(str, range(50)), 7)
    ranks = make_ranks(store, 20)
    for rank, each in enumerate(ranks):
        each.post(Vitals(1, many | {"48": int(rank == 13)}))
    comparison = ranks[0].compare(REPLICAS, 1)
    assert comparison.differing == {"48": (tuple(rank for rank in range(20) if rank != 13), (13,))}
    assert set(comparison.same) == many.keys() - {"48"}


@pytest.mark.parametrize("world_size", [1, 8, 9, 65, 200])
def test_numbers_are_added_up_over_the_ranks_that_are_there(store, world_size):
    ranks = make_ranks(store, world_size)
    sums = np.random.default_rng(0).normal(size=(world_size, 5))
    there = [rank for rank in range(world_size) if rank % 7 != 3]
    for rank in random.Random(0).sample(there, len(there)):
        ranks[rank].post(Vitals(3, {}, kind=GRADIENTS, sums=sums[rank]))
    found = ranks[0].compare(GRADIENTS, 3)
    assert found.sums is not None
    assert np.allclose(found.sums, sums[there].sum(axis=0))
    assert found.num_ranks == len(there)


@pytest.mark.parametrize("other", [None, np.ones(4)])
def test_there_is_no_sum_where_one_rank_has_none_or_other_numbers(store, other):
    ranks = make_ranks(store, 10)
    for rank, each in enumerate(ranks):
        each.post(Vitals(1, {}, kind=GRADIENTS, sums=other if rank == 9 else np.ones(5)))
    assert ranks[0].compare(GRADIENTS, 1).sums is None


def test_steps_of_two_kinds_do_not_see_each_other(store):
    first, second = make_ranks(store, 2)
    first.post(Vitals(1, HEALTHY))
    second.post(Vitals(1, dict(HEALTHY, modes=9), kind=GRADIENTS))
    assert first.compare(GRADIENTS, 1).missing == (0,)
    assert first.compare(REPLICAS, 1) == Comparison(1, 1, (1,), PARTS, {}, ())


def test_watches_one_after_the_other_do_not_see_each_other(store):
    """Rank 1 begins its second while rank 0 is in its first."""
    first, second = ([RankStore(store, rank, 2) for rank in range(2)] for _ in range(2))
    for each in (first[0], first[1], second[1]):
        each.begin()
    first[0].post(Vitals(1, HEALTHY))
    second[1].post(Vitals(1, HEALTHY))
    assert first[0].compare(REPLICAS, 1).missing == (1,)
    assert first[0].find_silent({1}) == set()
    assert second[1].find_silent({0}) == {0}
    second[0].begin()
    assert second[0].compare(REPLICAS, 1).missing == (0,)
    assert second[1].find_silent({0}) == set()


def test_a_rank_that_leaves_names_its_last_step_of_each_kind(store):
    first, second = make_ranks(store, 2)
    assert first.find_left(REPLICAS, 1, {1}) == set()
    second.leave({REPLICAS: 4})
    assert first.find_left(REPLICAS, 4, {1}) == set()
    assert first.find_left(REPLICAS, 5, {1}) == {1}
    assert first.find_left(GRADIENTS, 1, {1}) == {1}


def test_the_state_survives_the_store(store):
    [rank] = make_ranks(store, 1)
    assert rank.read_state() is None
    questions = Question(3, 20, ("parameters", "modes"), (0, 5)), Question(4, 2, (), (1,), GRADIENTS)
    for written in (State(done(12), questions, measure_from=40), State(), State(closed=True)):
        rank.write_state(written)
        assert rank.read_state() == written


def test_answers_are_compared_by_name(store):
    question = Question(1, 20, ("parameters", "optimizer"), (0, 1, 2))
    common: Details = {"a.weight": 2**63 - 1, "a.bias": -(2**63)}
    details: list[dict[str, Details]] = [
        {"parameters": common, "optimizer": {"lr": 0.1, "class": "SGD"}},
        {"parameters": {**common, "a.bias": 7}, "optimizer": {"lr": float("nan"), "class": "SGD"}},
        {"parameters": {**common, "extra": 1}, "optimizer": {"lr": 0.1, "class": "SGD"}},
    ]
    loaded = Facts(loads=(1, CallSite("train.py", 7, "main", CallSite("lib.py", 8, "load"))))
    ranks = make_ranks(store, 3)
    for rank, each in zip(ranks, details, strict=True):
        rank.answer(question, Answer(each, {"parameters": {"a.bias": "1.0"}}, loaded).to_bytes())
    found = compare_details(question, ranks[0].take_answers(question, question.ranks))
    assert (found.step, found.ranks, found.missing, found.forgotten) == (20, (0, 1, 2), (), ())
    assert found.differing["parameters"] == {"a.bias": {0: -(2**63), 1: 7, 2: -(2**63)}, "extra": {2: 1}}
    assert repr(found.differing["optimizer"]) == "{'lr': {0: 0.1, 1: nan, 2: 0.1}}"
    assert found.measures == {"parameters": {"a.bias": dict.fromkeys(range(3), "1.0")}}
    assert found.facts == dict.fromkeys(range(3), loaded)
    assert found.facts[0].loads[1].called_from == CallSite("lib.py", 8, "load")
    assert ranks[0].take_answers(question, question.ranks) == {}


def test_a_rank_that_kept_nothing_of_a_step_or_not_enough_has_forgotten_it(store):
    question = Question(1, 20, ("modes", "parameters"), (0, 1, 2, 3))
    ranks = make_ranks(store, 4)
    modes: dict[str, Details] = {"modes": {"a": "train"}}
    ranks[0].answer(question, Answer({**modes, "parameters": {}}, {"parameters": {}}, Facts()).to_bytes())
    ranks[1].answer(question, Answer(modes, {}, Facts()).to_bytes())
    ranks[2].answer(question, b"")
    found = compare_details(question, ranks[0].take_answers(question, question.ranks))
    assert (found.ranks, found.missing, found.forgotten) == ((0,), (3,), (1, 2))
