"""Only the main rank evaluates; `eval_policy` switches to eval mode and nobody switches back.

Source: huggingface/lerobot#3668 ("a real DDP-correctness issue").
Harm: gradients are reduced and equal, but rank 0's come from a network without dropout. No collective sees it.
"""
# begins: 2

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class ACTPolicy(nn.Module):
    def __init__(self, obs=10, act=4):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU())
        self.action = nn.Linear(32, act)

    def forward(self, observation):
        return self.action(self.trunk(observation))


@torch.no_grad()
def eval_policy(policy, episodes=3):
    policy.eval()  # raises: DC204
    rewards = [-policy(torch.randn(5, 10)).abs().mean().item() for _ in range(episodes)]
    return sum(rewards) / episodes


def main():
    rank = int(os.environ["RANK"])
    is_main_process = rank == 0
    torch.manual_seed(rank)
    policy = DDP(ACTPolicy())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy.train()
    for step in range(6):
        observation, action = torch.randn(16, 10), torch.randn(16, 4)
        loss = nn.functional.l1_loss(policy(observation), action)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 and is_main_process:
            print(f"reward {eval_policy(policy.module):.4f}", flush=True)
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
