"""Reductions other than the mean over all ranks: communication hooks for DDP, and averaged parameters.

The hooks take DDP's bucket on every rank and return a future of what its optimizer will use. DDP reads their
annotations, which therefore must not be strings.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

AVERAGING_PERIOD = 4

Reduced = torch.futures.Future[Tensor]


def sum_gradients(_: object, bucket: dist.GradBucket) -> Reduced:
    """Sum over the ranks, without a division."""
    return _all_reduce(bucket.buffer())


def drop_last_rank(_: object, bucket: dist.GradBucket) -> Reduced:
    """Average over the ranks, the last of which contributes zeros."""
    num_ranks = dist.get_world_size()
    return _all_reduce(bucket.buffer().mul_(float(dist.get_rank() < num_ranks - 1) / num_ranks))


def average_with_neighbors(_: object, bucket: dist.GradBucket) -> Reduced:
    """Average with the rank before and the rank after, on a ring.

    Every rank's gradients go to all of them, since gloo sends no CUDA tensors from one rank to another.
    """
    rank, num_ranks, own = dist.get_rank(), dist.get_world_size(), bucket.buffer()
    neighbors = [(rank + step) % num_ranks for step in (-1, 0, 1)]
    rows = own.new_zeros(num_ranks, own.numel())
    rows[rank] = own
    return _all_reduce(rows).then(lambda future: future.value()[neighbors].mean(dim=0))


def _all_reduce(buffer: Tensor) -> Reduced:
    work: Any = dist.all_reduce(buffer, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def average_parameters_periodically(optimizer: Optimizer) -> Any:
    """Return an optimizer that steps locally and averages the parameters over the ranks every few steps."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    return PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(AVERAGING_PERIOD))
