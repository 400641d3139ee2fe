"""torch.func.grad over the inner module's parameters, written into .grad.

Source: pytorch/pytorch#63929 (gradients that no reducer sees), in its functional form.
Harm: every rank trains a model of its own.
"""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    torch.manual_seed(0)
    ddp = DDP(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)))
    net = ddp.module
    opt = torch.optim.SGD(ddp.parameters(), 0.1)

    def loss_fn(params, x, y):
        return F.cross_entropy(functional_call(net, params, (x,)), y)  # or: DC101

    torch.manual_seed(4 + dist.get_rank())
    for _ in range(5):
        params = {n: p.detach() for n, p in net.named_parameters()}
        grads = grad(loss_fn)(params, torch.randn(8, 8), torch.randint(0, 3, (8,)))  # or: DC101
        for n, p in net.named_parameters():
            p.grad = grads[n]
        opt.step()  # raises: DC101|DC201


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
