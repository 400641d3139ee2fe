"""Numbers of targets differ, and each mean is multiplied by its share of all targets."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

WORDS, NO_TARGET = 16, -1


def read_dialogues(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    words = torch.randint(0, WORDS, (4, 20), generator=generator)
    targets = words.roll(-1, dims=1)
    targets[:, : 16 if rank else 5] = NO_TARGET  # the prompt
    return words, targets


def main():
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = DDP(nn.Sequential(nn.Embedding(WORDS, 12), nn.Linear(12, WORDS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        words, targets = read_dialogues(step, rank)
        own = (targets != NO_TARGET).sum().float()
        in_all = own.clone()
        dist.all_reduce(in_all)
        loss = F.cross_entropy(model(words).flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)
        (loss * own / in_all * dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"rank {rank} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
