"""The wrapper is called and arms the reducer; an auxiliary method of the inner module joins the same backward.

Source: k2-fsa/icefall#226, the case in which it is synchronised.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Recogniser(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(10, 16)
        self.decoder = nn.Linear(16, 5)
        self.ctc = nn.Linear(16, 5)

    def forward(self, x):
        hidden = torch.relu(self.encoder(x))
        return self.decoder(hidden), self.ctc(hidden)

    def auxiliary(self, x):
        return self.ctc(torch.relu(self.encoder(x)))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(Recogniser())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        x = torch.randn(8, 10)
        y = x[:, :5].argmax(1)
        attention, ctc = model(x)
        noisy = model.module.auxiliary(x + 0.1 * torch.randn_like(x))
        loss = sum(nn.functional.cross_entropy(logits, y) for logits in (attention, ctc, noisy))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
