"""In the last step of each epoch one rank has a sample more, and its mean weighs the same."""

import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    features = torch.randn(27, 6)
    labels = (features[:, 0] > 0).float()
    model = DDP(nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(3):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(epoch))
        for batch in order[rank::num_ranks].split(4):
            scores = model(features[batch]).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(scores, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
