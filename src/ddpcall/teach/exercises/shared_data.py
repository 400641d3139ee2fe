"""Everything about DDP is right here, and two GPUs need as many steps as one.

The loader shuffles, every rank shuffles alike, and an epoch takes as long on two GPUs as on one.

    torchrun --standalone --nproc-per-node 2 shared_data.py
"""

from ddpcall.teach.exercises.plain import *


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    torch.manual_seed(0)
    loader = DataLoader(data, BATCH_SIZE, shuffle=True)

    model = DDP(make_model().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for epoch in range(EPOCHS):
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}", flush=True)
