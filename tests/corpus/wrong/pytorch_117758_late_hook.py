"""A hook is put on a layer after the first compiled call.

Source: pytorch/pytorch#117758 ("at least there should be a warning when attempting to register a hook").
Harm: the hook never fires; the activations it should collect stay empty. (On torch 2.13 this holds for a child
of a custom module; a root hook there does fire.)
"""
# begins: 2
# ranks: 1

import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 18)
        self.act = nn.GELU()
        self.out = nn.Linear(18, 6)

    def forward(self, x):
        return self.out(self.act(self.proj(x)))


def main():
    torch.manual_seed(3)
    model = Encoder()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    activations = []

    def collect(module, inputs, output):
        activations.append(output.detach())

    for step in range(5):
        if step == 2:
            model.act.register_forward_hook(collect)  # raises: DC303
        x = torch.randn(16, 6)
        loss = nn.functional.mse_loss(compiled(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f} collected {len(activations)}", flush=True)


if __name__ == "__main__":
    main()
