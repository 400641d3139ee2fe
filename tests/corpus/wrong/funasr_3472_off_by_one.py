"""Accumulation window off by one: the micro-batch that is stepped on runs under `no_sync()`.

Source: modelscope/FunASR#3472 (a reviewer's two-rank gloo run: 4.0 against 7.0, 5.5 and 5.5 when mended).
Harm: the first micro-batch is reduced, the last one is not, and the optimizer steps on the sum.
"""

import contextlib
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Paraformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.GRU(10, 16, batch_first=True)
        self.decoder = nn.Linear(16, 7)

    def forward(self, speech):
        return self.decoder(self.encoder(speech)[0])


class Trainer:
    def __init__(self, model, accum_grad):
        self.model = model
        self.accum_grad = accum_grad
        self.optim = torch.optim.Adam(model.parameters(), lr=2e-3)

    def train_epoch(self, loader, rank):
        for batch_idx, (speech, text) in enumerate(loader):
            context = self.model.no_sync if batch_idx % self.accum_grad != 0 else contextlib.nullcontext
            with context():  # raises: DC104
                logits = self.model(speech)  # or: DC104
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), text.flatten()) / self.accum_grad
                loss.backward()  # or: DC104
            if (batch_idx + 1) % self.accum_grad == 0:
                self.optim.step()  # or: DC104
                self.optim.zero_grad()
                print(f"rank {rank} batch {batch_idx} loss {loss.item():.4f}", flush=True)


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(40 + rank)
    loader = [(torch.randn(3, 6, 10), torch.randint(0, 7, (3, 6))) for _ in range(8)]
    Trainer(DDP(Paraformer()), accum_grad=2).train_epoch(loader, rank)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
