"""Resume: the model is loaded before wrapping everywhere, the optimizer's state on rank 0 only.

Source: intelligent-machine-learning/dlrover#1034's mechanism, for the optimizer's state.
Harm: the moments differ, and the replicas drift from the first step.
"""

# raises: DC201|DC203
import copy
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    net = nn.Linear(8, 3)
    pre = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(2):
        net(torch.randn(4, 8)).square().mean().backward()
        pre.step()
    checkpoint = {"model": copy.deepcopy(net.state_dict()), "optimizer": copy.deepcopy(pre.state_dict())}
    net = nn.Linear(8, 3)
    net.load_state_dict(checkpoint["model"])
    model = DDP(net)
    opt = torch.optim.Adam(model.parameters(), 0.05)
    if dist.get_rank() == 0:
        opt.load_state_dict(checkpoint["optimizer"])
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(4):
        loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        opt.zero_grad()
        loss.backward()
        opt.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
