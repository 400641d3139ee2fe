"""More ranks than records are asked of, as threads of one process: sums certify, and who differs is asked."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore

from ddpcall.mixing.record import RankSketches
from ddpcall.watch.compare.exchange import Exchange
from ddpcall.watch.compare.mixing_watch import MeasuredStep
from tests.unit.test_mixing_sums import make_records

NUM_RANKS = 72
MEAN = np.full((NUM_RANKS, NUM_RANKS), 1 / NUM_RANKS)
NUM_PARAMETERS = 4


def judge(records: list[RankSketches], leave: tuple[int, ...] = ()) -> Any:
    """Let the ranks of a measured step tell of it, and end; return what the comparing rank made of it."""
    store = HashStore()
    exchanges = [Exchange(store, rank, len(records), wait_s=60) for rank in range(len(records))]
    for rank, (exchange, record) in enumerate(zip(exchanges, records, strict=True)):
        if rank not in leave:
            exchange.publish(MeasuredStep.of(record, len(records)).to_vitals(1))
        exchange.leave()
    with ThreadPoolExecutor(len(records)) as pool:
        served = [pool.submit(exchange.serve) for exchange in exchanges[1:]]
        [(step, told)] = exchanges[0].judged(wait=True)
        exchanges[0].close()
        for each in served:
            each.result()
        list(pool.map(Exchange.close, exchanges[1:]))
    assert [exchange.failure for exchange in exchanges] == [None] * len(records)
    assert not isinstance(told, Exception), told
    assert step == 1
    assert store.num_keys() <= len(records) + 2  # the numbers of the watches, and the state
    return told


def make(matrix: Any = MEAN, **weights: Any) -> list[RankSketches]:
    return make_records(matrix, NUM_PARAMETERS, **weights)


def one_apart() -> np.ndarray:
    matrix = MEAN.copy()
    matrix[70] = np.eye(NUM_RANKS)[70]
    return matrix


def test_the_mean_of_many_ranks_is_certified_without_their_records():
    mixing, records, tells_targets = judge(make())
    assert (mixing.shape, mixing.num_ranks, len(records)) == ("averaged", NUM_RANKS, 1)
    assert mixing.residual[0] < 1e-5
    assert mixing.weights == {"equal": tuple(f"layer{index}" for index in range(NUM_PARAMETERS))}
    assert tells_targets


def test_ranks_that_left_before_are_no_part_of_it():
    """The mean is over those that are there: what the others used is over all, and no multiple of that."""
    there = [rank for rank in range(NUM_RANKS) if rank not in (3, 71)]
    matrix = np.zeros((NUM_RANKS, NUM_RANKS))
    matrix[np.ix_(there, there)] = 1 / len(there)
    mixing, _, tells_targets = judge(make(matrix), leave=(3, 71))
    assert (mixing.shape, mixing.ranks) == ("averaged", tuple(there))
    assert not tells_targets
    mixing, *_ = judge(make(), leave=(3, 71))
    assert mixing.shape == "unidentifiable"


def test_a_rank_that_used_its_own_gradient_is_named_and_asked():
    mixing, records, _ = judge(make(one_apart(), after=[2 + (rank == 70) for rank in range(NUM_RANKS)]))
    assert mixing.shape == "different"
    assert "rank 70 used another gradient than 71 others" in mixing.reason
    assert len(records) == 64
    assert 70 in {record.rank for record in records}
    assert mixing.weights == {"parted": tuple(f"layer{index}" for index in range(NUM_PARAMETERS))}


def test_every_rank_on_its_own_is_said_to_be_local():
    mixing, records, _ = judge(make(np.eye(NUM_RANKS), after=list(range(NUM_RANKS))))
    assert (mixing.shape, len(records)) == ("local", 64)


def test_what_all_used_alike_and_is_not_the_mean_is_left_open():
    matrix = np.zeros((NUM_RANKS, NUM_RANKS))
    matrix[:, 0] = 1
    mixing, records, _ = judge(make(matrix))
    assert (mixing.shape, len(records)) == ("unidentifiable", 1)
    assert "no multiple of the mean" in mixing.reason


def test_weights_that_differ_after_the_mean_are_told():
    mixing, records, _ = judge(make(after=[2 + (rank == 70) for rank in range(NUM_RANKS)]))
    assert (mixing.shape, len(records)) == ("averaged", 64)
    assert set(mixing.weights) == {"parted"}


@pytest.mark.parametrize(("num_ranks", "is_told"), [(3, True), (NUM_RANKS, False)])
def test_numbers_of_targets_that_differ_are_asked_of_few_ranks(num_ranks, is_told):
    records = make_records(np.full((num_ranks, num_ranks), 1 / num_ranks), NUM_PARAMETERS)
    records = [replace(each, targets=(("train.py:7", 10 + each.rank, 1.0, 1),)) for each in records]
    mixing, asked, tells_targets = judge(records)
    assert (mixing.shape, tells_targets) == ("averaged", is_told)
    assert len(asked) == (num_ranks if is_told else 1)
