"""Stages are timed by pre-hooks and hooks; the pipeline calls `stage.forward`.

Source: usc-isi/PipeEdge#7 (profiling hooks lost).
Harm: the profile is empty. One process, no wrapper.
"""
# ranks: 1

import time

import torch
from torch import nn


class StageProfiler:
    def __init__(self, stages):
        self.started, self.seconds = {}, {}
        for name, stage in stages.items():
            stage.register_forward_pre_hook(lambda module, inputs, name=name: self.start(name))
            stage.register_forward_hook(lambda module, inputs, output, name=name: self.stop(name))

    def start(self, name):
        self.started[name] = time.perf_counter()

    def stop(self, name):
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.started[name]


class Pipeline(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleDict(
            {
                "embed": nn.Linear(8, 32),
                "mix": nn.Sequential(nn.Linear(32, 32), nn.GELU()),
                "head": nn.Linear(32, 2),
            }
        )

    def forward(self, x):
        for stage in self.stages.values():
            x = stage.forward(x)  # raises: DC301
        return x


def main():
    torch.manual_seed(0)
    pipeline = Pipeline()
    profiler = StageProfiler(pipeline.stages)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-3)
    for step in range(4):
        x = torch.randn(8, 8)
        loss = nn.functional.mse_loss(pipeline(x), x[:, :2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} loss {loss.item():.4f} profiled {sorted(profiler.seconds)}", flush=True)


if __name__ == "__main__":
    main()
