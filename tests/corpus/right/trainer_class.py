"""A Trainer in the Hugging Face style: sampler, collator, callbacks, evaluation through the wrapper,
checkpoint."""

import gc
import io
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


class Trainer:
    def __init__(self, model, dataset, callbacks=()):
        self.model = model
        self.model_wrapped = DDP(model)
        self.sampler = DistributedSampler(dataset, seed=3)
        self.loader = DataLoader(dataset, batch_size=8, sampler=self.sampler)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 1e-2, total_steps=20)
        self.callbacks = callbacks
        self.global_step = 0

    def compute_loss(self, model, inputs):
        features, labels = inputs
        return nn.functional.cross_entropy(model(features), labels)

    def training_step(self, model, inputs):
        model.train()
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()

    def train(self, epochs):
        for epoch in range(epochs):
            self.sampler.set_epoch(epoch)
            for inputs in self.loader:
                loss = self.training_step(self.model_wrapped, inputs)
                nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.model.zero_grad()
                self.global_step += 1
                for callback in self.callbacks:
                    callback(self, loss)
            self.evaluate()

    @torch.no_grad()
    def evaluate(self):
        self.model_wrapped.eval()
        losses = torch.stack([self.compute_loss(self.model_wrapped, inputs) for inputs in self.loader])
        total = losses.mean()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            torch.save(self.model.state_dict(), io.BytesIO())
            print(f"step {self.global_step} eval {total.item() / dist.get_world_size():.4f}", flush=True)


def main():
    torch.manual_seed(0)
    x = torch.randn(48, 6)
    torch.manual_seed(100 + int(os.environ["RANK"]))
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 3))
    log = lambda trainer, loss: print(f"step {trainer.global_step} loss {loss.item():.4f}", flush=True)  # noqa: E731
    Trainer(model, TensorDataset(x, x[:, :3].argmax(1)), callbacks=[log]).train(epochs=2)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
