"""Overlapped by hand: a post-accumulate hook starts each all_reduce, the step waits for all."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Overlap:
    def __init__(self, module):
        self.works = []
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(self.start)

    def start(self, p):
        p.grad /= dist.get_world_size()
        self.works.append(dist.all_reduce(p.grad, async_op=True))

    def finish(self):
        while self.works:
            self.works.pop().wait()


def main():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    ddp = DDP(net)
    overlap = Overlap(net)
    opt = torch.optim.SGD(ddp.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        loss = F.cross_entropy(net(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        opt.zero_grad()
        loss.backward()
        overlap.finish()
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
