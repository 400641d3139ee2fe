"""Multi-task speech model: the encoder runs as a method of the inner module, the CTC head as another.

Source: k2-fsa/icefall#226 (`model.module.forward_encoder()`; the thread could not settle when this is
synchronised).
Harm: nothing went through DDP.forward in this step, so no gradient is reduced. Were the wrapper called too,
before the backward, the armed reducer would reduce these gradients as well.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


class Transducer(nn.Module):
    def __init__(self, features=20, dim=24, vocab=12):
        super().__init__()
        self.encoder = nn.LSTM(features, dim, batch_first=True)
        self.ctc_output = nn.Linear(dim, vocab)

    def forward_encoder(self, x):
        return self.encoder(x)[0]

    def forward_ctc(self, encoder_out):
        return self.ctc_output(encoder_out).log_softmax(-1)

    def forward(self, x):
        return self.forward_ctc(self.forward_encoder(x))


def compute_loss(model, features, targets):
    encoder_out = model.module.forward_encoder(features)  # raises: DC101
    logp = model.module.forward_ctc(encoder_out)  # or: DC101
    lengths = torch.full((features.shape[0],), features.shape[1])
    target_lengths = torch.full((features.shape[0],), targets.shape[1])
    return nn.functional.ctc_loss(logp.transpose(0, 1), targets, lengths, target_lengths)


def train(rank, steps=4):
    torch.manual_seed(17 * (rank + 1))
    model = DDP(Transducer())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        features = torch.randn(4, 15, 20)
        targets = torch.randint(1, 12, (4, 5))
        loss = compute_loss(model, features, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} step {step} ctc {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    train(int(os.environ["RANK"]))
    gc.collect()
    dist.destroy_process_group()
