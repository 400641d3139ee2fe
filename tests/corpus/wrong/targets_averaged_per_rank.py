"""Dialogues are sorted by length, so that one rank gets the answers of many tokens and the other the short ones.

Source: the class of vllm-project/speculators#942 and huggingface/transformers#34242.
Harm: the first step's gradient is 26 % off that of one process with all dialogues.
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

WORDS, NO_TARGET = 16, -1


class Answerer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.score = nn.Linear(12, WORDS)

    def forward(self, words):
        return self.score(torch.cumsum(self.embed(words), dim=1))


def read_dialogues(step, rank, part):
    generator = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    words = torch.randint(0, WORDS, (4, 20), generator=generator)
    targets = words.roll(-1, dims=1)
    targets[:, : 16 if rank else 5] = NO_TARGET  # the prompt
    return words, targets


def main():
    rank = dist.get_rank()
    torch.manual_seed(1)
    model = DDP(Answerer())
    criterion = nn.CrossEntropyLoss(ignore_index=NO_TARGET)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        for part in range(2):
            words, targets = read_dialogues(step, rank, part)
            scores = model(words)
            loss = criterion(scores.reshape(-1, WORDS), targets.reshape(-1)) / 2  # raises: DC110
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"rank {rank} loss {loss.item():.5f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
