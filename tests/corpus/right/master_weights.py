"""An optimizer steps float32 copies of a bfloat16 model's parameters, made by hand.

Source: the loops of apex and of Megatron, in a few lines.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class MasterWeights:
    """An optimizer of float32 copies, written back after each step; matrices are decayed, biases are not."""

    def __init__(self, parameters):
        self.copies = {p: p.detach().float().clone().requires_grad_() for p in parameters}
        decayed = [copy for p, copy in self.copies.items() if p.dim() > 1]
        others = [copy for p, copy in self.copies.items() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)

    @torch.no_grad()
    def step(self):
        for parameter, copy in self.copies.items():
            copy.grad = parameter.grad.float()
            parameter.grad = None
        self.optimizer.step()
        for parameter, copy in self.copies.items():
            parameter.copy_(copy)


def main():
    torch.manual_seed(0)
    model = DDP(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    )
    optimizer = MasterWeights(model.parameters())
    torch.manual_seed(1 + dist.get_rank())
    for _step in range(5):
        x = torch.randn(8, 8, dtype=torch.bfloat16)
        loss = F.cross_entropy(model(x).float(), torch.randint(0, 3, (8,)))
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
