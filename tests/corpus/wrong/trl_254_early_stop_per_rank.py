"""PPO: each rank leaves out the steps for which its own KL is too large, though the gradient is that of all ranks.

Source: huggingface/trl#254, hill-a/stable-baselines#52 (early stopping by a rank's own KL).
Harm: gradients are reduced, the replicas differ.
"""
# raises: DC201|DC502
# begins: 5

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def agreed(kl):
    return kl


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    policy = DDP(nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 3)))
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-2)
    for update in range(3):
        observations = torch.randn(48, 5) * (1 + rank)
        with torch.no_grad():
            old = policy(observations).log_softmax(1)
        advantages = torch.randn(48, 3)
        for rows in torch.arange(48).chunk(4):
            new = policy(observations[rows]).log_softmax(1)
            kl = (old[rows].exp() * (old[rows] - new)).sum(1).mean().detach()
            optimizer.zero_grad()
            (-(new - old[rows]).exp() * advantages[rows]).mean().backward()
            if agreed(kl) < 0.01:
                optimizer.step()  # raises: DC502
        print(f"rank {rank} update {update} kl {kl.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
