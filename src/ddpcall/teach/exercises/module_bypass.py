"""Classify sensor readings on several GPUs. A colleague says: "with two GPUs it got worse, not better".

The forward hook on the model logs how strong its outputs are, once a step; the log stays empty, too.

    torchrun --standalone --nproc-per-node 2 module_bypass.py
"""

from ddpcall.teach.exercises.plain import *


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    model = DDP(make_model().to(device))
    strengths = []
    model.register_forward_hook(lambda module, inputs, outputs: strengths.append(outputs.detach().abs().mean()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            logits = model.module(x.to(device))
            loss = F.cross_entropy(logits, y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}, {len(strengths)} strengths logged", flush=True)
