"""FSDP2 called properly, its `generate` registered as a forward method.

Source: pytorch/pytorch#125394.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method


class LM(nn.Module):
    def __init__(self, vocab=24, dim=12):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x)

    @torch.no_grad()
    def generate(self, ids, length):
        for _ in range(length):
            x = self.embed(ids)
            for layer in self.layers:
                x = x + torch.relu(layer(x))
            ids = torch.cat([ids, self.head(x)[:, -1:].argmax(-1)], dim=1)
        return ids


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = LM()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        ids = torch.randint(0, 24, (4, 9))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)
    print(f"rank {rank} {model.generate(ids[:1, :2], length=3).tolist()}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
