"""DC401: a sampler that shuffles gives the same order again, on the line of the second epoch; what looks alike."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)

import ddpcall
from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.rules.data import OrderRule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.loaders import LoaderSensor


class Silent:
    """Publishes nothing."""

    rank = 0
    stops = False

    def wants(self, finding):
        return True

    def publish(self, finding):
        pass

    def republish(self):
        pass

    def all_findings(self):
        return []


class Training:
    """Loops over loaders, followed by the rule; a step is counted as an optimizer's is."""

    def __init__(self):
        self.run = Run(FindingsBook(Silent()))
        self.rule = OrderRule(self.run)
        self.run.keep(LoaderSensor(self.run, [self.rule]).attach())
        self.optimizer = self.make_optimizer()

    def make_optimizer(self):
        return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)

    def step(self):
        self.run.steps.begin(self.optimizer)

    def epoch(self, batches, steps=True, most=1000):
        for number, _ in enumerate(batches):  # here
            if steps:
                self.step()
            if number + 1 == most:
                break

    @property
    def findings(self):
        return self.run.book.findings()

    def found(self):
        self.rule.close(in_order=True)
        assert self.run.faults == []
        return [(finding.code, finding.line, finding.step, finding.count) for finding in self.findings]


@pytest.fixture
def training():
    training = Training()
    yield training
    training.run.detach()


def dataset(num=48):
    return TensorDataset(torch.arange(num))


def shares(data, **options):
    return DistributedSampler(data, num_replicas=2, rank=0, **options)


def loader(data=None, **options):
    data = data or dataset()
    return DataLoader(data, batch_size=8, sampler=shares(data), **options)


LINE = inspect.getsource(Training).splitlines().index("        for number, _ in enumerate(batches):  # here")
HERE = inspect.getsourcelines(Training)[1] + LINE


def test_an_epoch_that_was_not_told_is_found_and_counted(training):
    batches = loader()
    for _ in range(3):
        training.epoch(batches)
    assert training.found() == [("DC401", HERE, 4, 2)]
    (finding,) = training.findings
    assert "the same 24 indices" in finding.message
    assert "told epoch 0 both times" in finding.message
    assert finding.fix == "`batches.sampler.set_epoch(epoch)` before each epoch's loop."


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_ahead_of_the_steps(training, persistent):
    batches = loader(num_workers=1, persistent_workers=persistent)
    for _ in range(2):
        training.epoch(batches)
    assert training.found() == [("DC401", HERE, 4, 1)]


def test_a_batch_sampler_around_it_changes_nothing(training):
    data = dataset()
    sampler = shares(data)
    batches = DataLoader(data, batch_sampler=BatchSampler(sampler, 8, drop_last=False))
    training.epoch(batches)
    training.epoch(batches)
    assert [code for code, *_ in training.found()] == ["DC401"]


def test_an_epoch_that_is_broken_off_is_compared_as_far_as_it_went(training):
    batches = loader()
    training.epoch(batches, most=2)
    training.epoch(batches, most=2)
    assert training.found() == [("DC401", HERE, 3, 1)]
    assert "the same first 16 indices" in training.findings[0].message


def test_a_long_epoch_is_judged_before_it_is_over(training):
    batches = loader(dataset(4096))
    training.epoch(batches)
    training.epoch(batches, most=1 + 1024 // 8)
    assert [finding.step for finding in training.findings] == [257]


def test_a_loader_that_is_made_anew_shares_out_the_same_dataset(training):
    data = dataset()
    for _ in range(2):
        training.epoch(loader(data))
    assert [code for code, *_ in training.found()] == ["DC401"]


def test_a_generator_that_is_seeded_alike_in_every_epoch_is_found(training):
    generator = torch.Generator()
    batches = DataLoader(dataset(), batch_size=8, shuffle=True, generator=generator)
    for _ in range(2):
        generator.manual_seed(0)
        training.epoch(batches)
    assert training.found() == [("DC401", HERE, 7, 1)]
    assert "generator.manual_seed(seed + epoch)" in training.findings[0].fix


class Keys(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, key):
        return torch.zeros(1)


class SortedBySize(Sampler[int]):
    def __iter__(self):
        return iter([5, 3, 1, 2, 4, 0, *range(6, 32)])

    def __len__(self):
        return 32


class NamedSamples(SortedBySize):
    shuffle = True

    def __iter__(self):
        return iter([f"sample {number}" for number in range(32)])  # type: ignore[misc]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(48, 1))


def told(data):
    batches = loader(data)
    for epoch in range(3):
        batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        yield batches


def told_the_same_again(data):
    batches = loader(data)
    for _ in range(3):
        batches.sampler.set_epoch(5)  # type: ignore[attr-defined]
        yield batches


def alike(batches):
    return lambda data: [batches(data)] * 3


@pytest.mark.parametrize(
    "epochs",
    [
        told,
        told_the_same_again,
        alike(lambda data: DataLoader(data, sampler=shares(data, shuffle=False))),
        alike(lambda data: DataLoader(data, batch_size=8)),
        alike(lambda data: DataLoader(data, batch_size=8, shuffle=True)),
        alike(lambda data: DataLoader(data, sampler=RandomSampler(data, replacement=True), batch_size=8)),
        alike(lambda data: DataLoader(data, sampler=WeightedRandomSampler([1.0] * 48, 48), batch_size=8)),
        alike(lambda data: DataLoader(Keys(), sampler=SortedBySize(), batch_size=8)),
        alike(lambda data: DataLoader(Keys(), sampler=NamedSamples(), batch_size=8)),
        alike(lambda data: DataLoader(Stream(), batch_size=8)),
        lambda data: [loader(data), loader(dataset())],
        lambda data: [loader(dataset(8)), loader(dataset(8))],
    ],
    ids=[
        "told",
        "repeated-on-purpose",
        "in-order",
        "sequential",
        "random",
        "replaced",
        "weighted",
        "sorted",
        "keys",
        "stream",
        "two-datasets",
        "tiny",
    ],
)
def test_what_looks_alike_is_silent(training, epochs):
    for batches in epochs(dataset()):
        training.epoch(batches)
    assert training.found() == []


def test_an_evaluation_and_a_look_at_the_first_batch_are_no_epochs(training):
    batches, evaluated = loader(), loader(dataset())
    next(iter(batches))
    training.step()
    training.epoch(batches)
    for _ in range(2):
        training.epoch(evaluated, steps=False)
        training.step()
    assert training.found() == []


def test_the_same_order_for_another_optimizer_is_meant(training):
    batches = loader()
    for _ in range(2):
        training.epoch(batches)
        training.optimizer = training.make_optimizer()
    assert training.found() == []


def test_two_loaders_in_step_over_one_dataset_are_no_two_epochs(training):
    data = dataset()
    training.epoch(zip(loader(data), loader(data), strict=True))
    assert training.found() == []


def test_a_loader_gives_what_it_gave_without_the_watch(tmp_path):
    def batches(watched, workers):
        torch.manual_seed(0)
        loader = DataLoader(dataset(), batch_size=5, shuffle=True, num_workers=workers)
        if not watched:
            return [batch.tolist() for epoch in range(2) for (batch,) in loader], torch.get_rng_state().tolist()
        with ddpcall.watch(on_finding="record", json=tmp_path / f"{workers}.json"):
            return [batch.tolist() for epoch in range(2) for (batch,) in loader], torch.get_rng_state().tolist()

    for workers in (0, 1):
        assert batches(True, workers) == batches(False, workers)


class Curriculum(Sampler):
    """Gives the first samples in an order of its own, more of them in each epoch, and is told the epoch."""

    def __init__(self, order, is_growing):
        self.order, self.is_growing, self.epoch = order, is_growing, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(self.order[: 16 * (self.epoch + 1)] if self.is_growing else self.order)


@pytest.mark.parametrize(
    ("order", "is_growing"), [([*range(47, -1, -1)], True), ([*range(0, 48, 2)], False)], ids=["grows", "ascends"]
)
def test_an_order_that_nobody_shuffled_is_silent(training, order, is_growing):
    sampler = Curriculum(order, is_growing)
    batches = DataLoader(dataset(), batch_size=8, sampler=sampler)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        training.epoch(batches)
    assert training.found() == []
