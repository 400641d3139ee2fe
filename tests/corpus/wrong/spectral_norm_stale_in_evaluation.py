"""A critic with legacy `spectral_norm` is scored after its step by `.forward`, under no_grad.

Source: the class of pytorch/pytorch#47588: the weight is recomputed in a forward pre-hook alone.
Harm: the score is that of the weight before the last optimizer step.
"""
# ranks: 1

import torch
from torch import nn
from torch.nn.utils import spectral_norm


@torch.no_grad()
def score(critic, x):
    critic.eval()
    stale = critic.forward(x).mean()  # raises: DC305
    fresh = critic(x).mean()
    critic.train()
    return stale.item(), fresh.item()


def main():
    torch.manual_seed(1)
    critic = spectral_norm(nn.Linear(8, 1))
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    for step in range(4):
        loss = (1 - critic(torch.randn(16, 8) + 1)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stale, fresh = score(critic, torch.randn(16, 8))
        print(f"step {step} loss {loss.item():.4f} score {stale:.6f} {fresh:.6f}", flush=True)


if __name__ == "__main__":
    main()
