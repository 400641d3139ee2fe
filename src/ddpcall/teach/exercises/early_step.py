"""Memory-saving training: every parameter is stepped in its gradient hook, and its gradient is freed at once.

The encoder learns more slowly than the head, as planned. On one GPU it works; on two, the replicas drift apart.

    torchrun --standalone --nproc-per-node 2 early_step.py
"""

from ddpcall.teach.exercises.plain import *


def make_optimizers(net):
    """One optimizer a parameter; the encoder's learning rate is a third of the head's."""
    rates = {name: 5e-3 if name.startswith("encoder") else 15e-3 for name, _ in net.named_parameters()}
    return {parameter: torch.optim.Adam([parameter], lr=rates[name]) for name, parameter in net.named_parameters()}


def main(device):
    rank = dist.get_rank()
    data = make_data("train")
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, BATCH_SIZE, sampler=sampler)

    model = DDP(make_model().to(device))
    optimizers = make_optimizers(model.module)

    def step_and_free(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_and_free)

    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
        print(f"rank {rank} epoch {epoch} loss {loss.item():.3f}", flush=True)
