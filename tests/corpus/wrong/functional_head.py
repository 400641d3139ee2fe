"""Linear probing: features without gradient, then the head's weights used by hand.

Source: pytorch/pytorch#60921 (unsupported by design), with raw weights and no module's forward.
Harm: the head trains on local gradients.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 8, 3)
        self.backbone.requires_grad_(False)

    def forward(self, x):
        return self.head(self.backbone(x))


def cosine_logits(model, features):
    weight = F.normalize(model.module.head.weight, dim=-1)  # or: DC101
    return F.linear(F.normalize(features, dim=-1), 10 * weight, model.module.head.bias)  # raises: DC101


def main():
    torch.manual_seed(0)
    model = DDP(Net())
    opt = torch.optim.Adam(model.module.head.parameters(), 1e-2)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(5):
        x, y = torch.randn(8, 1, 10), torch.randint(0, 3, (8,))
        with torch.no_grad():
            features = model.module.backbone(x)
        loss = F.cross_entropy(cosine_logits(model, features), y)  # or: DC101
        opt.zero_grad(set_to_none=True)
        loss.backward()  # or: DC101
        opt.step()  # or: DC101


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
