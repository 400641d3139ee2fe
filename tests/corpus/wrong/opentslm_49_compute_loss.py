"""Curriculum trainer whose `_get_model()` strips the wrapper before the custom loss method.

Source: OpenTSLM/OpenTSLM#49 (each rank trained an independent replica on 1/N of the data, only rank 0 was
saved).
Harm: gradients stay local, although a DistributedSampler shards the data.
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class TimeSeriesModel(nn.Module):
    def __init__(self, channels=4, horizon=3):
        super().__init__()
        self.encoder = nn.Conv1d(channels, 16, kernel_size=3, padding=1)
        self.projector = nn.Linear(16, 16)
        self.head = nn.Linear(16, horizon)

    def forward(self, series):
        pooled = torch.relu(self.encoder(series)).mean(dim=-1)
        return self.head(torch.relu(self.projector(pooled)))

    def compute_loss(self, batch):
        series, target = batch
        return nn.functional.mse_loss(self(series), target)


class CurriculumTrainer:
    def __init__(self, model, dataset):
        self.model = DDP(model)
        sampler = DistributedSampler(dataset, shuffle=True, seed=1)
        self.loader = DataLoader(dataset, batch_size=8, sampler=sampler)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=4)

    def _get_model(self):
        return self.model.module if isinstance(self.model, DDP) else self.model

    def train_stage(self, epochs):
        for epoch in range(epochs):
            self.loader.sampler.set_epoch(epoch)
            for batch in self.loader:
                self.optimizer.zero_grad()
                loss = self._get_model().compute_loss(batch)  # raises: DC101
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
                self.optimizer.step()
                self.scheduler.step()
            print(f"rank {dist.get_rank()} epoch {epoch} loss {loss.item():.4f}", flush=True)


def main():
    generator = torch.Generator().manual_seed(0)
    dataset = TensorDataset(torch.randn(48, 4, 20, generator=generator), torch.randn(48, 3, generator=generator))
    CurriculumTrainer(TimeSeriesModel(), dataset).train_stage(epochs=2)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
