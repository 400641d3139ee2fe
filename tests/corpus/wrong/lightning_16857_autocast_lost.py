"""Mixed precision by accelerate lives in the model's forward; a submodule called directly runs in full
precision.

Source: Lightning-AI/pytorch-lightning#16857 (a method called past the wrapper loses autocast), on accelerate.
Harm: the encoder computes and keeps activations in float32 although bf16 was asked for. One process: nothing to
reduce.
"""
# ranks: 1

import torch
from accelerate import Accelerator
from torch import nn


class Contrastive(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.projection = nn.Linear(dim, dim)

    def forward(self, x):
        return self.projection(self.encoder(x))


def main():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(4)
    model = Contrastive()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for step in range(4):
        x = torch.randn(16, 8)
        anchor = model(x)
        positive = model.encoder(x + 0.1 * torch.randn_like(x))  # raises: DC304
        logits = nn.functional.normalize(anchor, dim=1) @ nn.functional.normalize(positive, dim=1).T
        loss = nn.functional.cross_entropy(logits.float() / 0.1, torch.arange(16))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f} {anchor.dtype} {positive.dtype}", flush=True)


if __name__ == "__main__":
    main()
