"""The loss is bound with functools.partial when the trainer is built; later code only sees a function.

Source: OpenTSLM/OpenTSLM#49's mechanism, behind functools.
Harm: every rank trains a model of its own.
"""

import functools
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 12, batch_first=True)
        self.out = nn.Linear(12, 6)

    def forward(self, x):
        return self.out(self.rnn(x)[0])

    def nll(self, x, y, reduction):
        return F.mse_loss(self(x), y, reduction=reduction)  # or: DC101


def timed(fn):
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        return fn(*args, **kwargs)  # or: DC101

    return wrapper


def fit(loss_fn, opt, batches):
    for x, y in batches:
        opt.zero_grad()
        sum(loss_fn(a, b) for a, b in zip(x.chunk(2), y.chunk(2), strict=False)).backward()  # raises: DC101
        opt.step()


def main():
    torch.manual_seed(0)
    ddp = DDP(Seq2Seq())
    loss_fn = timed(functools.partial(ddp.module.nll, reduction="mean"))
    torch.manual_seed(4 + dist.get_rank())
    fit(
        loss_fn,
        torch.optim.Adam(ddp.parameters(), 1e-2),
        [(torch.randn(4, 5, 6), torch.randn(4, 5, 6)) for _ in range(4)],
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
