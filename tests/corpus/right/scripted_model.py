"""A scripted model under DDP, and a trace of a copy for deployment."""

import copy
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        if x.sum() > 0:
            x = x * 0.5
        return self.b(torch.relu(self.a(x)))


def main():
    torch.manual_seed(0)
    model = DDP(torch.jit.script(Gate()))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        opt.zero_grad()
        loss.backward()
        opt.step()
    eager = DDP(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
    eager(torch.randn(2, 8)).sum().backward()
    traced = torch.jit.trace(copy.deepcopy(eager.module).eval(), torch.randn(1, 8))
    scripted = torch.jit.script(eager.module)
    x = torch.randn(3, 8)
    assert torch.equal(traced(x), scripted(x))
    assert torch.equal(scripted(x), eager.module(x))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
