"""Training with BatchNorm and Dropout; rank 0 evaluates after every epoch while the others go on.

No collective ever complains and gradients are averaged in every step. The published accuracy cannot be reproduced.

    torchrun --standalone --nproc-per-node 2 rank0_eval.py
"""

from ddpcall.teach.exercises.plain import *  # pyright: ignore[reportAssignmentType]


class Net(nn.Module):
    def __init__(self, features=8, classes=4, width=32):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.encoder(x))


@torch.no_grad()
def evaluate(net, device):
    net.eval()
    x, y = make_data("test").tensors
    return (net(x.to(device)).argmax(1) == y.to(device)).float().mean().item()


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    model = DDP(make_model().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(100 + rank)  # every rank drops units of its own

    model.train()
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(
                f"epoch {epoch} loss {loss.item():.3f} accuracy {evaluate(model.module, device):.1%}", flush=True
            )
