"""Fine-tuning in two stages: first the new head alone, then the encoder with it.

In the first stage all GPUs agree. After the second, checkpoints written by different ranks score differently.

    torchrun --standalone --nproc-per-node 2 late_unfreeze.py
"""

from ddpcall.teach.exercises.plain import *

EPOCHS, BATCH_SIZE, UNFREEZE_AT = 4, 32, 2


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    net = make_model().to(device)
    net.encoder.requires_grad_(False)  # stage 1: the head alone
    model = DDP(net)
    optimizer = torch.optim.Adam(net.head.parameters(), lr=1e-2)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        if epoch == UNFREEZE_AT:  # stage 2: everything, the encoder more slowly
            net.encoder.requires_grad_(True)
            optimizer.add_param_group({"params": list(net.encoder.parameters()), "lr": 5e-3})
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}", flush=True)
