"""The test set is shared out by a DistributedSampler that adds samples, and the sums over the ranks count them.

Source: pytorch/pytorch#25162, roboflow/rf-detr#1507.
Harm: 61 samples are averaged as 62: the error that is reported is 3.6159, that of the test set 3.6536.
"""

# begins: 4

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class AverageMeter:
    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, value, num):
        self.sum += value * num
        self.count += num

    def reduce(self):
        total = torch.tensor([self.sum, float(self.count)])
        dist.all_reduce(total, dist.ReduceOp.SUM)  # raises: DC403
        return (total[0] / total[1]).item()


def evaluate(model, loader):
    model.eval()
    meter = AverageMeter()
    for inputs, target in loader:
        with torch.no_grad():
            error = nn.functional.mse_loss(model(inputs), target)
        meter.update(error.item(), len(inputs))
    model.train()
    return meter.reduce()


def main():
    torch.manual_seed(3 + dist.get_rank())
    x = torch.randn(128, 6, generator=torch.Generator().manual_seed(3))
    train, test = TensorDataset(x[:64], x[:64].cumsum(1)), TensorDataset(x[64:125], x[64:125].cumsum(1))
    sampler = DistributedSampler(train)
    loader = DataLoader(train, batch_size=8, sampler=sampler)
    tested = DataLoader(test, batch_size=8, sampler=DistributedSampler(test, shuffle=False))
    model = DDP(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)))
    optimizer = torch.optim.Adam(model.parameters())
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for inputs, target in loader:
            loss = nn.functional.mse_loss(model(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error = evaluate(model, tested)
    with torch.no_grad():
        true = nn.functional.mse_loss(model(x[64:125]), x[64:125].cumsum(1)).item()
    print(f"rank {dist.get_rank()} error {error:.6f}, of the test set {true:.6f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
