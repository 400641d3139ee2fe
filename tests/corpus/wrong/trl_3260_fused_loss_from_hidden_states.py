"""A fused loss takes hidden states from the unwrapped decoder and multiplies by the head's weight itself.

Source: huggingface/trl#3260 (Liger GRPO loss): logits are never materialised, so the trainer unwraps the model,
calls the decoder and hands `lm_head.weight` to the loss kernel. DDP.forward never runs.
Harm: decoder and head train on local gradients; both drift from the first step on.
"""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Decoder(nn.Module):
    def __init__(self, vocab, dim):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for _ in range(2))

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


class CausalLM(nn.Module):
    def __init__(self, vocab=40, dim=16):
        super().__init__()
        self.model = Decoder(vocab, dim)
        self.lm_head = nn.Linear(dim, vocab, bias=False)

    def forward(self, input_ids):
        return self.lm_head(self.model(input_ids))


class FusedLinearLoss(nn.Module):
    """Projects in chunks, so that the full logits never exist."""

    def forward(self, weight, hidden, labels, advantages):
        losses = []
        for hidden_chunk, label_chunk, advantage_chunk in zip(
            hidden.chunk(2), labels.chunk(2), advantages.chunk(2), strict=True
        ):
            logp = F.linear(hidden_chunk, weight).log_softmax(-1).gather(-1, label_chunk[..., None])[..., 0]
            losses.append(-(logp * advantage_chunk[:, None]).mean())
        return torch.stack(losses).mean()


class GRPOTrainer:
    def __init__(self, model):
        self.model = model
        self.liger_loss = FusedLinearLoss()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def _get_last_hidden_state(self, unwrapped_model, input_ids):
        return unwrapped_model.model(input_ids)  # raises: DC101

    def compute_liger_loss(self, unwrapped_model, batch):
        ids, advantages = batch
        hidden = self._get_last_hidden_state(unwrapped_model, ids[:, :-1])  # or: DC101
        return self.liger_loss(unwrapped_model.lm_head.weight, hidden, ids[:, 1:], advantages)

    def training_step(self, batch):
        loss = self.compute_liger_loss(self.model.module, batch)  # or: DC101
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    trainer = GRPOTrainer(DDP(CausalLM()))
    for step in range(4):
        batch = torch.randint(0, 40, (8, 9)), torch.randn(8)
        print(f"rank {rank} step {step} loss {trainer.training_step(batch):.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
