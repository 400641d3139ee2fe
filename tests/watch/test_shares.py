"""DC402: shares that overlap or leave samples out, on two ranks, on the line to change; what looks alike."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import ddpcall
from ddpcall.watch.rules import shares

pytestmark = pytest.mark.ranks(2, timeout=120)


class Training:
    """Trains a wrapped model under a watch."""

    def __init__(self, rank, tmp_path, every=10):
        self.rank = rank.rank
        self.barrier = rank.barrier
        self.session = ddpcall.watch(on_finding="record", json=tmp_path / "f.json", every=every)
        torch.manual_seed(0)
        self.model = DistributedDataParallel(nn.Linear(1, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        torch.manual_seed(self.rank)

    def step(self, *batches):
        torch.stack([self.model(batch).square().mean() for batch in batches]).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, batches, most=10_000):
        for number, (batch,) in enumerate(batches):
            if number == most:
                break
            self.step(batch)
        return self

    def found(self):
        """End the watch on both ranks and return what they found, but for what is said of equal batches."""
        self.session.close()
        self.barrier()
        told = [finding for finding in self.session.all_findings() if finding.code != "DC206"]
        return [(finding.code, finding.line, finding.step, finding.message) for finding in told]


@pytest.fixture
def training(rank, tmp_path):
    training = Training(rank, tmp_path)
    yield training
    training.session.close()


def dataset(num=64, offset=0.0):
    return TensorDataset(torch.arange(num, dtype=torch.float32)[:, None] / num + offset)


def loader(sampler, batch_size=4, **options):
    return DataLoader(sampler.dataset, batch_size=batch_size, sampler=sampler, **options)


def here(test):
    source, first = inspect.getsourcelines(test)
    (found,) = [first + offset for offset, text in enumerate(source) if text.rstrip().endswith("# here")]
    return found


def seen_alone(seeds):
    """Return how many of 64 samples two shares have, and how many both."""
    given = [
        set(DistributedSampler(dataset(), num_replicas=2, rank=rank, seed=seed)) for rank, seed in enumerate(seeds)
    ]
    return len(given[0] | given[1]), len(given[0] & given[1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_seed_per_rank_is_found_where_the_sampler_is_made(training, num_workers):
    sampler = DistributedSampler(dataset(), seed=training.rank)  # here
    seen, twice = seen_alone((0, 1))
    message = (
        "The ranks' DistributedSamplers differ: seed=0 on rank 0, seed=1 on rank 1. "
        f"{seen} of 64 samples were seen in this epoch, {twice} of them by more than one rank."
    )
    line = here(test_a_seed_per_rank_is_found_where_the_sampler_is_made)
    assert training.epoch(loader(sampler, num_workers=num_workers)).found() == [("DC402", line, 1, message)]


def test_one_share_for_all_is_found_by_its_equal_batches(training):
    sampler = DistributedSampler(dataset(), num_replicas=2, rank=0)  # here
    ((code, line, step, message),) = training.epoch(loader(sampler)).found()
    assert (code, line, step) == ("DC402", here(test_one_share_for_all_is_found_by_its_equal_batches), 1)
    assert message == (
        "DistributedSampler was made with rank=0 on ranks 0, 1. "
        "32 of 64 samples were seen in this epoch, 32 of them by more than one rank."
    )


def test_one_replica_for_all_is_found_by_its_equal_batches(training):
    sampler = DistributedSampler(dataset(), num_replicas=1, rank=0)
    ((code, _, _, message),) = training.epoch(loader(sampler)).found()
    assert (code, "num_replicas=1 on ranks 0, 1." in message) == ("DC402", True)


def test_shares_that_nobody_has_are_found(training):
    sampler = DistributedSampler(dataset(), num_replicas=4, rank=training.rank)
    ((code, _, _, message),) = training.epoch(loader(sampler)).found()
    assert (code, message) == (
        "DC402",
        "The data is divided into 4 shares for 2 ranks. 32 of 64 samples were seen in this epoch.",
    )


def test_an_epoch_told_differently_is_found_where_it_was_told(training):
    sampler = DistributedSampler(dataset())
    for epoch in range(2):
        sampler.set_epoch(epoch + 3 * training.rank * epoch)  # here
        training.epoch(loader(sampler))
    ((code, line, step, message),) = training.found()
    line_told = here(test_an_epoch_told_differently_is_found_where_it_was_told)
    assert (code, line, step) == ("DC402", line_told, 9)
    assert "epoch=1 on rank 0, epoch=4 on rank 1." in message


def test_a_long_epoch_is_judged_before_it_is_over(training):
    batches = loader(DistributedSampler(dataset(10_000), seed=training.rank), batch_size=128)
    ((code, _, _, message),) = training.epoch(batches, most=11).found()
    assert (code, "Of the first 1024 indices of each rank, " in message) == ("DC402", True)


def test_more_indices_than_are_sent_are_estimated(training, monkeypatch):
    monkeypatch.setattr(shares, "_MOST_SENT", 128)
    monkeypatch.setattr(shares, "ENOUGH", 4096)
    batches = loader(DistributedSampler(dataset(4096), seed=training.rank), batch_size=256)
    ((_, _, _, message),) = training.epoch(batches).found()
    seen = int(message.partition("About ")[2].partition(" ")[0])
    assert 0.7 * 3072 < seen < 1.3 * 3072


class Resumed(DistributedSampler):
    """Skips what was seen: an order of its own."""

    def __iter__(self):
        return iter(list(super().__iter__())[8:])


def right(training):
    yield loader(DistributedSampler(dataset()))
    yield loader(DistributedSampler(dataset(61)))  # three samples twice
    yield loader(DistributedSampler(dataset(61), drop_last=True))
    yield loader(DistributedSampler(dataset(), shuffle=False))


def its_own_order(training):
    yield loader(DistributedSampler(dataset(), num_replicas=1, rank=0, seed=training.rank))
    yield DataLoader(dataset(), batch_size=4, shuffle=True)
    yield DataLoader(dataset(), 4, sampler=RandomSampler(dataset(), generator=torch.Generator().manual_seed(1)))
    yield DataLoader(dataset(), 4, sampler=WeightedRandomSampler([1.0] * 64, 64))


def its_own_dataset(training):
    yield loader(DistributedSampler(dataset(offset=training.rank), num_replicas=1, rank=0))
    yield loader(DistributedSampler(dataset(64 + 32 * training.rank), num_replicas=1, rank=0), drop_last=True)


def its_own_folds(training):
    data = dataset()
    for fold in range(2):
        yield loader(DistributedSampler(data, num_replicas=4, rank=2 * fold + training.rank))


def an_order_of_its_own(training):
    yield loader(Resumed(dataset(), seed=training.rank))


def in_batches(training):
    sampler = DistributedSampler(dataset())
    yield DataLoader(sampler.dataset, batch_sampler=BatchSampler(sampler, 4, drop_last=False))


def too_few(training):
    yield loader(DistributedSampler(dataset(6), seed=training.rank), batch_size=1)


@pytest.mark.parametrize(
    "epochs",
    [right, its_own_order, its_own_dataset, its_own_folds, an_order_of_its_own, in_batches, too_few],
    ids=lambda epochs: epochs.__name__,
)
def test_what_looks_alike_is_silent(training, epochs):
    for batches in epochs(training):
        training.epoch(batches, most=16)
    assert training.found() == []


def test_an_evaluation_with_a_seed_per_rank_is_none_of_its_business(training):
    evaluated = loader(DistributedSampler(dataset(), seed=training.rank))
    for _ in range(3):
        training.step(torch.ones(4, 1) + training.rank)
        with torch.no_grad():
            assert all(training.model(batch).isfinite().all() for (batch,) in evaluated)
    assert training.found() == []


def test_two_loaders_in_step_are_two(training):
    first, second = DistributedSampler(dataset()), DistributedSampler(dataset(), seed=7 * training.rank)
    for (one,), (two,) in zip(loader(first), loader(second), strict=True):
        training.step(one, two)
    ((code, _, _, message),) = training.found()
    assert (code, "seed=0 on rank 0, seed=7 on rank 1" in message) == ("DC402", True)
