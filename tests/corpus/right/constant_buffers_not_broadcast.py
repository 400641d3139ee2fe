"""`broadcast_buffers=False` with constant rotary tables, and the inner model evaluated for samples.

Source: jingyaogong/minimind#855.
"""

import gc
import os
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class RotaryLM(nn.Module):
    def __init__(self, vocab=20, dim=8, length=10):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.head = nn.Linear(dim, vocab)
        angles = torch.outer(torch.arange(length), 1.0 / 100 ** (torch.arange(0, dim, 2) / dim))
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        rotated = torch.cat([-x[..., 4:], x[..., :4]], dim=-1)
        return self.head(x * self.cos[: ids.shape[1]] + rotated * self.sin[: ids.shape[1]])


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = DDP(RotaryLM(), broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        ids = torch.randint(0, 20, (8, 9))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            sample = model.module(ids[:1, :4])[0, -1].argmax().item()
        print(f"rank {rank} step {step} loss {loss.item():.4f} sample {sample}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
