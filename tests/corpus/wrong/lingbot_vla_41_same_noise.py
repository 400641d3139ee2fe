"""Every rank seeds its generator alike: the noise and the time steps of flow matching are the same on all ranks.

Source: Robbyant/lingbot-vla-v2#41.
Harm: of 32 samples of a step's two batches 16 have noise and time steps that another sample of it has, too.
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class FlowMatching(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 1, 24), nn.SiLU(), nn.Linear(24, dim))

    def forward(self, actions):
        noise = torch.randn(actions.shape, device=actions.device)  # raises: DC404
        time = torch.rand(len(actions), 1)  # or: DC404
        noisy = time * noise + (1 - time) * actions
        velocity = self.net(torch.cat([noisy, time], 1))
        return nn.functional.mse_loss(velocity, noise - actions), noise


def main():
    torch.manual_seed(42)
    actions = torch.randn(192, 5, generator=torch.Generator().manual_seed(3)).cumsum(1)
    dataset = TensorDataset(actions)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=16, sampler=sampler)
    model = DDP(FlowMatching(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (batch,) in loader:
            loss, noise = model(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    of_all = [torch.empty_like(noise) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, noise)
    print(
        f"rank {dist.get_rank()} the same noise: {of_all[0].equal(of_all[1])} loss {loss.item():.4f}", flush=True
    )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
