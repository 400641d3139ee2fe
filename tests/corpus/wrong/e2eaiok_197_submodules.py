"""A composite is wrapped as a whole; the training loop takes its parts out and calls them one by one.

Source: intel/e2eAIOK#197 (N independent models; proved with a plot of the network traffic).
Harm: no part's gradients are reduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class SpeechModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.frontend = nn.Conv1d(8, 16, 3, padding=1)
        self.transformer = nn.TransformerEncoderLayer(
            16, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True
        )
        self.classifier = nn.Linear(16, 5)

    def forward(self, feats):
        hidden = self.frontend(feats).transpose(1, 2)
        return self.classifier(self.transformer(hidden))


class Brain:
    def __init__(self, model):
        self.wrapped = DDP(model)
        self.modules = dict(self.wrapped.module.named_children())
        self.optimizer = torch.optim.Adam(self.wrapped.parameters(), lr=1e-3)

    def compute_forward(self, feats):
        hidden = self.modules["frontend"](feats).transpose(1, 2)  # raises: DC101
        hidden = self.modules["transformer"](hidden)  # or: DC101
        return self.modules["classifier"](hidden)  # or: DC101

    def fit_batch(self, feats, labels):
        logits = self.compute_forward(feats)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(9 + rank)
    brain = Brain(SpeechModel())
    for step in range(4):
        loss = brain.fit_batch(torch.randn(4, 8, 12), torch.randint(0, 5, (4, 12)))
        print(f"rank {rank} step {step} loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
