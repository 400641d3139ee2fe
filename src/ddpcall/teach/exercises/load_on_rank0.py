"""Fine-tuning from a pretrained checkpoint. Only rank 0 reads it: "one read from the network disk is enough".

Gradients are averaged in every step, and still every rank ends with a model of its own.

    torchrun --standalone --nproc-per-node 2 load_on_rank0.py
"""

from ddpcall.teach.exercises.plain import *


def pretrained_weights():
    """Stands for the file on the network disk."""
    torch.manual_seed(1234)
    return {name: 1.5 * value for name, value in Net().state_dict().items()}


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    model = DDP(make_model().to(device))
    if rank == 0:
        model.module.load_state_dict(pretrained_weights())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}", flush=True)
