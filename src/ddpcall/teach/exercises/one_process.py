"""Two clinics, one rank each: rank 0 reads the samples of the one, rank 1 those of the other.

In the first clinic nearly every sample was labeled, in the second every fourth; samples without a label have
-100, which cross entropy leaves out. All ranks hold one model, and DDP averages. "On one GPU, with both clinics in
every batch, it learns something else", says the colleague who wrote it.

    torchrun --standalone --nproc-per-node 2 one_process.py
"""

from ddpcall.teach.exercises.plain import *

EPOCHS, BATCH_SIZE = 4, 32


def make_data(split, samples=768):
    generator = torch.Generator().manual_seed({"train": 1, "test": 2}[split])
    centers = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * 1.5
    labels = torch.randint(0, 4, (samples,), generator=generator)
    inputs = centers[labels] + torch.randn(samples, 8, generator=generator)
    if split == "train":
        share = torch.where(torch.arange(samples) < samples // 2, 0.95, 0.25)
        labels[torch.rand(samples, generator=generator) > share] = -100
    return TensorDataset(inputs, labels)


def main(device):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    data = make_data("train")
    share = len(data) // ranks
    loader = DataLoader(Subset(data, range(rank * share, (rank + 1) * share)), BATCH_SIZE, drop_last=True)

    model = DDP(make_model().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    for epoch in range(EPOCHS):
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}", flush=True)
