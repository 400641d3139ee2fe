"""GRPO policy update through `model.module`: every rank trains a model of its own.

Source: jingyaogong/minimind#853, fixed by #854 ("with no error or warning").
Harm: the reducer is never armed, so gradients stay local and the parameters differ from the first step on.
"""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

VOCAB = 32


class TinyLM(nn.Module):
    def __init__(self, dim: int = 16):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.block = nn.GRU(dim, dim, batch_first=True)
        self.lm_head = nn.Linear(dim, VOCAB)

    def forward(self, ids):
        hidden, _ = self.block(self.embed(ids))
        return self.lm_head(hidden)


@torch.no_grad()
def rollout(model, prompts, length=6):
    ids = prompts
    for _ in range(length):
        probs = model(ids)[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], dim=1)
    return ids


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(42 + rank)
    model = DistributedDataParallel(TinyLM())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        prompts = torch.randint(0, VOCAB, (8, 4))
        outputs = rollout(model.module, prompts)
        rewards = (outputs[:, 4:] % 2 == 0).float().mean(dim=1)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)

        model_unwrapped = model.module if isinstance(model, DistributedDataParallel) else model
        logits = model_unwrapped(outputs[:, :-1])  # raises: DC101
        logp = -F.cross_entropy(logits.transpose(1, 2), outputs[:, 1:], reduction="none")
        loss = -(logp[:, 3:] * advantages[:, None]).mean()

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(f"rank {rank} step {step} reward {rewards.mean():.3f} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
