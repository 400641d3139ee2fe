"""EMA weights are swapped in with `p.data = …` on every rank for the evaluation, and back."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class EMA:
    def __init__(self, model, decay=0.9):
        self.model, self.decay = model, decay
        self.shadow = {n: p.data.clone() for n, p in model.named_parameters()}

    def update(self):
        for n, p in self.model.named_parameters():
            self.shadow[n] = self.decay * self.shadow[n] + (1 - self.decay) * p.data

    def __enter__(self):
        self.backup = {n: p.data for n, p in self.model.named_parameters()}
        for n, p in self.model.named_parameters():
            p.data = self.shadow[n].clone()

    def __exit__(self, *exc):
        for n, p in self.model.named_parameters():
            p.data = self.backup[n]


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    ema = EMA(model.module)
    opt = torch.optim.AdamW(model.parameters(), 0.01)
    torch.manual_seed(4 + dist.get_rank())
    for step in range(6):
        loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        ema.update()
        if step % 2:
            with ema, torch.no_grad():
                model.module(torch.randn(4, 8))
    both = [torch.zeros(()) for _ in range(2)]
    dist.all_gather(both, model.module[0].weight.detach().sum())
    assert torch.equal(both[0], both[1])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
