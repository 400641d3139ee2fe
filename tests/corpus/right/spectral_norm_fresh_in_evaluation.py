"""A critic with legacy `spectral_norm`: `.forward` under no_grad, where the hook has just made the weight.

Right because no step lies between the call and `.forward`: the hook would make the same weight again.
"""
# ranks: 1

import torch
from torch import nn
from torch.nn.utils import spectral_norm


@torch.no_grad()
def margins(critic, batches):
    critic.eval()
    first = critic(batches[0])
    others = [critic.forward(batch) for batch in batches[1:]]
    critic.train()
    return torch.cat([first, *others]).mean().item()


def main():
    torch.manual_seed(1)
    critic = spectral_norm(nn.Linear(8, 1))
    optimizer = torch.optim.Adam(critic.parameters(), lr=5e-3)
    for step in range(4):
        real = torch.randn(16, 8) + 1
        scores = critic(real)
        with torch.no_grad():
            assert torch.equal(critic.forward(real), scores)
        loss = (1 - scores).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(
            f"step {step} loss {loss.item():.4f} margin {margins(critic, torch.randn(3, 16, 8)):.4f}", flush=True
        )


if __name__ == "__main__":
    main()
