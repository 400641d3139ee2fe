"""Warnings are errors, anomalies are detected, algorithms deterministic, default dtype float64, args parsed."""

import argparse
import gc
import sys
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    warnings.simplefilter("error")
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    assert sys.argv[0] == __file__
    assert __name__ == "__main__"
    assert sys.modules["__main__"].main is main
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True, check_nan=True)
    torch.manual_seed(0)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    net = net.to_empty(device="cpu")
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    model = DDP(net)
    opt = torch.optim.NAdam(model.parameters(), 0.01)
    torch.manual_seed(4 + dist.get_rank())
    for _ in range(args.steps):
        loss = F.cross_entropy(model(torch.randn(8, 8)), torch.randint(0, 3, (8,)))
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.inference_mode():
            model.module(torch.randn(2, 8))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
    warnings.simplefilter("default")
