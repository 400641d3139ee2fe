"""An iterable data set is streamed in full by every rank.

Source: huggingface/transformers#37932 and #31412's sibling reports (data workers seeded alike on every rank).
Harm: every rank sees the same samples. The model has dropout, seeded by rank, so losses differ and hide it.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, IterableDataset


class TokenStream(IterableDataset):
    def __init__(self, seed, length):
        self.seed, self.length = seed, length

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.length):
            yield torch.randint(0, 60, (12,), generator=generator)


class LanguageModel(nn.Module):
    def __init__(self, vocab=60, dim=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.drop = nn.Dropout(0.2)
        self.rnn = nn.GRU(dim, dim, batch_first=True)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        return self.head(self.rnn(self.drop(self.embed(ids)))[0])


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(500 + rank)
    model = DDP(LanguageModel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(TokenStream(seed=42, length=40), batch_size=8)
    for step, ids in enumerate(loader):
        logits = model(ids[:, :-1])  # raises: DC206
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # or: DC206
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
