"""Two wrapped modules: the backbone is called, the action head's method is reached through `.module`.

Source: moojink/openvla-oft#160 (finetune.py: `action_head.module.predict_action(...)`).
Harm: the head's parameters drift; the backbone's gradients are reduced, but come through different heads.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Backbone(nn.Module):
    def __init__(self, dim=24):
        super().__init__()
        self.vision = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, dim), nn.ReLU())
        self.fuse = nn.Linear(dim, dim)

    def forward(self, pixels):
        return self.fuse(self.vision(pixels))


class L1RegressionActionHead(nn.Module):
    def __init__(self, dim=24, action_dim=7, chunk=4):
        super().__init__()
        self.chunk, self.action_dim = chunk, action_dim
        self.model = nn.Sequential(nn.Linear(dim, 32), nn.ReLU(), nn.Linear(32, action_dim * chunk))

    def predict_action(self, hidden):
        return self.model(hidden).reshape(-1, self.chunk, self.action_dim)


def run_forward_pass(vla, action_head, batch):
    hidden = vla(batch["pixels"])
    predicted = action_head.module.predict_action(hidden)  # raises: DC101
    return nn.functional.l1_loss(predicted, batch["actions"])


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(7 + rank)
    vla = DDP(Backbone())
    action_head = DDP(L1RegressionActionHead())
    trainable = [p for module in (vla, action_head) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    for step in range(5):
        batch = {"pixels": torch.randn(6, 3, 8, 8) + rank, "actions": torch.randn(6, 4, 7)}
        loss = run_forward_pass(vla, action_head, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"rank {rank} step {step} l1 {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
