"""An exponential moving average by AveragedModel over the inner module, evaluated without gradients."""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(6, 24), nn.SiLU(), nn.Linear(24, 6)))
    ema = AveragedModel(model.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(5):
        x, noise = torch.randn(16, 6), torch.randn(16, 6)
        loss = nn.functional.mse_loss(model(x + noise), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(model.module)
        with torch.no_grad():
            ema_loss = nn.functional.mse_loss(ema(x + noise), noise)
        print(f"rank {rank} step {step} loss {loss.item():.4f} ema {ema_loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
