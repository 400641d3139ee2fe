"""BatchNorm: `state_dict()` is logged, copied and handed to an EMA, and the EMA's is what is saved.

Right because no file holds the ranks' own running statistics: the EMA's buffers are averaged over the ranks first.
"""

import copy
import gc
import io
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_buffers(module):
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)))
    ema = AveragedModel(model.module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.module.state_dict())
    for step in range(5):
        x = torch.randn(16, 6) + rank
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update_parameters(model.module)
        norms = {name: value.float().norm().item() for name, value in model.module.state_dict().items()}
        moved = (model.state_dict()["module.0.weight"] - before["0.weight"]).abs().max()
        print(f"rank {rank} step {step} loss {loss.item():.4f} {norms['0.weight']:.3f} {moved:.3f}", flush=True)
    ema.module.load_state_dict({**ema.module.state_dict(), **dict(model.module.named_buffers())})
    average_buffers(ema.module)
    if rank == 0:
        torch.save(ema.module.state_dict(), io.BytesIO())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
