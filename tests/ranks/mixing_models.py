"""What the tests of the mixing matrix share: a model, batches, a hand-written reduction and the check."""

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import ddpcall


def make_model(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def make_batch(seed):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


def compute_loss(model, batch):
    return model(batch).square().sum()


def reduce_by_hand(model, group=None, divide=True):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=group)
        if divide:
            parameter.grad /= dist.get_world_size(group)


def measure(model, optimizer, step, num_steps=1):
    """Measure the last of several steps; each is `step(index)`."""
    with ddpcall.measure_mixing(model, optimizer) as mixing:
        for index in range(num_steps):
            step(index)
    return mixing.result


def expect(mixing, shape, entries=None, columns=None, residual=1e-6, atol=2e-5):
    """Check a measurement; entries: a number for all, a row, or the matrix."""
    assert mixing.shape == shape, f"{mixing} {mixing.by_parameter}"
    assert mixing.matrix.dtype == np.float64
    if columns is not None:
        assert mixing.columns == columns
    if entries is not None:
        expected = np.asarray(entries, float)
        rows = (
            expected
            if expected.ndim == 2
            else np.broadcast_to(expected, (mixing.num_ranks, mixing.matrix.shape[1]))
        )
        np.testing.assert_allclose(mixing.matrix, rows, atol=atol, err_msg=str(mixing))
        assert max(mixing.residual) < residual


def columns(num_ranks, *backwards):
    """Return the columns of some backwards of all ranks."""
    return tuple((rank, backward) for backward in backwards for rank in range(num_ranks))


BLOCKS = np.kron(np.eye(2), np.full((2, 2), 0.5))
