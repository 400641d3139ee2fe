"""`transform_if_model_is_DDP`: the wrappers are thrown away right after prepare, for the sake of attribute
access.

Source: kohya-ss/sd-scripts#924 (proved by making one worker sleep and seeing no hang) and #604.
Harm: unet and text encoder train on local gradients.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.final = nn.Linear(16, 16)

    def forward(self, tokens):
        return self.final(self.embedding(tokens).mean(1))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(4, 8, 3, padding=1)
        self.cond = nn.Linear(16, 8)
        self.up = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, latents, context):
        hidden = torch.relu(self.down(latents) + self.cond(context)[:, :, None, None])
        return self.up(hidden)


def transform_if_model_is_ddp(*models):
    return [m.module if isinstance(m, DistributedDataParallel) else m for m in models]


def main():
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    torch.manual_seed(10 + rank)
    unet, text_encoder = UNet(), TextEncoder()
    optimizer = torch.optim.AdamW([*unet.parameters(), *text_encoder.parameters()], lr=1e-3)
    unet, text_encoder, optimizer = accelerator.prepare(unet, text_encoder, optimizer)
    unet, text_encoder = transform_if_model_is_ddp(unet, text_encoder)

    for step in range(4):
        latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        context = text_encoder(torch.randint(0, 50, (2, 6)))  # raises: DC101
        noise_pred = unet(latents + 0.5 * noise, context)  # raises: DC101
        loss = nn.functional.mse_loss(noise_pred, noise)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"rank {rank} step {step} loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
