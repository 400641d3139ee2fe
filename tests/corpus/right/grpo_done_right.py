"""GRPO as it should be: rollouts and reference through unwrapped models without gradients, the policy through
the wrapper.

Source: the mended form of jingyaogong/minimind#853.
"""

import copy
import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Policy(nn.Module):
    def __init__(self, vocab=24, dim=16):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, dim, batch_first=True)
        self.head = nn.Linear(dim, vocab)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])

    @torch.no_grad()
    def generate(self, ids, length):
        for _ in range(length):
            ids = torch.cat([ids, torch.multinomial(self(ids)[:, -1].softmax(-1), 1)], dim=1)
        return ids


def token_logp(model, ids):
    return -F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(Policy())
    reference = copy.deepcopy(model.module).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(4):
        ids = model.module.generate(torch.randint(0, 24, (8, 3)), length=5)
        rewards = (ids[:, 3:] < 12).float().mean(1)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        with torch.no_grad():
            reference_logp = token_logp(reference, ids)
        logp = token_logp(model, ids)
        ratio = reference_logp - logp
        kl = ratio.exp() - ratio - 1
        loss = -(logp * advantages[:, None] - 0.04 * kl)[:, 2:].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} reward {rewards.mean():.3f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
