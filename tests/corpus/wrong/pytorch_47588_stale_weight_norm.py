"""Legacy `weight_norm` recomputes the weight in a pre-hook; `.forward` never runs it.

Source: pytorch/pytorch#47588.
Harm: the layer keeps its first weight; magnitude and direction are never trained. One process, no wrapper.
"""
# ranks: 1

import warnings

import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.nn.utils import weight_norm


class WaveBlock(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.dilated = weight_norm(nn.Conv1d(1, 8, 3, padding=1))
        self.out = nn.Conv1d(8, 1, 1)

    def forward(self, wave):
        return self.out(torch.tanh(self.dilated.forward(wave)))  # raises: DC305


def main():
    torch.manual_seed(0)
    model = WaveBlock()
    with torch.no_grad():
        model(torch.zeros(1, 1, 8))  # or: DC305
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(5):
        wave = torch.randn(4, 1, 32)
        loss = nn.functional.mse_loss(model(wave), wave.roll(1, -1))
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f} weight {model.dilated.weight.norm():.4f}", flush=True)


if __name__ == "__main__":
    main()
