"""A normalising flow is trained through `inverse`; only `forward` is compiled.

Source: pytorch/pytorch#141616 (`optimized.inverse(x)` silently never compiles).
Harm: the training loop runs eager from start to end.
"""
# ranks: 1

import torch
from torch import nn


class AffineFlow(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.shift = nn.Parameter(torch.zeros(dim))
        self.mix = nn.Linear(dim, dim, bias=False)
        nn.init.orthogonal_(self.mix.weight)

    def forward(self, z):
        return self.mix(z) * self.log_scale.exp() + self.shift

    def inverse(self, x):
        z = (x - self.shift) * (-self.log_scale).exp()
        return torch.linalg.solve(self.mix.weight, z.T).T, -self.log_scale.sum()


def main():
    torch.manual_seed(1)
    flow = torch.compile(AffineFlow(), backend="eager")
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for step in range(5):
        x = torch.randn(32, 4) * 2 + 1
        z, logdet = flow.inverse(x)  # raises: DC302
        loss = 0.5 * z.pow(2).sum(-1).mean() - logdet
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step} nll {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
