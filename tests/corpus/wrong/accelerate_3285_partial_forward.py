"""Part of a prepared model is run on its own, on two ranks: neither precision nor synchronisation is left.

Source: huggingface/accelerate#3285 (partial forward of a prepared model; the reducer needs arming by hand).
Harm: float32 instead of bf16, and local gradients.
"""

import torch
from accelerate import Accelerator
from torch import nn


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(10, 20), nn.SiLU())
        self.dec = nn.Linear(20, 10)

    def forward(self, x):
        return self.dec(self.enc(x))


def main():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    rank = accelerator.process_index
    torch.manual_seed(200 + rank)
    model = Diffusion()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for step in range(4):
        x = torch.randn(8, 10)
        features = model.module.enc(x)  # raises: DC101, DC304
        prediction = model.module.dec(features)  # or: DC101, DC304
        loss = nn.functional.mse_loss(prediction, x)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f} {prediction.dtype}", flush=True)


if __name__ == "__main__":
    main()
