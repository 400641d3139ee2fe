"""Legacy `weight_norm` recomputes the weight in a pre-hook; validation enters through `.forward` and never
runs it.

Source: pytorch/pytorch#47588.
Harm: each validation uses the weight of the last training forward, a step behind magnitude and direction.
(Training through `.forward` does not stay silent on torch 2.13: the second backward fails.) One process, no
wrapper.
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
        return self.out(torch.tanh(self.dilated(wave)))


@torch.no_grad()
def validate(model, wave):
    features = torch.tanh(model.dilated.forward(wave))  # raises: DC305
    return nn.functional.mse_loss(model.out(features), wave.roll(1, -1)).item()


def main():
    torch.manual_seed(0)
    model = WaveBlock()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-2)
    held_out = torch.randn(4, 1, 32)
    for step in range(5):
        wave = torch.randn(4, 1, 32)
        loss = nn.functional.mse_loss(model(wave), wave.roll(1, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stale = validate(model, held_out)
        with torch.no_grad():
            fresh = nn.functional.mse_loss(model(held_out), held_out.roll(1, -1)).item()
        print(f"step {step} loss {loss.item():.4f} validated {stale:.6f} really {fresh:.6f}", flush=True)


if __name__ == "__main__":
    main()
