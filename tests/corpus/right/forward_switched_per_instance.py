"""The model sets its own `forward` on the instance when the mode changes."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.forward = self.forward_train

    def train(self, mode=True):
        super().train(mode)
        self.forward = self.forward_train if mode else self.forward_test
        return self

    def forward_train(self, x, y):
        return {"loss": F.cross_entropy(self.fc(x), y)}

    def forward_test(self, x):
        return self.fc(x).argmax(-1)


def main():
    torch.manual_seed(0)
    model = DDP(Detector())
    opt = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(4 + dist.get_rank())
    for _step in range(4):
        loss = model(torch.randn(8, 6), torch.randint(0, 3, (8,)))["loss"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        model.eval()
        with torch.no_grad():
            assert model(torch.randn(5, 6)).shape == (5,)
            assert model.module(torch.randn(5, 6)).shape == (5,)
        model.train()
    assert model.module.forward == model.module.forward_train


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
