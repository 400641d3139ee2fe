"""DC404: the same random numbers on two ranks, for batches that differ, on their line; what looks alike."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ddpcall

pytestmark = pytest.mark.ranks(2, timeout=120)
RANDOM = (torch.randn, torch.rand_like, torch.Tensor.uniform_)


class Training:
    """Trains a wrapped model on a loader's batches under a watch; what a test adds to them is random."""

    def __init__(self, rank, tmp_path):
        self.rank = rank.rank
        self.barrier = rank.barrier
        self.session = ddpcall.watch(on_finding="record", json=tmp_path / "f.json")

    def train(self, augment, *, seed=0, drops=0.0, sampler=None, collate=None, epochs=1):
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 5), nn.Dropout(drops), nn.Linear(5, 2)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        data = TensorDataset(torch.arange(96.0)[:, None].expand(96, 6) / 96)
        sampler = sampler or DistributedSampler(data)
        options = {} if collate is None else {"collate_fn": collate}
        torch.manual_seed(seed)
        for (batch,) in DataLoader(data, batch_size=8, sampler=sampler, **options):
            model(augment(batch)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return self

    def found(self):
        """End the watch on both ranks and return what they found, but for what is said of equal batches."""
        self.session.close()
        self.barrier()
        assert (torch.randn, torch.rand_like, torch.Tensor.uniform_) == RANDOM
        told = [finding for finding in self.session.all_findings() if finding.code not in ("DC206", "DC402")]
        return [(finding.code, finding.line, finding.step) for finding in told]

    @property
    def message(self):
        return self.session.all_findings()[0].message


@pytest.fixture
def training(rank, tmp_path):
    training = Training(rank, tmp_path)
    yield training
    training.session.close()


def add_noise(batch):
    return batch + 0.1 * torch.randn(batch.shape)  # here


def mask(batch):
    keep = torch.empty(len(batch), 6)
    return batch * keep.bernoulli_(0.5)  # here


def collate_noisily(samples):
    batch = torch.stack([sample for (sample,) in samples])
    return (batch + torch.rand_like(batch),)  # here


def nothing(batch):
    return batch


def here(function):
    source, first = inspect.getsourcelines(function)
    (found,) = [first + offset for offset, text in enumerate(source) if text.rstrip().endswith("# here")]
    return found


@pytest.mark.parametrize("augment", [add_noise, mask], ids=["noise", "mask"])
def test_the_same_numbers_for_other_batches_are_a_note_where_they_are_drawn(training, augment):
    assert training.train(augment).found() == [("DC404", here(augment), 1)]
    assert training.message.startswith("All 2 ranks drew the same 48 random numbers here in one step, ")


def test_numbers_that_the_collater_draws_are_heard_of(training):
    assert training.train(nothing, collate=collate_noisily).found() == [("DC404", here(collate_noisily), 1)]


def send(batch):
    noise = torch.randn(batch.shape)
    dist.broadcast(noise, 0)
    return batch + noise


def script_a_function(batch):
    def jitter(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand([8, 6]) * 0.1

    return torch.jit.script(jitter)(batch)


def draw_by_hand(generator):
    return lambda batch: batch + torch.randn(batch.shape, generator=generator)


def of_weights(batch):
    return batch + 0.01 * torch.randn(5, 6).mean()


def few(batch):
    return batch * (1 + torch.rand(len(batch), 1))


def permute(batch):
    return batch + batch[torch.randperm(len(batch))]


MAY_BE_THE_SAME = {
    "sent": send,
    "own-generator": draw_by_hand(torch.Generator()),
    "of-weights": of_weights,
    "few": few,
    "order": permute,
    "nothing": nothing,
    "scripted": script_a_function,
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("augment", MAY_BE_THE_SAME.values(), ids=MAY_BE_THE_SAME)
def test_what_may_be_the_same_is_silent(training, augment):
    assert training.train(augment).found() == []


def test_a_seed_per_rank_is_silent(training):
    assert training.train(add_noise, seed=training.rank).found() == []


def test_one_batch_for_all_ranks_is_silent(training):
    sampler = DistributedSampler(torch.zeros(96), num_replicas=2, rank=0)  # type: ignore[arg-type]
    assert training.train(add_noise, sampler=sampler).found() == []


def test_where_dropout_tells_it_nothing_is_said_twice(training):
    assert [code for code, *_ in training.train(add_noise, drops=0.5).found()] == ["DC207"]
