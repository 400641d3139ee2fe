"""Each rank has averaged only its shard of the gradients: the norm of all of them is the sum over the ranks."""

import torch
import torch.distributed as dist
from torch import nn

MAX_NORM = 0.5


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1 + rank)
    for _ in range(4):
        x = torch.randn(8, 6)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), 10 * x.sum(1, keepdim=True)).backward()
        parameters = list(model.parameters())
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size
        shards = [p.grad.flatten()[rank::world_size] for p in parameters]
        squared = torch.stack([shard.pow(2).sum() for shard in shards]).sum()
        dist.all_reduce(squared)
        nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, squared.sqrt())
        optimizer.step()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
