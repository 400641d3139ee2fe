"""`generate` is a method, not forward: FSDP2 does not gather the parameters for it.

Source: pytorch/pytorch#109385, #123962; pytorch/pytorch#125394 added register_fsdp_forward_method for it.
Harm: crash, "got mixed torch.Tensor and DTensor". The message has other causes; here it is the bypass.
"""
# begins: 2
# exit: 1

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


class LM(nn.Module):
    def __init__(self, vocab=32, dim=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.mlp = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        return self.head(torch.relu(self.mlp(self.embed(ids))))

    def generate(self, ids, length):
        for _ in range(length):
            hidden = torch.relu(self.mlp(self.embed(ids)))  # or: DC306
            ids = torch.cat([ids, self.head(hidden)[:, -1:].argmax(-1)], dim=1)
        return ids


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = LM()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        ids = torch.randint(0, 32, (4, 9))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)
    model.eval()
    print(model.generate(ids[:1, :2], length=3), flush=True)  # raises: DC306


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
