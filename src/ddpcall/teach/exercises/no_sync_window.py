"""Gradient accumulation: four micro-batches a step, and gradients travel once a step instead of four times.

It saves the communication as promised. "The loss is a little higher than on one GPU with the same batch", says the
colleague who wrote it.

    torchrun --standalone --nproc-per-node 2 no_sync_window.py
"""

from ddpcall.teach.exercises.plain import *

EPOCHS, BATCH_SIZE, ACCUMULATE = 6, 16, 4


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    model = DDP(make_model().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(loader):
            # Only one micro-batch in four has to synchronize.
            model.require_backward_grad_sync = index % ACCUMULATE == 0
            loss = F.cross_entropy(model(x.to(device)), y.to(device)) / ACCUMULATE
            loss.backward()
            if (index + 1) % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
        print(f"rank {rank} epoch {epoch} loss {loss.item() * ACCUMULATE:.3f}", flush=True)
