"""The compiled object is made and kept aside; the training function still holds the module it was made from.

Source: pytorch/pytorch#141473 (two ways to compile a model, and calls that meet neither).
Harm: nothing ever runs compiled.
"""
# ranks: 1

import torch
from torch import nn


class Trainer:
    def __init__(self, model):
        self.model = model
        self.compiled = torch.compile(model, backend="eager")
        self.optimizer = torch.optim.SGD(self.compiled.parameters(), lr=0.05)

    def training_step(self, x, y):
        prediction = self.compiled._orig_mod(x)  # raises: DC302
        loss = nn.functional.smooth_l1_loss(prediction, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main():
    torch.manual_seed(2)
    trainer = Trainer(nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 5)))
    for step in range(4):
        x = torch.randn(8, 5)
        print(f"step {step} loss {trainer.training_step(x, x.flip(1)):.4f}", flush=True)


if __name__ == "__main__":
    main()
