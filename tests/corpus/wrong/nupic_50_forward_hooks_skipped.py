"""Duty cycles are gathered in forward hooks, which a direct `.forward()` does not run.

Source: numenta/nupic.torch#50 ("Forward hooks are ignored when calling the forward method").
Harm: the statistics the boosting depends on stay at zero. One process, no wrapper.
"""
# ranks: 1

import torch
from torch import nn


class KWinners(nn.Module):
    def __init__(self, units, k):
        super().__init__()
        self.k = k
        self.register_buffer("duty_cycle", torch.zeros(units))

    def forward(self, x):
        boosted = x + (1.0 - self.duty_cycle)
        threshold = boosted.topk(self.k, dim=1).values[:, -1:]
        return x * (boosted >= threshold)


class SparseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(12, 24)
        self.kwinners = KWinners(24, k=6)
        self.linear2 = nn.Linear(24, 3)

    def forward(self, x):
        x = self.linear1(x)
        x = self.kwinners.forward(x)  # raises: DC301
        return self.linear2(x)


def update_duty_cycle(module, inputs, output):
    active = (output.detach() != 0).float().mean(0)
    module.duty_cycle.mul_(0.9).add_(active, alpha=0.1)


def main():
    torch.manual_seed(0)
    model = SparseNet()
    model.kwinners.register_forward_hook(update_duty_cycle)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        x = torch.randn(16, 12)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f} duty {model.kwinners.duty_cycle.sum():.3f}", flush=True)


if __name__ == "__main__":
    main()
