"""Gradient accumulation by the flag: it is set between the forward and the backward.

Source: karpathy/build-nanogpt#30 (validation loss 4.88 instead of 4.15 after 1000 steps).
Harm: the last micro-step's forward still sees False, so the reducer is never armed and no step is ever reduced.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class GPT(nn.Module):
    def __init__(self, vocab=32, dim=16, context=8):
        super().__init__()
        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Embedding(context, dim)
        self.block = nn.TransformerEncoderLayer(dim, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.lm_head = nn.Linear(dim, vocab, bias=False)

    def forward(self, idx, targets):
        positions = torch.arange(idx.shape[1])
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        x = self.block(self.wte(idx) + self.wpe(positions), src_mask=mask, is_causal=True)
        logits = self.lm_head(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main():
    ddp_rank = int(os.environ["RANK"])
    torch.manual_seed(1337 + ddp_rank)
    model = DDP(GPT())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    grad_accum_steps = 4
    for step in range(4):
        optimizer.zero_grad()
        loss_accum = 0.0
        for micro_step in range(grad_accum_steps):
            tokens = torch.randint(0, 32, (2, 9))
            x, y = tokens[:, :-1], tokens[:, 1:]
            _, loss = model(x, y)  # or: DC104
            loss = loss / grad_accum_steps
            loss_accum += loss.detach()
            model.require_backward_grad_sync = micro_step == grad_accum_steps - 1  # raises: DC104
            loss.backward()  # or: DC104
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # or: DC104
        print(f"rank {ddp_rank} step {step} loss {loss_accum:.4f} norm {norm:.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
