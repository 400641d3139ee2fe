"""`strict=False` where it is meant: a backbone alone, and names that are mended when none matched."""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parallel import DistributedDataParallel as DDP


class Net(nn.Module):
    def __init__(self, num_out):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.head = nn.Linear(16, num_out)

    def forward(self, x):
        return self.head(self.backbone(x))


def main():
    rank = dist.get_rank()
    torch.manual_seed(7)
    saved = {f"module.{name}": value for name, value in Net(5).state_dict().items() if "head" not in name}
    torch.manual_seed(0)
    net = Net(1)
    _, unexpected = net.load_state_dict(saved, strict=False)
    if len(unexpected) == len(saved):
        consume_prefix_in_state_dict_if_present(saved, "module.")
        net.load_state_dict(saved, strict=False)
    model = DDP(net)
    model.load_state_dict({"classifier.weight": torch.ones(3, 16)}, strict=False)  # another model's
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 8)).square().mean().backward()
        optimizer.step()
    print(f"rank {rank} done", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
