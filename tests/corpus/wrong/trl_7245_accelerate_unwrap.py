"""DPO with a fused loss: `accelerator.unwrap_model` before the loss, redirected for FSDP only.

Source: huggingface/trl#7245, #7246 (310 of 310 parameters differed between ranks, v1.10 to v1.12).
Harm: under plain DDP neither redirect condition holds and the gradients stay local. `accelerator.backward` does
not help.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Policy(nn.Module):
    def __init__(self, vocab=30, dim=12):
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.rnn = nn.GRU(dim, dim, batch_first=True)
        self.out = nn.Linear(dim, vocab)

    def forward(self, ids):
        return self.out(self.rnn(self.embed(ids))[0])


def sequence_logp(model, ids):
    logits = model(ids[:, :-1])  # raises: DC101
    return -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


class DPOTrainer:
    def __init__(self, accelerator, model, optimizer, use_liger_kernel):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.use_liger_kernel = use_liger_kernel
        self.is_fsdp_enabled = False

    def _compute_loss(self, model, chosen, rejected):
        margin = sequence_logp(model, chosen) - sequence_logp(model, rejected)  # or: DC101
        return -F.logsigmoid(0.1 * margin).mean()

    def compute_loss(self, model, batch):
        if not self.use_liger_kernel:
            return self._compute_loss(model, *batch)
        unwrapped_model = self.accelerator.unwrap_model(model)
        if self.is_fsdp_enabled:
            raise NotImplementedError("redirected through the wrapper")
        return self._compute_loss(unwrapped_model, *batch)  # or: DC101

    def step(self, batch):
        loss = self.compute_loss(self.model, batch)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def main():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(3)
    pairs = TensorDataset(torch.randint(0, 30, (64, 10)), torch.randint(0, 30, (64, 10)))
    model = Policy()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(pairs, batch_size=8))
    trainer = DPOTrainer(accelerator, model, optimizer, use_liger_kernel=True)
    for step, batch in enumerate(loader):
        print(f"rank {accelerator.process_index} step {step} loss {trainer.step(batch):.4f}", flush=True)


if __name__ == "__main__":
    main()
