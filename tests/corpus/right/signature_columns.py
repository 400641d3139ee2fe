"""The trainer drops columns that forward does not take, by inspect.signature, also after wrapping."""

import gc
import inspect

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, features, labels=None, *, smoothing: float = 0.1):
        """Returns logits, or the loss."""
        logits = self.fc(features)
        return logits if labels is None else F.cross_entropy(logits, labels, label_smoothing=smoothing)


def columns(model):
    return set(inspect.signature(model.forward).parameters)


def main():
    torch.manual_seed(0)
    net = Net()
    before = inspect.signature(net.forward), net.forward.__doc__, net.forward.__name__, net.forward.__func__
    ddp = DDP(net)
    opt = torch.optim.SGD(ddp.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(3):
        batch = {"features": torch.randn(8, 6), "labels": torch.randint(0, 3, (8,)), "index": torch.arange(8)}
        batch = {k: v for k, v in batch.items() if k in columns(ddp.module)}
        assert set(batch) == {"features", "labels"}
        loss = ddp(**batch)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert inspect.signature(net.forward) == before[0]
    assert net.forward.__doc__ == before[1]
    assert net.forward.__name__ == before[2]
    assert inspect.getsource(type(net).forward)
    assert "Returns logits" in inspect.getsource(net.forward)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
