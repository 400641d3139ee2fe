"""A codebook with an optimizer of its own learns inside the wrapped forward; its gradient is averaged first."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Codebook(nn.Module):
    def __init__(self, size, dim):
        super().__init__()
        self.entries = nn.Parameter(torch.randn(size, dim))
        self.optimizer = torch.optim.SGD([self.entries], 0.5)

    def learn(self, codes):
        nearest = torch.cdist(codes, self.entries).argmin(1)
        self.optimizer.zero_grad(set_to_none=False)
        F.mse_loss(self.entries[nearest], codes).backward()
        dist.all_reduce(self.entries.grad)
        self.entries.grad /= dist.get_world_size()
        self.optimizer.step()

    def forward(self, codes):
        if self.training:
            self.learn(codes.detach())
        entries = self.entries.detach()
        nearest = entries[torch.cdist(codes, entries).argmin(1)]
        return codes + (nearest - codes).detach(), F.mse_loss(codes, nearest)


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4))
        self.codebook = Codebook(8, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x):
        quantized, commitment = self.codebook(self.encoder(x))
        return self.decoder(quantized), commitment


def main():
    torch.manual_seed(0)
    model = DDP(Autoencoder(), find_unused_parameters=True)
    trained = [p for name, p in model.named_parameters() if "codebook" not in name]
    optimizer = torch.optim.Adam(trained, 1e-3)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(5):
        x = torch.randn(32, 10)
        decoded, commitment = model(x)
        loss = F.mse_loss(decoded, x) + 0.25 * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
