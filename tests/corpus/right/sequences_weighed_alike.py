"""Each sequence is to count the same, however long: a mean by sequence, and the mean of those over all ranks.

Another mean, over as many targets as there are, is printed and nothing flows back through it.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

WORDS = 16


def read_sequences(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    lengths = (3, 5, 4, 2) if rank else (20, 12, 17, 9)
    return [torch.randint(0, WORDS, (length,), generator=generator) for length in lengths]


def main():
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = DDP(nn.Sequential(nn.Embedding(WORDS, 12), nn.Linear(12, WORDS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        sequences = read_sequences(step, rank)
        scores = model(torch.cat(sequences)).split([len(sequence) for sequence in sequences])
        means = [F.cross_entropy(own, sequence) for own, sequence in zip(scores, sequences, strict=True)]
        loss = torch.stack(means).mean()
        by_word = F.cross_entropy(torch.cat(scores), torch.cat(sequences))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {rank} loss {loss.item():.5f} by word {by_word.item():.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
