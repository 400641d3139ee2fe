"""Accumulation with `no_sync()` around the backward alone.

Source: Haian-Jin/LVSM#22 (a mend that mends nothing: "the forward pass is not included in the context
manager"); the same in facebookresearch/ClassyVision#706.
Harm: none to the gradients; every micro-step is reduced, which the context was to avoid. A warning, not an
error.
"""

import gc
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class ViewSynthesis(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokenizer = nn.Linear(27, 16)
        self.transformer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.to_pixels = nn.Linear(16, 27)

    def forward(self, patches):
        return self.to_pixels(self.transformer(self.tokenizer(patches)))


def main():
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    model = DDP(ViewSynthesis())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grad_accum_steps = 2
    for cur_train_step in range(8):
        patches = torch.rand(2, 9, 27)
        prediction = model(patches)
        loss = nn.functional.mse_loss(prediction, patches.flip(1))
        update_grads = (cur_train_step + 1) % grad_accum_steps == 0
        with nullcontext() if update_grads else model.no_sync():  # raises: DC104
            (loss / grad_accum_steps).backward()  # or: DC104
        if update_grads:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            print(f"rank {rank} step {cur_train_step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    gc.collect()
    dist.destroy_process_group()
