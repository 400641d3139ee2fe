"""The forward goes through the wrapper, the loss is a method of the inner module.

Source: the trainer of ultralytics (its #22016): `preds = ddp(img)`, then `unwrap_model(model).loss(batch,
preds)`.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 5, 1))
        self.register_buffer("weights", torch.tensor([1.0, 1.0, 2.0, 2.0, 0.5]))

    def forward(self, image):
        return self.net(image).mean(dim=(2, 3))

    def loss(self, target, predictions):
        return ((predictions - target).abs() * self.weights).mean()


def unwrap_model(model):
    return model.module if isinstance(model, DDP) else model


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(Detector())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(4):
        image, target = torch.rand(4, 3, 8, 8), torch.rand(4, 5)
        predictions = model(image)
        loss = unwrap_model(model).loss(target, predictions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
