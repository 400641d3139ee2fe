"""Digests of tensors, and the comparison of replicas across ranks in its explicit, collective form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from ddpcall.taps import is_lazy


def digest_tensor(tensor: Tensor) -> int:
    """Return the xxh3_64 digest of a tensor's values, in order; an int in [-2**63, 2**63).

    Args:
        tensor: Any dtype, shape and device; strided. Read in place when contiguous on the CPU.

    Blind to: shape and dtype (same bytes, same digest); uninitialized lazy parameters digest to 0.
    """
    if is_lazy(tensor):
        return 0
    # As bytes: numpy knows neither bfloat16 nor the 8-bit floats.
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _signed(xxhash.xxh3_64_intdigest(values))


def digest_tensors(tensors: Iterable[Tensor]) -> Tensor:
    """Return the digests of several tensors: shape (number of tensors,), int64, on the CPU."""
    return torch.tensor([digest_tensor(tensor) for tensor in tensors], dtype=torch.int64)


def digest_state(state: Mapping[str, Tensor]) -> str:
    """Return one digest over named tensors, names included, as 16 hex digits."""
    stream = xxhash.xxh3_64()
    for name, tensor in state.items():
        stream.update(name.encode())
        stream.update(digest_tensor(tensor).to_bytes(8, "little", signed=True))
    return stream.hexdigest()


def _signed(digest: int) -> int:
    return digest - 2**64 if digest >= 2**63 else digest


def gather_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Stack the same tensor from every rank: shape (ranks, *tensor.shape). Every rank must call it.

    Args:
        tensor: Same shape and dtype on every rank; on the CPU for a gloo group.
        group: The process group, or None for a world of one rank.
    """
    if group is None:
        return tensor.unsqueeze(0)
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor.contiguous(), group=group)
    return torch.stack(gathered)


def differs_between_ranks(gathered: Tensor) -> Tensor:
    """Say where any rank's value differs from rank 0's.

    Args:
        gathered: Shape (ranks, *shape), as from `gather_over_ranks`.

    Returns:
        Shape (*shape), bool.
    """
    return (gathered != gathered[0]).any(dim=0)
