"""One forward, two backwards: the auxiliary loss goes back through the same graph after the reducer is done.

Source: pytorch/pytorch#59359 (DDP support for multiple backwards, never merged).
Harm: what the second backward adds is not reduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 18)
        self.policy = nn.Linear(18, 3)
        self.value = nn.Linear(18, 1)

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return self.policy(hidden), self.value(hidden)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(TwoHeads())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(16, 6)
        logits, values = model(x)
        loss = nn.functional.cross_entropy(logits, x[:, :3].argmax(1)) + values.pow(2).mean()
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        (-0.5 * entropy).backward()  # raises: DC101|DC104
        optimizer.step()  # or: DC101|DC104
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
