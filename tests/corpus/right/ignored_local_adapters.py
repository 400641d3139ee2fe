"""Each rank trains an adapter of its own, excluded from DDP by name; it differs between ranks by design."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 12)
        self.adapter = nn.Linear(12, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        hidden = torch.relu(self.shared(x))
        return self.head(hidden + self.adapter(hidden))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    net = Adapted()
    local = [f"adapter.{name}" for name, _ in net.adapter.named_parameters()]
    DDP._set_params_and_buffers_to_ignore_for_model(net, local)
    model = DDP(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(4):
        x = torch.randn(8, 6) + rank
        loss = nn.functional.mse_loss(model(x), x[:, :2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
