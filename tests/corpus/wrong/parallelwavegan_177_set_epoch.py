"""Nobody tells the sampler the epoch: each epoch has the same batches in the same order, on the same rank.

Source: kan-bayashi/ParallelWaveGAN#177, lucidrains/DALLE-pytorch#230.
Harm: of 64 samples a rank ever sees 32; eight of its twelve batches are ones that it saw before.
"""

# begins: 4

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Collater:
    def __call__(self, batch):
        frames, targets = zip(*batch, strict=True)
        return torch.stack(frames), torch.stack(targets)


class Trainer:
    def __init__(self, loader, model, optimizer):
        self.loaders = {"train": loader}
        self.model = model
        self.optimizer = optimizer
        self.steps = 0

    def run(self, max_steps):
        while self.steps < max_steps:
            self.train_epoch()

    def train_epoch(self):
        for frames, target in self.loaders["train"]:  # raises: DC401
            loss = nn.functional.l1_loss(self.model(frames), target)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
        print(f"rank {dist.get_rank()} step {self.steps} loss {loss.item():.4f}", flush=True)


def main():
    torch.manual_seed(3)
    x = torch.randn(64, 6)
    dataset = TensorDataset(x, x.cumsum(1))
    sampler = DistributedSampler(dataset, shuffle=True)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler, collate_fn=Collater())
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)))
    Trainer(loader, model, torch.optim.Adam(model.parameters())).run(12)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
