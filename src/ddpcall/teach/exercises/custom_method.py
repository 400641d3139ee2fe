"""A model with a loss of its own: `compute_loss` adds a reconstruction to the cross entropy.

DDP has no such method, so the trainer reaches for the model inside. It ran at once, and it has been wrong since.

    torchrun --standalone --nproc-per-node 2 custom_method.py
"""

from ddpcall.teach.exercises.plain import *  # pyright: ignore[reportAssignmentType]


class Net(nn.Module):
    def __init__(self, features=8, classes=4, width=32):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, width), nn.ReLU())
        self.head = nn.Linear(width, classes)
        self.decoder = nn.Linear(width, features)  # for the reconstruction in the loss

    def forward(self, x):
        return self.head(self.encoder(x))

    def compute_loss(self, x, y):
        hidden = self.encoder(x)
        return F.cross_entropy(self.head(hidden), y) + 0.1 * F.mse_loss(self.decoder(hidden), x)


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    model = DDP(make_model().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            net = model.module if isinstance(model, DDP) else model
            loss = net.compute_loss(x.to(device), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}", flush=True)
