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
    """Average with the rank before and the rank after, on a ring."""
    rank, num_ranks, own = dist.get_rank(), dist.get_world_size(), bucket.buffer()
    neighbors = [(rank - 1) % num_ranks, (rank + 1) % num_ranks] if num_ranks > 1 else []
    received = [torch.empty_like(own) for _ in neighbors]
    # In opposite order: with two ranks both neighbors are the same one, and the n-th send meets the n-th receive.
    sends = [dist.P2POp(dist.isend, own, peer) for peer in reversed(neighbors)]
    receives = [dist.P2POp(dist.irecv, part, peer) for part, peer in zip(received, neighbors, strict=True)]
    for request in dist.batch_isend_irecv(sends + receives) if neighbors else ():
        request.wait()
    reduced: Reduced = torch.futures.Future()
    reduced.set_result(torch.stack([own, *received]).mean(dim=0))
    return reduced


def _all_reduce(buffer: Tensor) -> Reduced:
    work: Any = dist.all_reduce(buffer, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def average_parameters_periodically(optimizer: Optimizer) -> Any:
    """Return an optimizer that steps locally and averages the parameters over the ranks every few steps."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    return PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(AVERAGING_PERIOD))
