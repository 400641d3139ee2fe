"""The data of the lab: real digits that ship with scikit-learn, and a synthetic regression. No download."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, TensorDataset, default_collate
from torch.utils.data.distributed import DistributedSampler

from ddpcall.lab.errors import WrongUse
from ddpcall.lab.schema import DataConfig
from ddpcall.lab.user_code import load_target, own_arguments
from ddpcall.paths import Batch


@dataclass(frozen=True)
class Split:
    """Training and test data, the same on every rank.

    Attributes:
        train: Inputs (samples, *features) and targets.
        test: Inputs and targets that no rank trains on.
        in_features: Number of features of a sample, flattened.
        out_features: Classes, or regression targets.
    """

    train: TensorDataset
    test: Batch
    in_features: int
    out_features: int


def load_split(config: DataConfig, seed: int) -> Split:
    """Load the data and split it, by the seed alone.

    Raises:
        WrongUse: Unknown name, or a test fraction that leaves nothing on one side.
    """
    load = _load_user_data if config._target_ else DATA.get(config.name)  # pyright: ignore[reportPrivateUsage]
    if load is None:
        raise WrongUse(f"data.name={config.name} is unknown; write {', '.join(DATA)} or data._target_=")
    inputs, targets, out_features = load(config, seed)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    num_test = round(len(inputs) * config.test_fraction)
    if not 0 < num_test < len(inputs):
        raise WrongUse(f"data.test_fraction={config.test_fraction} leaves no sample to train on, or none to test")
    test, train = order[:num_test], order[num_test:]
    return Split(
        train=TensorDataset(inputs[train], targets[train]),
        test=Batch(inputs[test], targets[test]),
        in_features=inputs[0].numel(),
        out_features=out_features,
    )


def _load_digits(config: DataConfig, seed: int) -> tuple[Tensor, Tensor, int]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    return images, torch.tensor(digits.target, dtype=torch.int64), 10


def _make_regression(config: DataConfig, seed: int) -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(config.num_samples, 16, generator=generator)
    teacher = torch.randn(16, 1, generator=generator)
    noise = torch.randn(config.num_samples, 1, generator=generator) * config.noise
    return inputs, torch.tanh(inputs @ teacher) + noise, 1


def _load_user_data(config: DataConfig, seed: int) -> tuple[Tensor, Tensor, int]:
    """Call the user's function; it takes any of num_samples, noise and seed."""
    load = load_target("data", own_arguments(config), ("num_samples", "noise", "seed"))
    found = load(num_samples=config.num_samples, noise=config.noise, seed=seed)
    try:
        if not isinstance(found, tuple):
            found = default_collate([found[index] for index in range(len(found))])
        inputs, targets = map(torch.as_tensor, found)
        if not 0 < len(inputs) == len(targets):
            raise ValueError(f"{len(inputs)} inputs and {len(targets)} targets")
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise WrongUse(
            f"data._target_={config._target_} returned neither a pair of tensors, inputs and targets, nor a "  # pyright: ignore[reportPrivateUsage]
            f"dataset of such pairs: {error}"
        ) from error
    return inputs, targets, targets[0].numel() if targets.is_floating_point() else int(targets.max()) + 1


DATA = {"digits": _load_digits, "regression": _make_regression}


def check_batch_size(split: Split, batch_size: int, world_size: int) -> None:
    """Refuse batches that the data cannot fill.

    Raises:
        WrongUse: Fewer training samples than one batch for every rank, or a batch size below 1.
    """
    if batch_size < 1 or batch_size * world_size > len(split.train):
        raise WrongUse(
            f"data.batch_size={batch_size} on {world_size} ranks does not fit the {len(split.train)} training "
            f"samples. Write data.batch_size with a value from 1 to {len(split.train) // world_size}"
        )


def iterate_batches(
    split: Split,
    *,
    batch_size: int,
    steps: int,
    rank: int,
    world_size: int,
    seed: int,
    device: torch.device,
    first_step: int = 0,
) -> Iterator[Batch]:
    """Yield this rank's batches from `first_step` to `steps`, over as many epochs as that takes.

    The sampler gives each rank its own share and is told of every epoch (`set_epoch`), so the number of the step
    says which batch it is. No random number of the model's is drawn: the loader has a generator of its own.
    """
    sampler = DistributedSampler(
        split.train, num_replicas=world_size, rank=rank, shuffle=True, seed=seed, drop_last=True
    )
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    step = first_step
    while step < steps:
        epoch, skipped = divmod(step, len(batches))
        sampler.set_epoch(epoch)
        left = list(batches)[skipped : skipped + steps - step]
        for inputs, targets in DataLoader(split.train, batch_sampler=left, generator=torch.Generator()):
            yield Batch(inputs.to(device), targets.to(device))
            step += 1
