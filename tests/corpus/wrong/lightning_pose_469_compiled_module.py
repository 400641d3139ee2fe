"""DDP around a compiled model; the loss goes through `.module`, which is the compiled code but not the wrapper.

Source: paninski-lab/lightning-pose#469 (a compiled module bypassed in wrappers).
Harm: compiled, fast, and not reduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class PoseNet(nn.Module):
    def __init__(self, keypoints=3):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()
        )
        self.head = nn.Linear(8, 2 * keypoints)

    def forward(self, image):
        return self.head(self.backbone(image).mean(dim=(2, 3)))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(torch.compile(PoseNet(), backend="eager"))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(4):
        image, keypoints = torch.rand(6, 1, 17, 17), torch.rand(6, 6)
        predicted = model.module(image)  # raises: DC101
        loss = ((predicted - keypoints) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} mse {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
