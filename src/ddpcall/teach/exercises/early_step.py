"""Memory-saving training: every parameter is stepped in its gradient hook, and its gradient is freed at once.

The encoder learns more slowly than the head, as planned. On one GPU it works; on two, the replicas drift apart.

    torchrun --standalone --nproc-per-node 2 early_step.py
"""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS, BATCH_SIZE = 3, 32


class Net(nn.Module):
    def __init__(self, features=8, classes=4, width=32):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.encoder(x))


def make_data(split, samples=768):
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    centers = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 1.5
    labels = torch.randint(0, 4, (samples,), generator=generator)
    return TensorDataset(centers[labels] + torch.randn(samples, 8, generator=generator), labels)


def make_model():
    torch.manual_seed(0)
    return Net()


def make_optimizers(net):
    """One optimizer a parameter; the encoder's learning rate is a third of the head's."""
    rates = {name: 5e-3 if name.startswith("encoder") else 15e-3 for name, _ in net.named_parameters()}
    return {parameter: torch.optim.Adam([parameter], lr=rates[name]) for name, parameter in net.named_parameters()}


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    model = DDP(make_model().to(device))
    optimizers = make_optimizers(model.module)

    def step_and_free(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_and_free)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    use_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if use_gpu else "gloo")
    main(torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu"))
    gc.collect()
    dist.destroy_process_group()
