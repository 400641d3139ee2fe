"""accelerate with bf16 on two ranks; evaluation runs the unwrapped model, whose own forward keeps autocast."""

import torch
from accelerate import Accelerator
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(8, 16)
        self.dec = nn.Linear(16, 8)

    def forward(self, x):
        return self.dec(torch.relu(self.enc(x)))


def main():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    rank = accelerator.process_index
    torch.manual_seed(rank)
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05))
    for step in range(4):
        x = torch.randn(8, 8)
        loss = nn.functional.mse_loss(model(x), x)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        print(f"rank {rank} {accelerator.unwrap_model(model)(x).dtype}", flush=True)


if __name__ == "__main__":
    main()
