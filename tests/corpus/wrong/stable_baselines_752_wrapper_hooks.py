"""Activation logging hangs on the DDP object; the loop calls `policy.forward(obs)`.

Source: DLR-RM/stable-baselines3#752 (`.forward` called directly, hooks never run).
Harm: `DDP.forward` itself arms the reducer, so gradients are reduced; only the hooks on the wrapper are lost.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class ActorCriticPolicy(nn.Module):
    def __init__(self, obs=6, actions=3):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(obs, 32), nn.Tanh())
        self.action_net = nn.Linear(32, actions)
        self.value_net = nn.Linear(32, 1)

    def forward(self, obs):
        latent = self.features(obs)
        return self.action_net(latent), self.value_net(latent)


class ValueLogger:
    def __init__(self):
        self.values = []

    def __call__(self, module, inputs, output):
        self.values.append(output[1].detach().mean().item())


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    policy = DDP(ActorCriticPolicy())
    logger = ValueLogger()
    policy.register_forward_hook(logger)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step in range(4):
        obs, returns = torch.randn(32, 6), torch.randn(32, 1)
        logits, values = policy.forward(obs)  # raises: DC301
        logp = torch.distributions.Categorical(logits=logits).log_prob(torch.randint(0, 3, (32,)))
        advantage = (returns - values).detach()[:, 0]
        loss = -(logp * advantage).mean() + 0.5 * nn.functional.mse_loss(values, returns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f} logged {len(logger.values)}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
