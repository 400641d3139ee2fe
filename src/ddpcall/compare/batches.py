"""A global batch: its samples, the share of a rank, another order, and a copy that rounding could have made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from ddpcall.replicas import digest_tensor
from ddpcall.taps import find_tensors

Split = Callable[[Any, int, int], Any]
"""Called with the batch, a rank and the number of ranks; returns the rank's share."""


def count_samples(batch: Any) -> int:
    """Return the size of dim 0 of the first tensor that has one.

    Raises:
        ValueError: there is no such tensor.
    """
    sizes = [tensor.size(0) for tensor in find_tensors(batch) if tensor.dim()]
    if not sizes:
        raise ValueError(
            "the batch holds no tensor with a dim 0, so it cannot be split between the ranks. Give a tensor, or a "
            "tuple, list or dict of tensors, whose dim 0 is the sample"
        )
    return sizes[0]


def split_evenly(batch: Any, rank: int, num_ranks: int) -> Any:
    """Return a rank's share of the samples; shares differ by one sample at most.

    Raises:
        ValueError: there are fewer samples than ranks.
    """
    num_samples = count_samples(batch)
    if num_samples < num_ranks:
        raise ValueError(f"{num_samples} samples cannot be split between {num_ranks} ranks: give a larger batch")
    places = torch.arange(num_samples).tensor_split(num_ranks)[rank]
    first, last = int(places[0]), int(places[-1]) + 1
    return map_samples(batch, lambda tensor: tensor[first:last])


def permute_samples(batch: Any, order: Tensor) -> Any:
    """Return the batch with its samples in another order."""
    return map_samples(batch, lambda tensor: tensor[order.to(tensor.device)])


def map_samples(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the tensors whose dim 0 is the sample; everything else stays what it is."""
    num_samples = count_samples(batch)
    return map_tensors(batch, lambda t: change(t) if t.dim() and t.size(0) == num_samples else t)


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor in nested tuples, lists and mappings."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        changed = {name: map_tensors(value, change) for name, value in batch.items()}
        return changed if type(batch) is dict else type(batch)(changed)  # pyright: ignore[reportCallIssue]
    if isinstance(batch, tuple | list):
        items = [map_tensors(value, change) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def copy_batch(batch: Any) -> Any:
    """Return a copy that a step may write to."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


def digest_batch(batch: Any) -> str:
    """Return a digest of the batch's tensors, with their shapes and dtypes."""
    stream = xxhash.xxh3_64()
    for tensor in find_tensors(batch):
        stream.update(f"{tuple(tensor.shape)} {tensor.dtype} {digest_tensor(tensor)}".encode())
    return stream.hexdigest()


def perturb(tensor: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Move every number by one unit in the last place, up or down at random; zeros and integers stay.

    Args:
        tensor: On any device.
        eps: Distance from 1 to the next number of the type whose unit is meant.
        generator: On the CPU.
    """
    if not tensor.is_floating_point():
        return tensor
    values = tensor.detach().to(torch.float64)
    _, exponents = torch.frexp(values)
    units = torch.ldexp(torch.full_like(values, eps), exponents - 1)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).to(values.device) * 2 - 1
    return torch.where(values == 0, values, values + signs * units).to(tensor.dtype)
