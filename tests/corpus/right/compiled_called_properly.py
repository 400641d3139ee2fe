"""Compiled in both ways and always called: the module made by torch.compile, and a module compiled in place."""
# ranks: 1

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 18)
        self.fc2 = nn.Linear(18, 6)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def train(model, steps=4):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        x = torch.randn(16, 6)
        loss = nn.functional.mse_loss(model(x), x.flip(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f}", flush=True)


def main():
    torch.manual_seed(0)
    train(torch.compile(Net(), backend="eager"))
    in_place = Net()
    in_place.compile(backend="eager")
    train(in_place)


if __name__ == "__main__":
    main()
