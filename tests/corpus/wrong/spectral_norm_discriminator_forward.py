"""A discriminator with legacy `spectral_norm`, its layers chained by `.forward`.

Source: pytorch/pytorch#47588's sibling: the power iteration and the division live in a forward pre-hook.
Harm: the optimizer moves `weight_orig`, the layer goes on using the weight computed at the first call.
"""
# ranks: 1

import torch
from torch import nn
from torch.nn.utils import spectral_norm


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = spectral_norm(nn.Linear(8, 16))
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(nn.functional.leaky_relu(self.body.forward(x), 0.2))  # raises: DC305


def main():
    torch.manual_seed(1)
    discriminator = Discriminator()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=5e-3)
    for step in range(5):
        real, fake = torch.randn(16, 8) + 1, torch.randn(16, 8)
        loss = (1 - discriminator(real)).relu().mean() + (1 + discriminator(fake)).relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sigma = torch.linalg.matrix_norm(discriminator.body.weight, 2)
        print(f"step {step} hinge {loss.item():.4f} sigma {sigma:.4f}", flush=True)


if __name__ == "__main__":
    main()
