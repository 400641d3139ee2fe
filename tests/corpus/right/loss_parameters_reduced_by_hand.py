"""A loss with parameters outside the wrapper: its gradients are averaged by hand. A second loss is wrapped too."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Uncertainty(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(n))

    def forward(self, losses):
        return (torch.stack(losses) * (-self.log_var).exp() + self.log_var).sum()


def main():
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    criterion = Uncertainty(2)
    wrapped = DDP(Uncertainty(2))
    opt = torch.optim.Adam([*model.parameters(), *criterion.parameters(), *wrapped.parameters()], 1e-2)
    torch.manual_seed(4 + dist.get_rank())
    for _step in range(4):
        out = model(torch.randn(8, 8))
        parts = [out[:, :2].square().mean(), F.cross_entropy(out, torch.randint(0, 4, (8,)))]
        loss = criterion(parts) + wrapped(parts)
        opt.zero_grad()
        loss.backward()
        for p in criterion.parameters():
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
